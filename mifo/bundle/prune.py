"""What can be thrown away: the state of runs that were never taken up again, class priors, and the trash."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
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
    """'checkpoints', 'prior', 'trash' or 'upload'"""
    path: Path
    mib: float
    days: float
    """Since it was last written."""
    files: tuple[Path, ...] = ()
    """What of it was found: of a prior or an upload, all that goes."""


def leftovers(bundles: Path, output: Path, older_than_days: float = 30.0, larger_than_mib: float = 0.0,
              more: Iterable[Leftover] = ()) -> list[Leftover]:  # fmt: skip
    """The largest first. Only what mifo itself writes, by its name and its manifest, is listed. `more`: found elsewhere."""
    found = [*more, *_states(bundles / CHECKPOINTS), *_priors(bundles / PRIORS), *_trash(bundles / TRASH)]
    with suppress(OSError):
        for folder in output.iterdir():
            found += _states(folder / CHECKPOINTS)
    old = [each for each in found if each.days >= older_than_days and each.mib >= larger_than_mib]
    return sorted(old, key=lambda each: -each.mib)


def remove(leftover: Leftover) -> bool:
    """False where it stays: a run works on it, or somebody has put something into it."""
    if leftover.kind == "trash":
        remove_ours(leftover.path)
    elif leftover.kind in ("prior", "upload"):
        with suppress(OSError):
            for path in leftover.files:
                path.unlink()
            if leftover.path not in leftover.files:
                leftover.path.rmdir()  # stays where somebody has put something into it
    else:
        try:
            with hold_lock(leftover.path, "pruning", "try again"):
                for path in files_in(leftover.path, OURS):
                    remove_state(path)
        except (OSError, ValueError):  # InputError too: another run has the lock
            return False
    return not os.path.lexists(leftover.path)


def _states(place: Path) -> Iterator[Leftover]:
    """Folders of runs below `place`."""
    for folder in folders_in(place):
        files = list(files_in(folder, OURS))
        if files:
            yield leftover_of("checkpoints", folder, files)


def _priors(place: Path) -> Iterator[Leftover]:
    for path in files_in(place, PRIOR):
        yield leftover_of("prior", path, [path])


def _trash(place: Path) -> Iterator[Leftover]:
    for folder in folders_in(place):
        if is_ours(folder):
            newest = os.lstat(folder).st_ctime  # a rename, by which it came here, leaves all other times as they were
            yield Leftover("trash", folder, bytes_in(folder) / 2**20, (time.time() - newest) / DAY)


def leftover_of(kind: str, path: Path, files: list[Path]) -> Leftover:
    found = [os.lstat(file) for file in files]
    newest = max(each.st_mtime for each in found)
    return Leftover(kind, path, sum(each.st_size for each in found) / 2**20, (time.time() - newest) / DAY, tuple(files))


def folders_in(place: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def files_in(place: Path, name: re.Pattern[str]) -> list[Path]:
    try:
        entries = [entry for entry in os.scandir(place) if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []
    return sorted(Path(entry.path) for entry in entries if name.fullmatch(entry.name))
