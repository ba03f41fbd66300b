"""Keeps a worker running beside a page or a service, and begins another when it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = "worker.log"
MAX_LOG_BYTES = 1 << 22
BEGIN_AGAIN = 1.0  # seconds


class Supervisor:
    """`start` begins the worker; `close` ends it after the step that runs, and what it does waits for the next one."""

    def __init__(self, state: Path, bundles: Path, output: Path):
        self.state, self.folders = state, (state, bundles, output)
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def start(self) -> None:
        self.state.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    @property
    def worker(self) -> int | None:
        """The number of its process; None between two."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    def _keep(self) -> None:
        while not self._closing.is_set():
            log = self.state / LOG
            mode = "wb" if log.exists() and log.stat().st_size > MAX_LOG_BYTES else "ab"
            with open(log, mode) as file:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "mifo.jobs.worker", *map(str, self.folders)] if sys.version_info >= (3, 11)
                    else [sys.executable, "-m", "mifo.jobs.worker", *map(str, self.folders)],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env=self._environment(),
                )  # fmt: skip
            self._process.wait()
            self._closing.wait(BEGIN_AGAIN)

    def _environment(self) -> dict[str, str]:
        """Where this very package lies comes first, wherever the process was started."""
        package = str(Path(__file__).parents[2])
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

    def close(self, seconds: float = 30.0) -> None:
        self._closing.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def working(state: Path, bundles: Path, output: Path) -> Iterator[Supervisor]:
    """A worker for as long as the block lasts."""
    supervisor = Supervisor(state, bundles, output)
    supervisor.start()
    try:
        yield supervisor
    finally:
        supervisor.close()
