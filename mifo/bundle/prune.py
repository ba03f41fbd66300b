"""What can be thrown away: the state of runs that were never taken up again, class priors, and the trash."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..io.lock import hold_lock
from ..io.manifest import is_ours, remove_ours
from ..io.tensor_file import remove_state
from .catalogue import bytes_in
from .shelf import TRASH

CHECKPOINTS, PRIORS = ".checkpoints", ".prior"
OURS = re.compile(r"([0-9]{8}|item-[0-9a-f]{32})\.safetensors")
PRIOR = re.compile(r"[0-9a-f]{20}\.safetensors")
DAY = 86400.0


@dataclass(frozen=True)
class Leftover:
    """One thing that nobody needs any more: a file, a run's folder of states, or a bundle in the trash."""

    kind: str
    """'checkpoints', 'prior' or 'trash'"""
    path: Path
    mib: float
    days: float
    """Since it was last written."""


def leftovers(bundles: Path, output: Path, older_than_days: float = 30.0, larger_than_mib: float = 0.0) -> list[Leftover]:
    """The largest first. Only what mifo itself writes, by its name and its manifest, is listed."""
    found = [*_states(bundles / CHECKPOINTS), *_priors(bundles / PRIORS), *_trash(bundles / TRASH)]
    with suppress(OSError):
        for folder in output.iterdir():
            found += _states(folder / CHECKPOINTS)
    old = [each for each in found if each.days >= older_than_days and each.mib >= larger_than_mib]
    return sorted(old, key=lambda each: -each.mib)


def remove(leftover: Leftover) -> bool:
    """False where it stays: a run works on it, or somebody has put something into it."""
    if leftover.kind == "trash":
        remove_ours(leftover.path)
    elif leftover.kind == "prior":
        with suppress(OSError):
            leftover.path.unlink()
    else:
        try:
            with hold_lock(leftover.path, "pruning", "try again"):
                for path in _files(leftover.path, OURS):
                    remove_state(path)
        except (OSError, ValueError):  # InputError too: another run has the lock
            return False
    return not os.path.lexists(leftover.path)


def _states(place: Path) -> Iterator[Leftover]:
    """Folders of runs below `place`."""
    for folder in _folders(place):
        files = list(_files(folder, OURS))
        if files:
            yield _leftover("checkpoints", folder, files)


def _priors(place: Path) -> Iterator[Leftover]:
    for path in _files(place, PRIOR):
        yield _leftover("prior", path, [path])


def _trash(place: Path) -> Iterator[Leftover]:
    for folder in _folders(place):
        if is_ours(folder):
            newest = os.lstat(folder).st_ctime  # a rename, by which it came here, leaves all other times as they were
            yield Leftover("trash", folder, bytes_in(folder) / 2**20, (time.time() - newest) / DAY)


def _leftover(kind: str, path: Path, files: list[Path]) -> Leftover:
    found = [os.lstat(file) for file in files]
    newest = max(each.st_mtime for each in found)
    return Leftover(kind, path, sum(each.st_size for each in found) / 2**20, (time.time() - newest) / DAY)


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _files(place: Path, name: re.Pattern[str]) -> list[Path]:
    try:
        entries = [entry for entry in os.scandir(place) if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(Path(entry.path) for entry in entries if name.fullmatch(entry.name))
