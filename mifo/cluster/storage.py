"""Folders on any file system that fsspec knows (this machine's, s3://, gs://), whole or not at all.

An object store renames nothing at once, so a folder counts as there when its manifest is, which is written last and lists what
belongs to it. A marker, which is written first and lists the same, tells what a copy that was broken off has left from what is
somebody else's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.files import check_free
from ..io.json_text import json_text
from ..io.manifest import MANIFEST, foreign_entries, is_inside, read_manifest
from ..io.temporary import MARKER


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


def check_place(place: str) -> None:
    """Raises InputError unless nothing is there, or what a `put` that was broken off has left."""
    _check_place(place, None)


def _check_place(place: str, wanted: Collection[str] | None) -> None:
    """`wanted`: the files that are to be written; what else a `put` left there is then in the way as well."""
    system, path = file_system(place)
    if system.exists(f"{path}/{MANIFEST}"):
        raise InputError(f"{place} is there already; choose another place, or move it away")
    begun = _begun(system, path)
    ours = begun if wanted is None else begun.intersection(wanted)
    foreign = [name for name in _names(system, path) if name != MARKER and name not in ours]
    if foreign:
        raise InputError(f"{place} has other things in it ({', '.join(foreign[:6])[:200]}); choose another place, or move them "
                         "away")  # fmt: skip


def put(folder: Path, place: str) -> None:
    """Copies a folder that mifo wrote to a place where none is yet; its manifest goes last. Raises InputError."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise InputError(f"{folder} has no manifest, so nobody can say when a copy of it is whole")
    _check_place(place, manifest.files)
    system, path = file_system(place)
    system.makedirs(path, exist_ok=True)
    system.pipe_file(f"{path}/{MARKER}", json_text(sorted(manifest.files)).encode())
    for name in manifest.files:
        target = f"{path}/{name}"
        system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        system.put_file(str(folder / name), target)
    system.put_file(str(folder / MANIFEST), f"{path}/{MANIFEST}")
    system.rm_file(f"{path}/{MARKER}")


def _names(system: Any, path: str) -> list[str]:
    """Of all objects there, as they are called within it."""
    try:
        return [name[len(path.rstrip("/")) + 1 :] for name in system.find(path)]
    except FileNotFoundError:
        return []


def _begun(system: Any, path: str) -> set[str]:
    """What a `put` that was broken off may have written; nothing where none was begun."""
    try:
        names = json.loads(system.cat_file(f"{path}/{MARKER}"))
        return {str(name) for name in names} if isinstance(names, list) else set()
    except (FileNotFoundError, ValueError, RecursionError):
        return set()


def fetch(place: str, folder: Path) -> None:
    """Copies what `put` wrote, or any bundle, to `folder`, whole or not at all. Raises InputError."""
    check_free(folder, overwrite=False)
    system, path = file_system(place)
    if not system.exists(f"{path}/{MANIFEST}"):
        raise InputError(f"{place} is no folder that mifo wrote, or is still being written: it has no {MANIFEST}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".mifo-fetch-", dir=folder.parent))
    try:
        for inside in _names(system, path):
            if inside == MARKER:  # a copy ended between its last two steps
                continue
            if not is_inside(inside):  # an object store has no folders, and takes `..` for a name like any other
                raise InputError(f"{place} has an object {inside[:100]!r}, which would lie outside of its folder; remove "
                                 "it there")  # fmt: skip
            target = temporary / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(f"{path.rstrip('/')}/{inside}", str(target))
        if foreign := foreign_entries(temporary):
            raise InputError(f"{place} is not as it was written: {', '.join(foreign)}")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
