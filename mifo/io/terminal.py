"""The process's two streams: no control character reaches a terminal raw, a reader that has gone stops the job as SIGTERM
does, and libraries' own notices stay away.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shlex
import subprocess
import sys
import warnings
from typing import TextIO

from .interrupts import reader_has_gone

MAX_MESSAGE = 1000
GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ENOTCONN)  # a pipe's reader, or a terminal that was closed
CURSOR_UP = re.compile("(\x1b\\[A)+")  # what tqdm writes between several bars, by itself
DEBUG = "MIFO_DEBUG"  # set: libraries say all that they have to say


#: The folders of an absolute path, POSIX or Windows; no address of the web.
FOLDERS = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?[\\/](?:[^\\/\s'\"]+[\\/])+")


def without_folders(message: str) -> str:
    """For what is passed on, or shown to somebody else: of absolute paths the last part alone."""
    return FOLDERS.sub("", message)


def command_line(*words: str) -> str:
    """What a person can give to the system's shell: no file's name in it ends a word or runs anything."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def shown(message: str, limit: int | None = MAX_MESSAGE) -> str:
    """One printable line of at most `limit` characters: names from files may hold escapes for terminals, or be huge."""
    if limit is not None and len(message) > limit:
        message = f"{message[: limit * 2 // 3]} ... {message[-limit // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in message)


class Guarded(io.TextIOWrapper):
    """A text stream over the buffer of another. Line breaks, returns and tabs pass; other control characters are shown.

    Once its reader has gone it swallows what is written: whoever writes next must not fail over that.
    """

    gone = False

    def write(self, text: str) -> int:
        if not CURSOR_UP.fullmatch(text):
            text = "".join(c if c.isprintable() or c in "\n\r\t" else shown(c) for c in text)
        if not self.gone:
            try:
                super().write(text)
            except OSError as error:
                self._close_quietly(error)
        return len(text)

    def flush(self) -> None:
        if not self.gone:
            try:
                super().flush()
            except OSError as error:
                self._close_quietly(error)

    def _close_quietly(self, error: OSError) -> None:
        if error.errno not in GONE:
            raise error
        self.gone = True
        nothing = os.open(os.devnull, os.O_WRONLY)  # takes what is still in the buffer
        os.dup2(nothing, self.fileno())
        os.close(nothing)
        reader_has_gone()


def guard_streams() -> None:
    """Puts `sys.stdout` and `sys.stderr` behind `Guarded`; a stream that is closed or no file stays as it is."""
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, Guarded):
            # a file's name may hold bytes that are no text: those are shown too
            guarded = Guarded(stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
                              write_through=name == "stderr")  # fmt: skip
            setattr(sys, name, guarded)


def has_gone() -> bool:
    """Whether the reader of a guarded stream has gone."""
    return any(getattr(stream, "gone", False) for stream in (sys.stdout, sys.stderr))


def quiet_libraries() -> None:
    """Before any library is imported: their warnings, logs and prints are advice to programmers about calls that are not the
    user's. What goes wrong reaches the user as an exception. MIFO_DEBUG=1 lets them through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if speaks_freely():
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # C++ writes to the descriptor itself
    logging.disable(logging.CRITICAL)
    warnings.showwarning = _say_nothing  # holds whatever filters a library sets


def speaks_freely() -> bool:
    """Whether the libraries' own messages were asked for."""
    return bool(os.environ.get(DEBUG))


def _say_nothing(*_: object, **__: object) -> None:
    """In place of `warnings.showwarning`."""
