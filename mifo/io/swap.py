"""One folder in the place of another: at every moment, and after a kill at any moment, the old one or the new one is there.

Linux exchanges two names in one step. Elsewhere it takes two, and a journal beside them says what they were:

    .mifo-<token>.swap  {"folder": "desk", "new": ".mifo-....partial", "old": ".mifo-....old", "pid": ..., ...}

Whoever reads or writes there next finishes what a kill cut in two.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .json_text import json_text
from .manifest import is_ours, remove_ours
from .temporary import NAME, is_running, owner, read_owner

JOURNAL = re.compile(r"\.mifo-[0-9a-f]{16}\.swap")
#: Seconds that two renames never take.
SWAP_SECONDS = 10


def replace_by(temporary: Path, folder: Path, check: Callable[[Path], None]) -> None:
    """`temporary` becomes `folder`; the old one, which `check` must accept where it then stands, is removed.

    Raises what `check` raises, and OSError; `folder` is then as it was.
    """
    if not exchange(temporary, folder):
        _in_two_steps(temporary, folder, check)
        return
    try:
        check(temporary)  # the old one: somebody may have put a file into it since it was looked at
    except BaseException:
        exchange(temporary, folder)
        raise
    flush_names(folder.parent)
    remove_ours(temporary)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one atomic step. False where the platform or the file system cannot."""
    if sys.platform != "linux":
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def _in_two_steps(temporary: Path, folder: Path, check: Callable[[Path], None]) -> None:
    token = secrets.token_hex(8)
    old, journal = (folder.parent / f".mifo-{token}.{end}" for end in ("old", "swap"))
    record = {**owner(token), "folder": folder.name, "new": temporary.name, "old": old.name}
    try:
        _write_flushed(journal, json_text(record))
        flush_names(folder.parent)
        os.rename(folder, old)
        check(old)
        os.rename(temporary, folder)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(folder):
            os.rename(old, folder)
        with suppress(OSError):
            journal.unlink()
        raise
    flush_names(folder.parent)
    remove_ours(old)
    journal.unlink()


def finish_swaps(parent: Path) -> None:
    """Ends what a kill between two renames in `parent` left: the new folder gets its name, or the old one has it again.

    To be called before anything there is read or written. Waits for a process that is in the middle of it.
    """
    with suppress(OSError):
        for journal in (parent / name for name in os.listdir(parent) if JOURNAL.fullmatch(name)):
            _finish(journal)


def _finish(journal: Path) -> None:
    record = read_owner(journal)
    while record is not None and is_running(record) and time.time() - os.lstat(journal).st_mtime < SWAP_SECONDS:
        time.sleep(0.02)
        record = read_owner(journal)
    if record is None or not _is_sound(record):
        return
    folder, new, old = (journal.parent / record[key] for key in ("folder", "new", "old"))
    if not os.path.lexists(folder):
        if is_ours(new):
            os.rename(new, folder)
        elif os.path.lexists(old):
            os.rename(old, folder)
    flush_names(journal.parent)
    if is_ours(old):
        remove_ours(old)
    journal.unlink()


def _is_sound(record: dict[str, Any]) -> bool:
    """Names in this very folder, the hidden ones such as we make."""
    folder, hidden = record.get("folder"), [record.get("new"), record.get("old")]
    named = isinstance(folder, str) and folder not in ("", ".", "..") and os.path.basename(folder) == folder
    return named and all(isinstance(name, str) and NAME.fullmatch(name) for name in hidden)


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_names(folder: Path) -> None:
    """The folder's list of names onto the disk, where the system can: a rename that is not there yet can still be lost."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
