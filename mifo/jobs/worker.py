"""The process that does what the list of jobs holds, one after the other:

    python -m mifo.jobs.worker STATE_FOLDER

A process of its own, so that what uses up the memory ends no page and no service; and its jobs run in the main thread, where
a stop after the step that runs, with its state kept, is what Ctrl-C does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, NotFinite
from ..io.console import OUT_OF_MEMORY
from ..io.interrupts import interrupt, listen
from ..io.lock import hold_lock
from ..io.terminal import guard_streams, quiet_libraries
from ..io.threads import choose_waiting
from .job import LearnJob
from .store import CANCELLED, DONE, FAILED, Entry, JobStore

if TYPE_CHECKING:
    from .workshop import Workshop

LIST = "jobs.sqlite3"
PREVIEWS = "previews"
LOOK_EVERY = 0.2  # seconds
REPORT_EVERY = 0.3


def preview_of(state: Path, number: int) -> Path:
    """Where the assets of a learning job look, while it runs and after."""
    return state / PREVIEWS / f"{number:06d}.png"


def work(state: Path, bundles: Path, output: Path) -> None:
    """Does jobs until the process that began it has gone, or a signal comes. Raises InputError where another worker is there."""
    with hold_lock(state / "worker", f"working on {state}", "choose another folder"):
        store, parent = JobStore(state / LIST), os.getppid()
        store.recover()
        from .workshop import Workshop  # what takes seconds to import comes after the lock, so that a second one ends at once

        workshop = Workshop(bundles, output)
        while os.getppid() == parent:
            entry = store.take()
            if entry is None:
                time.sleep(LOOK_EVERY)
            elif not _do(store, workshop, entry, state):
                return


def _do(store: JobStore, workshop: Workshop, entry: Entry, state: Path) -> bool:
    """False where the process itself was asked to end; the job waits for the next one then."""
    last = 0.0

    def report(what: str, done: int, total: int, values: Mapping[str, float]) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_EVERY or done == total:
            last = time.monotonic()
            if store.report(entry.id, what, done, total, values):
                signal.raise_signal(signal.SIGINT)

    try:
        job = entry.job
        preview = preview_of(state, entry.id) if isinstance(job, LearnJob) else None
        if preview:
            preview.parent.mkdir(parents=True, exist_ok=True)
        store.finish(entry.id, DONE, workshop.do(job, report, preview))
    except KeyboardInterrupt:
        stopped = store.asked_to_stop(entry.id)
        if stopped:
            store.finish(entry.id, CANCELLED)
        else:
            store.put_back(entry.id)
        return stopped
    except (InputError, NotFinite) as error:
        store.finish(entry.id, FAILED, error=str(error))
    except Exception as error:
        traceback.print_exc()
        full = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
        told = "out of memory; ask for smaller or fewer pictures, or a smaller memory budget" if full else (
            f"mifo failed ({type(error).__name__}); the log of the worker has the details")  # fmt: skip
        store.finish(entry.id, FAILED, error=told)
    return True


def main() -> None:
    choose_waiting()
    quiet_libraries()
    guard_streams()
    signal.signal(signal.SIGINT, interrupt)  # by which a job is stopped, also where a shell's `&` had it ignored
    listen()
    state, bundles, output = map(Path, sys.argv[1:4])
    try:
        work(state, bundles, output)
    except KeyboardInterrupt:
        pass
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
