"""What stops a job from outside: Ctrl-C, SIGTERM, a closed terminal (SIGHUP), a reader of the output that has gone. All are put
off until a step is whole, so that what is saved then is the state between two steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
BROKEN_PIPE = 13  # SIGPIPE's number, by which a shell knows a process whose reader has gone


class Terminated(KeyboardInterrupt):
    """Ends the job as Ctrl-C does; `number` is the signal's."""

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__()
        self.number = int(number)


@dataclass
class Heard:
    """What the process was asked first. A reader that has gone asks only while a job runs, and only if nobody did before: when
    Ctrl-C or a closed terminal ends a whole pipeline, `tee` goes too, and is no second wish."""

    first: int | None = None
    job_runs: bool = False

    def note(self, number: int) -> int:
        self.first = number if self.first is None else self.first
        return self.first


heard = Heard()


def terminate(number: int = signal.SIGTERM, _: object = None) -> None:
    """The handler of SIGTERM and SIGHUP."""
    raise Terminated(heard.note(number))


def interrupt(number: int, _: object) -> None:
    """The handler of SIGINT."""
    heard.note(number)
    raise KeyboardInterrupt


def listen() -> None:
    """Sets the handlers, but for signals that whoever started the process had it ignore, such as nohup's SIGHUP."""
    for number in SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, interrupt if number == signal.SIGINT else terminate)


def reader_has_gone() -> None:
    """As SIGTERM: after the step that runs, its state is kept."""
    if heard.job_runs and heard.first is None:
        heard.note(BROKEN_PIPE)
        signal.raise_signal(signal.SIGTERM)


@dataclass
class Stop:
    """Whether someone asked to stop since the block began."""

    asked: signal.Signals | None = None
    _previous: dict[signal.Signals, Any] = field(default_factory=dict)

    def _note(self, number: int, _: object) -> None:
        if self.asked is not None:  # asked twice: at once, whatever is in the middle of something
            self._give_back()
            signal.raise_signal(number)
        self.asked = signal.Signals(number)
        heard.note(number)

    def _take(self) -> None:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            listened = [s for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]  # nohup's ignored ones stay so
            self._previous = {s: signal.signal(s, self._note) for s in listened}

    def take_effect(self) -> None:
        """What the signal would have done at once; returns only if its handler does, and then goes on listening."""
        number, self.asked = self.asked, None
        self._give_back()
        if number is not None:
            signal.raise_signal(number)
        self._take()

    def _give_back(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)


@contextmanager
def stop_between_steps() -> Iterator[Stop]:
    """Within the block a signal only sets `asked`, until `take_effect()` or the block's end; a second one acts at once."""
    stop = Stop()
    stop._take()
    try:
        yield stop
    finally:
        stop._give_back()
        if stop.asked is not None:
            signal.raise_signal(stop.asked)
