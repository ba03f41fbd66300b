"""Ctrl-C and SIGTERM, put off until a step is whole, so that what is saved then is the state between two steps.

Knows signals. Knows nothing of what is interrupted.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

    def _take(self) -> None:
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            heard = [s for s in SIGNALS if signal.getsignal(s) not in (signal.SIG_IGN, None)]  # nohup's ignored ones stay so
            self._previous = {s: signal.signal(s, self._note) for s in heard}

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
