"""The one exception that means "the user's input is wrong". Knows nothing else of the package."""

from __future__ import annotations


class InputError(ValueError):
    """The input is wrong, not the program: the message says what was given, what was expected and what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
