"""Where a command's results go: a place of their own each run, apart from everything that the command reads."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from .files import check_free, check_replaceable, check_writable, unwritable

#: Below it each command writes what it was given no other place for.
PLACE = Path("output")
NUMBER = re.compile(r"[0-9]{4,9}")


# --- a number that nobody else has ---------------------------------------------------------------


def check_output(given: Path | None, place: Path, kind: str, overwrite: bool) -> None:
    """Raises InputError, before anything long starts, unless a folder of results can be written: `given`, or one in `place`."""
    if given is None:
        check_writable(place)
        return
    check_writable(given)  # finds a name that is too long, or a file, before it is there
    check_writable(given.parent)
    check_replaceable(given, kind, overwrite)


def check_file(given: Path | None, example: str, overwrite: bool) -> None:
    """Raises InputError, before anything long starts, unless a file of results can be written: `given`, or one in PLACE."""
    if given is None:
        check_writable(PLACE)
        return
    if not given.name:
        raise InputError(f"--output-path is '{given}', expected a file's name, such as {example}")
    check_writable(given.parent)
    check_free(given, overwrite)


@contextmanager
def numbered_folder(given: Path | None, place: Path) -> Iterator[Path]:
    """The folder to write: `given`, or `place/0001`, `place/0002` and so on, the first number above all that are there.

    The number is taken by making the folder, which two runs at once cannot both do; an empty one is removed after the block.
    """
    if given is not None:
        yield given
        return
    made = [p for p in (place, *place.parents) if not os.path.lexists(p)]
    folder = _claim(place, "", "")
    try:
        yield folder
    finally:
        _remove_empty([folder, *made])


@contextmanager
def numbered_file(given: Path | None, place: Path, stem: str, suffix: str, overwrite: bool) -> Iterator[tuple[Path, bool]]:
    """(file to write, whether it may be replaced): `given`, or `place/<stem>-0001<suffix>` and so on, an empty one of our own."""
    if given is not None:
        check_free(given, overwrite)
        yield given, overwrite
        return
    made = [p for p in (place, *place.parents) if not os.path.lexists(p)]
    path = _claim(place, f"{stem}-", suffix)
    claimed = os.lstat(path)
    try:
        yield path, True
    finally:
        with suppress(OSError):
            if os.path.samestat(os.lstat(path), claimed):  # nothing has taken its place
                path.unlink()
        _remove_empty(made)


def _claim(place: Path, before: str, after: str) -> Path:
    """Makes the next numbered entry of `place`: a file where it has a suffix, otherwise a folder."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        names = (n[len(before) : len(n) - len(after)] for n in os.listdir(place) if n.startswith(before) and n.endswith(after))
        number = max((int(n) for n in names if NUMBER.fullmatch(n)), default=0)
        while True:
            number += 1
            path = place / f"{before}{number:04d}{after}"
            with suppress(FileExistsError):
                if after:
                    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
                else:
                    path.mkdir()
                return path
    except OSError as error:
        raise unwritable(place, error) from None


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


# --- apart from the inputs -----------------------------------------------------------------------


def check_apart(given: Path | None, place: Path, inputs: Mapping[str, str | Path | None],
                closed: Mapping[str, str | Path | None], what: str = "--output-path") -> None:  # fmt: skip
    """Raises InputError when writing to `given`, or to a new name below `place`, could change an input of the same command.

    Inputs by what they are for people, such as "--mask". `inputs` are files and folders that are read: none may be what is
    `given` or lie in it. `closed` are folders (a bundle, an instance, a base model) in which nothing may be written either.
    Links, letter case and second names (hard links) are seen through; what does not exist, such as boxes as text, is no file.
    """
    for name, each in {**inputs, **closed}.items() if given is not None else ():
        source = _existing(each)
        if source is not None and given is not None and _is_within(source, given):
            verb = "is" if _is_same(source, given) else "holds"
            raise InputError(f"{what} is {given}, which {verb} {name} ({source}) and would be replaced; choose another")
    for name, each in closed.items():
        folder = _existing(each)
        if folder is not None and _is_within(given or place, folder):
            raise InputError(f"{what} is {given or place}, which lies in {name} ({folder}); choose one elsewhere")


def _existing(given: str | Path | None) -> Path | None:
    """A path that is there; None for text that is none."""
    if not given:
        return None
    try:
        return Path(given) if os.path.exists(given) else None
    except (OSError, ValueError):
        return None


def _is_same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return False


def _is_within(path: Path, folder: Path) -> bool:
    """Whether `path`, which may not exist yet, is `folder` or below it. Each folder above is compared as the system knows it."""
    real = Path(os.path.realpath(path))
    return any(_is_same(above, folder) for above in (real, *real.parents))
