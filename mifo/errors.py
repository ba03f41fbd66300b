"""The exceptions that end a command with a message instead of a traceback. Knows nothing else of the package."""

from __future__ import annotations


class InputError(ValueError):
    """The input is wrong, not the program: the message says what was given, what was expected and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


class NotFinite(Exception):
    """A job's result is not finite, and nothing that the user gave is known to be wrong: exit status 1. The message says what
    helps."""
