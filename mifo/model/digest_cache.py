"""Digests of large files, remembered between processes in the user's cache folder: hashing a Stable Diffusion takes seconds.

A file counts as the same while its number, size and times of change do; content that cannot be trusted is computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from ..io.json_text import json_text
from ..io.read_files import read_regular

LARGE = 1 << 28
"""Bytes in all from which files are worth remembering."""


def stamp(path: Path) -> tuple[int, ...]:
    """Changes whenever the file does."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/mifo/digests`, or where that stands by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mifo" / "digests"


def remembered(kind: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """The digest (64 hex digits) that `compute` gave for these files, or gives now. A cache that cannot be read or written is
    done without."""
    if sum(os.stat(path).st_size for path in files) < LARGE:
        return compute()
    state = json_text([kind, *(stamp(path) for path in files)])
    entry = None
    try:
        entry = cache_folder() / hashlib.sha256(state.encode()).hexdigest()
        if re.fullmatch("[0-9a-f]{64}", found := read_regular(entry, 64).decode("ascii", "replace")):
            return found
    except (OSError, RuntimeError):  # no entry, or no home
        pass
    digest = compute()
    if entry is not None:
        with contextlib.suppress(OSError):
            _write(entry, digest)
    return digest


def _write(entry: Path, digest: str) -> None:
    """Whole or absent."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = entry.with_name(f"{entry.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("x") as file:
            file.write(digest)
        os.replace(temporary, entry)
    finally:
        temporary.unlink(missing_ok=True)
