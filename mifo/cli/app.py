"""The command line's root: the app with which the command modules register, and how a process runs it.

Results go to standard output (one JSON object with --json), progress and messages to standard error.
Exit status: 0 done, 2 the input is wrong, 1 our fault, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import atexit
from typing import Annotated

import typer

from .. import __version__
from ..io.console import leave
from ..io.interrupts import heard, listen
from ..io.terminal import guard_streams, quiet_libraries

app = typer.Typer(
    name="mifo",
    help="Learn the things in one photo, each as its own word, and put each of them where you want in new pictures.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # cuts option names at 80 columns, and reads [x0, y0, x1, y1] as a style
)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


def main() -> None:
    """Runs the command line of this process."""
    status = 1  # of an error that nobody expected; Python has said which
    atexit.register(lambda: leave(status))  # the first to be registered is the last to run
    quiet_libraries()
    guard_streams()
    listen()
    try:
        app()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if heard.first is not None and status == 1:  # outside of a job click takes every interruption for Ctrl-C
            status = 128 + heard.first
        raise
