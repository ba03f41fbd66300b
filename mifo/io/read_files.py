"""Reading files that others may have made: regular ones only, and never more of them than is stated.

Opening a pipe waits for a writer, reading a device has no end, and a sparse file of 60 GB takes no room on the disk. So
everything that comes from a folder which somebody else may have filled is read through here.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

KINDS = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"), (stat.S_ISCHR, "device"),
         (stat.S_ISBLK, "device"))  # fmt: skip
#: Where the system has them: neither waits for a pipe's writer nor hands the file on to other programs.
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class UnusableFile(OSError):
    """There is something, but no file that can be read whole; `strerror` says why."""

    def __init__(self, path: Path, reason: str):
        super().__init__(errno.EINVAL, reason, str(path))


def check_regular(path: Path, most_bytes: int) -> None:
    """Raises UnusableFile unless `path` is a regular file, or a link to one, of at most `most_bytes`; OSError or ValueError where
    it cannot be looked at. For readers that open a path themselves; the others take `read_regular`."""
    _check(path, os.stat(path), most_bytes)


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The whole file. Raises as `check_regular` does; what is checked is what is open, and it is never read any further."""
    check_regular(path, most_bytes)  # opening a device may already do something
    with os.fdopen(os.open(path, FLAGS), "rb") as file:
        _check(path, os.fstat(file.fileno()), most_bytes)
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:  # it grew, or is one of those whose size the system gives as 0
        raise UnusableFile(path, f"it has more than the {_size(most_bytes)} that are read")
    return content


def _check(path: Path, found: os.stat_result, most_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in KINDS if is_kind(found.st_mode)), "special file")
        raise UnusableFile(path, f"it is no file, but a {kind}")
    if found.st_size > most_bytes:
        size, most = _size(found.st_size), _size(most_bytes)
        raise UnusableFile(path, f"it has {size if size != most else f'more than {size}'}, and at most {most} are read")


def _size(count: int) -> str:
    """ "3072 MiB" """
    if count >= 1 << 20:
        return f"{count >> 20} MiB"
    return f"{count >> 10} KiB" if count >= 1 << 10 else f"{count} bytes"


def leads_out(folder: Path, path: str | os.PathLike[str]) -> bool:
    """True for a link that leads out of `folder`: what is read there would be another file than the folder's own."""
    return os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
