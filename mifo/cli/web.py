"""The command that serves the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..io.console import Job, say, waiting
from ..io.files import check_writable
from .app import app
from .job import job_command
from .options import path


@job_command(app, "mifo web")
def web(
    job: Job,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.")] = None,
    folder: Annotated[Path, path("Where Model_ours, output and my_photos are.")] = Path("."),
) -> None:
    """Serve a page on this machine: make masks by clicks, learn, place by dragging boxes, edit, and look through bundles."""
    check_writable(folder)
    with waiting("loading the page"):
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise InputError("the page needs Gradio; pip install 'mifo[web]' adds it") from None
        from ..web.page import serving, site_in

    with serving(site_in(folder), port) as address:
        job.text(f"mifo is at {address} (this machine alone); Ctrl-C ends it")
        job.json({"address": address})
        say("what runs when it ends goes on when it is started again")
        while True:
            time.sleep(3600)
