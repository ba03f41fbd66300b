"""Folders on any file system that fsspec knows (this machine's, s3://, gs://), whole or not at all.

An object store renames nothing at once, so a folder counts as there when its manifest is, which is written last and lists what
belongs to it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.files import check_free
from ..io.manifest import MANIFEST, foreign_entries, is_inside, read_manifest


def is_remote(place: str) -> bool:
    """True for an address such as s3://bucket/folder."""
    return "://" in place


def file_system(place: str) -> tuple[Any, str]:
    """(fsspec's file system, path on it). Raises InputError for an address that nothing here can read."""
    import fsspec

    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise InputError(f"{place[:200]} cannot be opened: {error}; install what fsspec needs for it, or give another place") \
            from None
    return found


def is_whole(place: str) -> bool:
    """Whether a folder that `put` wrote stands there."""
    system, path = file_system(place)
    return bool(system.exists(f"{path}/{MANIFEST}"))


def put(folder: Path, place: str) -> None:
    """Copies a folder that mifo wrote to a place where none is yet; its manifest goes last. Raises InputError."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} has no manifest, so nobody can say when a copy of it is whole")
    system, path = file_system(place)
    if system.exists(f"{path}/{MANIFEST}"):
        raise InputError(f"{place} is there already; choose another place, or move it away")
    for name in manifest.files:
        target = f"{path}/{name}"
        system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        system.put_file(str(folder / name), target)
    system.put_file(str(folder / MANIFEST), f"{path}/{MANIFEST}")


def fetch(place: str, folder: Path) -> None:
    """Copies what `put` wrote, or any bundle, to `folder`, whole or not at all. Raises InputError."""
    check_free(folder, overwrite=False)
    system, path = file_system(place)
    if not system.exists(f"{path}/{MANIFEST}"):
        raise InputError(f"{place} is no folder that mifo wrote, or is still being written: it has no {MANIFEST}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".mifo-fetch-", dir=folder.parent))
    try:
        for name in system.find(path):
            inside = name[len(path.rstrip("/")) + 1 :]
            if not is_inside(inside):  # an object store has no folders, and takes `..` for a name like any other
                raise InputError(f"{place} has an object {inside[:100]!r}, which would lie outside of its folder; remove "
                                 "it there")  # fmt: skip
            target = temporary / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(name, str(target))
        if foreign := foreign_entries(temporary):
            raise InputError(f"{place} is not as it was written: {', '.join(foreign)}")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
