"""One run at a time: a lock on a folder, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ..errors import InputError
from .files import check_writable, unwritable
from .temporary import remove_abandoned

TRIES = 200
PROCESS = re.compile(r"\s*[0-9]{0,12}\s*")


def checkpoint_folder(target: Path) -> Path:
    """Where the checkpoints of the run that writes `target` are kept."""
    return target.parent / ".checkpoints" / target.name


@contextmanager
def open_folder(folder: Path, what: str, instead: str) -> Iterator[None]:
    """`hold_lock`, without what a killed run left half-written in `folder`: the lock says that nobody writes it any more."""
    with hold_lock(folder, what, instead):
        remove_abandoned(folder, after=0)
        yield


@contextmanager
def hold_lock(folder: Path, what: str, instead: str) -> Iterator[None]:
    """`folder/lock` with this process's number, and the system's own lock on it, which ends with the process however it ends:
    a file that a killed run left is simply taken over. The folder is made, and removed again if nothing else is in it.

    Raises InputError when another run has it, saying `what` that one is doing and what to do `instead`, when the folder cannot be
    made, and when something else than such a file has the lock's name: that is neither followed nor changed.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _acquire(folder, what, instead)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is_still(folder / "lock", file):
                os.unlink(folder / "lock")
        file.close()
        for empty in dict.fromkeys((folder, folder.parent, *made)):
            with suppress(OSError):
                empty.rmdir()


def _acquire(folder: Path, what: str, instead: str) -> IO[str]:
    check_writable(folder)
    path = folder / "lock"
    for attempt in range(TRIES):
        file = _open(path, folder)
        if file is not None:
            if not _lock(file):
                owner = _content(file).strip() or "unknown"
                file.close()
                raise InputError(f"process {owner[:20]} is {what} right now; wait for it, stop it, or {instead}")
            if _is_still(path, file):
                return _sign(file, path, folder)
            file.close()  # the run before us ended and removed this very file: the next one is another
        time.sleep(0.001 * min(attempt, 20))
    raise InputError(f"{path} could not be locked in {TRIES} tries: other runs make and remove it all the time; {instead}")


def _open(path: Path, folder: Path) -> IO[str] | None:
    """None when the run before us has just removed the folder. Follows no link, waits for no pipe."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.islink(path):
            raise _not_a_lock(path, "is a link")
        number = os.open(path, flags, 0o666)
    except FileNotFoundError:
        return None
    except OSError as error:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise _not_a_lock(path, "is no regular file") from None
        raise unwritable(folder, error) from None
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(number)
        raise _not_a_lock(path, "is no regular file" if not stat.S_ISREG(found.st_mode) else "has a second name elsewhere")
    return open(number, "r+", encoding="utf-8", errors="replace")


def _sign(file: IO[str], path: Path, folder: Path) -> IO[str]:
    """Writes this process's number into a locked file: one that is empty, or has the number of a process that was killed."""
    if not PROCESS.fullmatch(_content(file)):
        file.close()
        raise _not_a_lock(path, "holds something else than a process's number")
    try:
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
    except OSError as error:
        os.unlink(path)
        raise unwritable(folder, error) from None
    return file


def _not_a_lock(path: Path, what: str) -> InputError:
    return InputError(f"{path} {what}, so it is not the lock that mifo would make there, and is left alone; move it away")


def _content(file: IO[str]) -> str:
    file.seek(0)
    return file.read(100)


def _is_still(path: Path, file: IO[str]) -> bool:
    """Whether `path` is the file that is open, and not a later one of the same name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool:
    """False when another process has it. Where the file system knows no locks, everybody has it."""
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(1 << 20)  # beyond what is written, so that others can read it
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
