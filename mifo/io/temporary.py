"""Folders that are still being written: hidden beside where they will stand, known by a random name and a marker inside.

    .mifo-<token>.partial/  .mifo-writing {"token": ..., "pid": ..., "host": ...}, ...
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .json_text import json_text
from .manifest import MANIFEST, is_ours, remove_ours

MARKER = ".mifo-writing"
#: What is being written, and a folder that another has replaced and that is about to be removed.
NAME = re.compile(r"\.mifo-([0-9a-f]{16})\.(?:partial|old)")
#: Seconds after which such a folder, of a process that is no longer there, belongs to a run that was killed.
ABANDONED_AFTER = 3600


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent` for as long as the block lasts; what was renamed until then stays. Raises OSError."""
    token = secrets.token_hex(8)
    path = parent / f".mifo-{token}.partial"
    path.mkdir(mode=0o700)
    made = os.lstat(path)
    try:
        (path / MARKER).write_text(json_text(owner(token)))
        yield path
    finally:
        with suppress(OSError):
            if os.path.samestat(os.lstat(path), made):  # another folder may have this name by now: the one that was replaced
                _remove(path)


def remove_abandoned(folder: Path, after: float = ABANDONED_AFTER) -> None:
    """Removes what killed runs left half-written in `folder`: by its name, its marker or its manifest, and its process's end.

    One that is empty needs no marker: a run can be killed before it has written that, or when it has removed it.
    """
    for path in folder.iterdir():
        named = NAME.fullmatch(path.name)
        with suppress(OSError):
            found = os.lstat(path)
            if not named or not stat.S_ISDIR(found.st_mode) or time.time() - found.st_mtime < after:
                continue
            there = read_owner(path / MARKER)
            if there is not None and there["token"] == named[1] and not is_running(there):
                _remove(path)
            elif is_ours(path):
                remove_ours(path)
            else:
                if os.listdir(path) == [MARKER] and os.lstat(path / MARKER).st_size == 0:  # killed before it was written
                    (path / MARKER).unlink()
                path.rmdir()  # fails where anything is in it


def _remove(folder: Path) -> None:
    """Removes it as far as that goes, and last what it is known by: a kill in between leaves what can be found again."""
    known_by = (MANIFEST, MARKER)
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name not in known_by:
            with suppress(OSError):
                os.unlink(entry.path)
    if set(os.listdir(folder)).difference(known_by):  # something cannot be removed now: a later run will find it by these
        return
    for name in known_by:
        with suppress(FileNotFoundError):
            os.unlink(folder / name)
    folder.rmdir()


def owner(token: str) -> dict[str, Any]:
    """Who writes: this process, on this machine."""
    return {"token": token, "pid": os.getpid(), "host": platform.node()}


def read_owner(path: Path) -> dict[str, Any] | None:
    """What `owner` gave, with whatever was added to it; None for any other file."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode) or os.lstat(path).st_size > 4096:
            return None
        record = json.loads(path.read_bytes())
        return record if isinstance(record["token"], str) and isinstance(record["pid"], int) and record["host"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_running(who: dict[str, Any]) -> bool:
    """Whether the process is there still. One of another machine, or on Windows, cannot be asked: its folder's age decides."""
    if who["host"] != platform.node() or os.name == "nt" or not 0 < who["pid"] < 1 << 31:
        return False
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
