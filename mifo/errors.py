"""The exceptions that end a command with a message instead of a traceback. Knows nothing else of the package."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """The input is wrong, not the program: the message says what was given, what was expected and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


class NotFinite(Exception):
    """A job's result is not finite, and nothing that the user gave is known to be wrong: exit status 1. The message says what
    helps."""


class OtherProcessEnded(Exception):
    """Of the processes that share a job, another has ended, and this one cannot go on without it: exit status 1."""


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """"; did you mean 'toy_car'?" where one of `known` is close to what was given, else nothing."""
    close = get_close_matches(given, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""
