"""Writing whole or not at all: a folder or a file appears complete, or what was there stays as it was; and nothing is replaced
that we did not write ourselves (its manifest says so) and were not asked to replace.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from .manifest import foreign_entries, read_manifest, write_manifest
from .swap import finish_swaps, flush_names, replace_by
from .temporary import MARKER, remove_abandoned, temporary_folder

#: What the system says when no more bytes fit; EFBIG is a limit on one file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def write_folder(folder: Path, kind: str, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block succeeds, with a manifest inside, and vanishes when it does not.

    A folder of that name is replaced if it is empty, or if `overwrite` is true and it is what we wrote as the same `kind`, every
    entry in it. Raises InputError for any other, and when the disk is full or the place cannot be written.
    """
    folder = Path(os.path.realpath(folder))  # through a link to the folder that it means
    with _new_parents(folder), _reporting(folder):
        check_replaceable(folder, kind, overwrite)
        _make_place(folder.parent)
        with temporary_folder(folder.parent) as temporary:
            yield temporary
            write_manifest(temporary, kind, MARKER)
            _make_readable(temporary)
            _flush(temporary)
            (temporary / MARKER).unlink()
            _flush_folder(temporary)
            _put(temporary, folder, kind, overwrite)
            flush_names(folder.parent)


@contextmanager
def write_file(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block succeeds, and vanishes when it does not.

    Raises InputError when something has that name, unless `overwrite` is true and it is a regular file, and when the disk is full
    or the place cannot be written.
    """
    path = Path(os.path.realpath(path.parent)) / path.name
    with _new_parents(path), _reporting(path):
        check_free(path, overwrite)
        _make_place(path.parent)
        with temporary_folder(path.parent) as temporary:
            yield temporary / path.name
            _make_readable(temporary)
            _flush(temporary)
            check_free(path, overwrite)
            if overwrite:
                os.replace(temporary / path.name, path)
            else:
                _move_new(temporary / path.name, path)
            flush_names(path.parent)


# --- before anything long starts ----------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Raises InputError unless files can be made in `folder`, or a folder where it will stand. Leaves nothing behind."""
    there = Path(os.path.realpath(folder))
    try:
        with suppress(FileNotFoundError):
            os.lstat(there)  # finds names that are too long, and files used as folders
        while not os.path.lexists(there):
            there = there.parent
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise unwritable(folder, error) from None


def check_replaceable(folder: Path, kind: str, overwrite: bool) -> None:
    """Raises InputError when `folder` is a file, holds something that we did not put there, or may not be replaced."""
    folder = Path(os.path.realpath(folder))
    finish_swaps(folder.parent)
    if not os.path.lexists(folder):
        return
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is a file and would be replaced; choose another name or output folder, or move it away")
    try:
        if os.listdir(folder):
            _check_contents(folder, folder, kind, overwrite)
        else:
            _check_no_fixed_place(folder)
    except OSError as error:
        raise unwritable(folder, error) from None


def _check_contents(there: Path, folder: Path, kind: str, overwrite: bool) -> None:
    """`folder`, which at this moment may have another name `there`, holds nothing but what may be replaced."""
    foreign, manifest = foreign_entries(there), read_manifest(there)
    if manifest is None:
        raise InputError(f"{folder} is a folder with other things in it ({', '.join(foreign)}) and would be replaced; choose "
                         "another name or output folder, or move it away")  # fmt: skip
    if foreign:
        raise InputError(f"{folder} would be replaced, but what is in it is not all as mifo wrote it: {', '.join(foreign)}; move "
                         "that away, or choose another name or output folder")  # fmt: skip
    if manifest.kind != kind:
        raise InputError(f"{folder} holds an earlier run's {manifest.kind}, and would be replaced by another kind of results "
                         f"({kind}); choose another name or output folder")  # fmt: skip
    if not overwrite:
        raise InputError(f"{folder} holds an earlier run's {kind}; give --overwrite to replace it, or choose another name or "
                         "output folder")  # fmt: skip


def check_free(path: Path, overwrite: bool) -> None:
    """Raises InputError when something stands at `path`, or with `overwrite` when it is no regular file."""
    if not os.path.lexists(path):
        return
    mode = os.lstat(path).st_mode
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} cannot be written: a folder has this name; choose another name")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a link or a device, and would be replaced; choose another name")
    if not overwrite:
        raise InputError(f"{path} exists already; give --overwrite to replace it, or another name")


def _check_no_fixed_place(folder: Path) -> None:
    """A folder is put in place by renaming, which a disk's root and the folder that somebody works in do not survive."""
    if os.path.ismount(folder) or (os.path.exists(os.curdir) and os.path.samefile(folder, os.curdir)):
        what = "the root of a disk" if os.path.ismount(folder) else "the folder that you work in"
        raise InputError(f"{folder} is {what}, and results are put in place as a whole folder; give one inside it, such as "
                         f"{folder / '0001'}")  # fmt: skip


# --- what went wrong ----------------------------------------------------------------------------


def is_write_error(error: BaseException) -> bool:
    """True for what the system or safetensors raises when a file cannot be written."""
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def is_full(error: BaseException) -> bool:
    """True when no more bytes fit on the disk, in the quota or into one file."""
    return _number(error) in FULL


def unwritable(path: Path, error: Exception) -> InputError:
    """One message for every way in which writing fails."""
    if is_full(error):
        return InputError(
            f"no space left for {path} ({os.strerror(_number(error) or 0)}): it was not written, nothing half-written is "
            "left; free some space or choose an output folder on another disk"
        )
    if _number(error) in (errno.ENOTDIR, errno.EEXIST):
        return InputError(f"{path} cannot be written: a file stands where a folder is needed; choose another output folder")
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{str(path)[:200]} cannot be written ({reason}); choose another output folder or change its permissions")


def _number(error: BaseException) -> int | None:
    """The error's number; safetensors has it in its message only."""
    found = re.search(r"os error (\d+)", str(error))
    return getattr(error, "errno", None) or (int(found[1]) if found else None)


# --- steps --------------------------------------------------------------------------------------


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """What the system refuses, as InputError."""
    try:
        yield
    except Exception as error:
        if not is_write_error(error):
            raise
        raise unwritable(path, error) from None


@contextmanager
def _new_parents(path: Path) -> Iterator[None]:
    """Removes the parents that were missing before the block and are empty after it."""
    new = [p for p in path.parents if not os.path.lexists(p)]
    try:
        yield
    finally:
        with suppress(OSError):
            for parent in new:
                parent.rmdir()


def _make_place(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)


def _make_readable(temporary: Path) -> None:
    """The rights that new files and folders get here; safetensors gives them to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    for path in temporary.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _flush(folder: Path) -> None:
    """Files and lists of names onto the disk, so that a power cut right after the rename finds all of it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if os.name != "nt":  # where folders cannot be opened
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _move_new(source: Path, target: Path) -> None:
    """A rename that never replaces. Where the file system knows no hard links, an empty file holds the name for a moment."""
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        check_free(target, overwrite=False)
        raise
    except (OSError, NotImplementedError):
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(source, target)


def _put(temporary: Path, folder: Path, kind: str, overwrite: bool) -> None:
    """`temporary` becomes `folder`, if that may be replaced still."""
    if not os.path.lexists(folder) or not os.listdir(folder):
        try:
            os.rename(temporary, folder)  # fails on a folder that is not empty
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    check_replaceable(folder, kind, overwrite)
    replace_by(temporary, folder, lambda old: _check_contents(old, folder, kind, overwrite))
