"""The command that serves requests of other programs."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..io.console import Job, waiting
from ..io.files import check_writable
from .app import app
from .job import job_command
from .options import path

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@job_command(app, "mifo serve --port 8600 --keys keys.txt")
def serve(
    job: Job,
    host: Annotated[str, typer.Option(help="Any but 127.0.0.1 needs --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8600,
    folder: Annotated[Path, path("Where Model_ours and output are.")] = Path("."),
    keys: Annotated[Path | None, path("A file with a name and a key a line, which requests give as X-API-Key.")] = None,
    model_path: Annotated[str | None, path("The base model of every job; the bundle's own by default.")] = None,
    most_queued: Annotated[int, typer.Option(min=1, help="Jobs that may wait.")] = 1000,
    most_a_minute: Annotated[int, typer.Option(min=1, help="Requests of one key in a minute.")] = 600,
) -> None:
    """Serve POST /synthesize, /edit and /learn, GET /jobs/ID and /bundles; /openapi.json describes them."""
    from ..serve.access import read_keys

    check_writable(folder)
    known = read_keys(keys)
    if host not in LOOPBACK and not known:
        raise InputError(f"--host is {host}, where others can ask for jobs; give --keys too")
    with waiting("loading the service"):
        try:
            import uvicorn

            from ..serve.service import Limits, make_service
        except ImportError:
            raise InputError("the service needs FastAPI and uvicorn; pip install 'mifo[serve]' adds them") from None
        from ..jobs.supervisor import working
        from ..jobs.uploads import SERVE_STATE

        state, bundles, output = folder / SERVE_STATE, folder / "Model_ours", folder / "output"
        service = make_service(state, bundles, output, model_path, known,
                               Limits(most_queued=most_queued, most_a_minute=most_a_minute))  # fmt: skip
    with _listening(host, port) as taken, working(state, bundles, output):
        job.text(f"mifo serves at http://{host}:{port}; Ctrl-C ends it, and jobs that wait are done when it is started again")
        job.json({"address": f"http://{host}:{port}"})
        uvicorn.Server(uvicorn.Config(service, log_level="warning", access_log=False)).run(sockets=[taken])


def _listening(host: str, port: int) -> socket.socket:
    """The port, before anything is said of it. Raises InputError where it cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise InputError(f"port {port} of {host} cannot be had ({error.strerror}); choose another --port") from None
