"""What people and programs see of a command: its result, its progress, and one message when it fails.

Knows streams, signals and exit statuses. Knows nothing of the jobs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from .errors import InputError
from .files import is_full, unwritable

#: How torch, CUDA and C++ say it when they don't raise MemoryError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")
MAX_MESSAGE = 1000


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the job as Ctrl-C does."""


def terminate(*_: object) -> None:
    """A signal handler."""
    raise Terminated


@dataclass
class Job:
    """Where a command's results go, and what an interrupted one leaves whole."""

    as_json: bool
    out: TextIO
    kept: list[Path] = field(default_factory=list)
    hint: Callable[[], str] = lambda: ""
    """What an interrupted command says at the end: how to go on."""

    def text(self, lines: str) -> None:
        """For people; silent with --json."""
        if not self.as_json:
            print(lines, file=self.out, flush=True)

    def json(self, facts: dict[str, Any]) -> None:
        """For programs; silent without --json."""
        if self.as_json:
            print(json.dumps(facts), file=self.out)

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


@contextmanager
def running(as_json: bool) -> Iterator[Job]:
    """Keeps standard output for the job's results, and turns what goes wrong into one message and an exit status."""
    job = Job(as_json, sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield job
    except InputError as error:
        say(f"error: {shown(str(error))}")
        raise typer.Exit(2) from None
    except Terminated:
        say(job.interrupted("terminated"))
        raise typer.Exit(143) from None
    except KeyboardInterrupt:
        say(job.interrupted("interrupted"))
        raise typer.Exit(130) from None
    except OSError as error:
        if not (is_full(error) or isinstance(error, PermissionError)):
            raise
        say(f"error: {shown(str(unwritable(Path(error.filename or 'a temporary file'), error)))}")
        raise typer.Exit(2) from None
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            say("error: out of memory; use a smaller --resolution, --width, --height or --batch-size")
            raise typer.Exit(1) from None
        raise


def leave(status: int) -> NoReturn:
    """Ends the process with `status` and no more ado: Python would free PyTorch's objects one by one, for more than a second."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # a shell's `>&-`
                stream.flush()
        except (OSError, ValueError):  # a full disk, a reader that has gone, a stream that was closed
            status = status or 1
    os._exit(status)


class Bar:
    """Progress on standard error, with the loss's parts and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._label = ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, label: str, done: int, total: int, losses: dict[str, float]) -> None:
        from tqdm import tqdm

        if self._bar is None or label != self._label or done <= self._bar.n:
            self.__exit__()
            self._bar, self._label = tqdm(total=total, desc=label, file=sys.stderr, mininterval=0.5), label
        if losses:
            self._bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items()}, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.__exit__()  # what follows is not the last step's time

    def learning(self, progress: Any) -> None:
        label = {"prior": "drawing the prior", "embedding": "phase 1, tokens", "lora": "phase 2, LoRA"}[progress.phase]
        self._show(label, progress.step, progress.total, progress.losses)

    def denoising(self, done: int, total: int) -> None:
        self._show("denoising", done, total, {})

    def drawing(self, done: int, total: int) -> None:
        self._show("pictures", done, total, {})


def shown(message: str) -> str:
    """One printable line of at most MAX_MESSAGE characters: names from files may hold escapes for terminals, or be huge."""
    if len(message) > MAX_MESSAGE:
        message = f"{message[: MAX_MESSAGE * 2 // 3]} ... {message[-MAX_MESSAGE // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message)


def say(message: str) -> None:
    """To standard error, beside progress."""
    print(message, file=sys.stderr)
