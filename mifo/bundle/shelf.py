"""Renaming a bundle and throwing it away: into a trash folder beside the others, from which it can be taken back."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..errors import InputError
from ..io.files import check_free, unwritable
from .catalogue import RECORD

TRASH = ".trash"
MAX_NAME_BYTES = 100


def check_name(name: str) -> str:
    """Raises InputError for what cannot name a bundle: no folder has such a name, or no prompt could say `<NAME.asset0>`."""
    wrong = any(c in "/\\<>" or not c.isprintable() for c in name) or name != name.strip()
    if not name or name.startswith(".") or wrong or len(name.encode()) > MAX_NAME_BYTES:
        raise InputError(f"{name[:100]!r} cannot name a bundle; give a --name of letters, digits, '-' and '_'")
    return name


def rename_bundle(folder: Path, name: str) -> Path:
    """Raises InputError where something has that name already."""
    _check_bundle(folder)
    target = folder.parent / check_name(name)
    if target != folder:
        _move(folder, target)
    return target


def throw_away(folder: Path) -> Path:
    """Moves the bundle into the trash; returns where it lies there."""
    _check_bundle(folder)
    trash = folder.parent / TRASH
    try:
        trash.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(trash, error) from None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        target = trash / (f"{folder.name}-{stamp}" + (f"-{number}" if number else ""))
        if not os.path.lexists(target):
            _move(folder, target)
            return target
    raise InputError(f"{trash} has too many folders of this name; empty it")


def _check_bundle(folder: Path) -> None:
    if os.path.islink(folder) or not os.path.lexists(folder / RECORD):
        raise InputError(f"{folder} is no bundle of this folder: it is a link, or has no {RECORD}")


def _move(folder: Path, target: Path) -> None:
    if os.path.lexists(target):
        check_free(target, overwrite=False)
    try:
        os.rename(folder, target)
    except OSError as error:
        raise unwritable(target, error) from None
