"""What people and programs see of a command: its result, its progress, and one message when it fails."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from ..errors import InputError, NotFinite, OtherProcessEnded
from .files import is_full, unwritable
from .interrupts import BROKEN_PIPE, Terminated, heard
from .json_text import record_text
from .processes import is_main_process, process_index
from .terminal import has_gone, shown, speaks_freely

#: How torch, CUDA and C++ say it when they don't raise MemoryError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")
SHOW_AFTER = 1.0  # seconds of waiting


@dataclass
class Job:
    """Where a command's results go, and what an interrupted one leaves whole."""

    as_json: bool
    out: TextIO
    kept: list[Path] = field(default_factory=list)
    hint: Callable[[], str] = lambda: ""
    """What an interrupted command says at the end: how to go on."""

    def text(self, *lines: str) -> None:
        """For people, one printable line each; silent with --json."""
        if not self.as_json:
            print(*(shown(line, None) for line in lines), sep="\n", file=self.out, flush=True)

    def json(self, facts: dict[str, Any]) -> None:
        """For programs; silent without --json."""
        if self.as_json:
            print(record_text(facts), file=self.out, flush=True)

    @contextmanager
    def keeping(self, earlier: Path | None) -> Iterator[None]:
        """Within the block, an interruption leaves `earlier` as it was."""
        before = list(self.kept)
        self.kept += [earlier] if earlier else []
        yield
        self.kept = before

    def interrupted(self, verb: str) -> str:
        whole = f"kept: {', '.join(map(str, self.kept))}" if self.kept else "files from before are as they were"
        return f"{verb}: nothing half-written is left; {whole}{self.hint()}"


@dataclass
class Display:
    """What this process shows beside results and messages."""

    progress: bool = True
    notes: bool = True
    """False in all but the main one of several processes."""


display = Display()


@contextmanager
def running(as_json: bool, quiet: bool = False) -> Iterator[Job]:
    """Keeps standard output for the job's results, and turns what goes wrong into one message and an exit status."""
    main = is_main_process()
    out: Any = sys.stdout if main else _Nowhere()
    job = Job(as_json, out)
    display.progress, display.notes = main and not quiet, main
    try:
        with _listening(), redirect_stdout(sys.stderr if speaks_freely() else _Nowhere()):
            yield job
    except InputError as error:
        say(f"error: {error}")
        raise typer.Exit(2) from None
    except (NotFinite, OtherProcessEnded) as error:
        say(f"error: {error}")
        raise typer.Exit(1) from None
    except Terminated as end:
        say(job.interrupted("terminated"))
        raise typer.Exit(128 + end.number) from None
    except KeyboardInterrupt:
        say(job.interrupted("interrupted"))
        raise typer.Exit(130) from None
    except OSError as error:
        if not (is_full(error) or isinstance(error, PermissionError)):
            raise
        say(f"error: {unwritable(Path(error.filename or 'a temporary file'), error)}")
        raise typer.Exit(2) from None
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            say("error: out of memory; use a smaller --resolution, --width, --height or --batch-size")
            raise typer.Exit(1) from None
        raise


class _Nowhere(io.TextIOBase):
    """Where libraries print to: a command's own results and messages go elsewhere."""

    def write(self, text: str) -> int:
        return len(text)


@contextmanager
def _listening() -> Iterator[None]:
    """While the job runs, a reader of its output that goes away ends it."""
    heard.first, heard.job_runs = None, True
    try:
        yield
    finally:
        heard.job_runs = False


def leave(status: int) -> NoReturn:
    """Ends the process with `status` and no more ado: Python would free PyTorch's objects one by one, for more than a second."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # a shell's `>&-`
                stream.flush()
        except (OSError, ValueError):  # a full disk, a reader that has gone, a stream that was closed
            status = status or 1
    os._exit(128 + BROKEN_PIPE if status == 0 and has_gone() else status)


class Bar:
    """Progress on standard error, with the loss's parts and the time left; between what can be counted, the seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._label = ""
        self._uncounted = ExitStack()

    def __enter__(self) -> Bar:
        self._uncounted.enter_context(waiting("getting ready"))
        return self

    def __exit__(self, *_: object) -> None:
        self._uncounted.close()
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, label: str, done: int, total: int, losses: dict[str, float]) -> None:
        if not display.progress:
            return
        from tqdm import tqdm

        if self._bar is None or label != self._label or done <= self._bar.n:
            self._uncounted.close()
            self._close()
            seconds = 0.5 if sys.stderr.isatty() else 5.0  # a log file needs few lines
            self._bar, self._label = tqdm(total=total, desc=label, file=sys.stderr, mininterval=seconds), label
        if losses:
            self._bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items()}, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close()  # what follows is not the last step's time
            self._uncounted.enter_context(waiting("working"))

    def learning(self, progress: Any) -> None:
        label = {"prior": "drawing the prior", "embedding": "phase 1, tokens", "lora": "phase 2, LoRA", "previews": "previews"}
        self._show(label[progress.phase], progress.step, progress.total, progress.losses)

    def denoising(self, done: int, total: int) -> None:
        self._show("denoising", done, total, {})

    def drawing(self, done: int, total: int) -> None:
        self._show("pictures", done, total, {})

    def part(self, label: str, done: int, total: int) -> None:
        """Of one job among several."""
        self._show(label, done, total, {})


def say(*lines: str) -> None:
    """To standard error, beside progress: one printable line each. Of several processes the main one says it, and each its own
    errors."""
    if not display.notes:
        lines = tuple(f"process {process_index()}: {line}" for line in lines if line.startswith("error"))
    if not lines:
        return
    with _beside_bars():
        print(*map(shown, lines), sep="\n", file=sys.stderr)


@contextmanager
def _beside_bars() -> Iterator[None]:
    """Bars that are shown make room for a line, where there are any."""
    if "tqdm" not in sys.modules:
        yield
        return
    from tqdm import tqdm

    with tqdm.external_write_mode(file=sys.stderr):
        yield


@contextmanager
def waiting(label: str) -> Iterator[None]:
    """Shows the seconds that pass within the block, where they cannot be counted in steps; nothing if it ends at once."""
    done = threading.Event()
    if not display.progress:
        yield
        return

    def show() -> None:
        if done.wait(SHOW_AFTER):
            return
        from tqdm import tqdm

        with tqdm(desc=label, file=sys.stderr, bar_format="{desc}: {elapsed}", leave=False) as bar:
            while not done.wait(1.0 if sys.stderr.isatty() else 10.0):
                bar.refresh()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
