"""The list of what we wrote into a folder, kept inside it, so that what somebody else put there is told apart.

    <folder>/manifest.json  {"written_by": "mifo", "kind": "bundle", "files": {"bundle.json": {"size": 812, "sha256": "..."}}}

A file counts as ours while its size and digest are the listed ones; a link, a device, an empty folder or any other never does.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .json_text import json_text

MANIFEST = "manifest.json"
MAX_BYTES = 1 << 24


@dataclass(frozen=True)
class Manifest:
    """What one command wrote."""

    kind: str
    """Such as "bundle" or "synthesis"."""
    files: dict[str, tuple[int, str]]
    """Path inside the folder, with '/' -> (bytes, SHA-256). The manifest itself is not listed."""

    def to_bytes(self) -> bytes:
        files = {name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(self.files.items())}
        return (json_text({"written_by": "mifo", "kind": self.kind, "files": files}, indent=1) + "\n").encode()


def write_manifest(folder: Path, kind: str, without: str = "") -> None:
    """Lists all files below `folder`, but for the one named `without`. Raises OSError when it cannot be written."""
    names = [name for name in _entries(folder) if name not in (MANIFEST, without)]
    found = {name: (_size(folder / name), file_digest(folder / name)) for name in names}
    files = {name: (size, digest) for name, (size, digest) in found.items() if size >= 0 and digest}
    (folder / MANIFEST).write_bytes(Manifest(kind, files).to_bytes())


def read_manifest(folder: Path) -> Manifest | None:
    """None when there is none, or it is not just as we write it: then nobody can tell what is ours."""
    path = folder / MANIFEST
    try:
        if not 0 <= _size(path) <= MAX_BYTES:
            return None
        content = _read(path)
        record: dict[str, Any] = json.loads(content)
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in record["files"].items()}
        if not all(map(is_inside, files)):  # a stranger's list, which would lead our own removing out of the folder
            return None
        manifest = Manifest(str(record["kind"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if manifest.to_bytes() == content else None


def is_inside(name: str) -> bool:
    """True for a plain path below the folder."""
    parts = name.split("/")
    return os.path.normpath(name) == name and not os.path.isabs(name) and not {"", ".", ".."} & set(parts) and "\0" not in name


def foreign_entries(folder: Path, limit: int = 6) -> list[str]:
    """What stands in `folder` and is not as we wrote it: paths inside it, changed files marked so; at most `limit` of them.

    Raises OSError when the folder cannot be read.
    """
    manifest = read_manifest(folder)
    found: list[str] = []
    for name in _entries(folder):
        if len(found) == limit:
            break
        if manifest is None or (name != MANIFEST and name not in manifest.files):
            found.append(name)
        elif name != MANIFEST and (_size(folder / name), file_digest(folder / name)) != manifest.files[name]:
            found.append(f"{name} (changed)")
    return found


def is_ours(folder: Path) -> bool:
    """True when all that stands in `folder`, a real one and no link, is as we wrote it."""
    try:
        return stat.S_ISDIR(os.lstat(folder).st_mode) and read_manifest(folder) is not None and not foreign_entries(folder)
    except OSError:
        return False


def remove_ours(folder: Path) -> None:
    """Removes the files that the manifest lists and that are as listed, and the folders that this leaves empty; all else stays.

    The manifest goes last, so that what a kill leaves of the folder is still known as ours.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    for name, listed in manifest.files.items():
        with suppress(OSError):
            if (_size(folder / name), file_digest(folder / name)) == listed:
                (folder / name).unlink()
    inside = {parent for name in manifest.files for parent in Path(name).parents} - {Path(".")}
    with suppress(OSError):
        for parent in sorted(inside, key=lambda p: -len(p.parts)):
            (folder / parent).rmdir()
    with suppress(OSError):
        if os.listdir(folder) == [MANIFEST]:
            (folder / MANIFEST).unlink()
            folder.rmdir()


def _entries(folder: Path, inside: str = "") -> Iterator[str]:
    """Paths of all that is no folder, and of empty folders; links are not followed."""
    with os.scandir(folder / inside if inside else folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(folder, f"{inside}{entry.name}/")
        else:
            yield inside + entry.name
    if inside and not entries:
        yield inside


def _size(path: Path) -> int:
    """-1 for what is no regular file."""
    with suppress(OSError):
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode):
            return found.st_size
    return -1


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file; empty for anything else."""
    if _size(path) < 0:
        return ""
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES)
