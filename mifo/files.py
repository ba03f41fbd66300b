"""Writing whole or not at all: a folder or a set of files appears complete, or what was there stays as it was.

Knows paths and what can go wrong with them. Knows nothing of what is written.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

#: The end of a name that is still being written, hidden by a dot at its start.
PARTIAL = ".partial"
#: Seconds after which such a name belongs to a run that was killed.
ABANDONED_AFTER = 3600
#: What the system says when no more bytes fit; EFBIG is a limit on one file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replace_folder(folder: Path, is_ours: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block succeeds, and vanishes when it does not.

    A folder of that name is replaced in one step if it is empty or `is_ours` says that we made it; any other is refused.
    Raises InputError for that, and when the disk is full or the place cannot be written.
    """
    folder = Path(os.path.realpath(folder))  # through a link to the folder that it means
    made: list[Path] = []
    try:
        check_replaceable(folder, is_ours)
        made = _make_folders(folder.parent)
        _remove_abandoned(folder.parent)
        temporary = Path(tempfile.mkdtemp(PARTIAL, f".{folder.name}.", folder.parent))
        try:
            yield temporary
            _make_readable(temporary)
            _flush(temporary)
            _put(temporary, folder)
            _flush_names(folder.parent)
            made = []
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise unwritable(folder, error) from None
    finally:
        _remove_empty(made)


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files all move into `folder` when the block succeeds; none does when it fails.

    Files of the same names are replaced, others stay. Raises InputError when the disk is full or `folder` cannot be written.
    """
    made: list[Path] = []
    try:
        made = _make_folders(folder)
        _remove_abandoned(folder)
        temporary = Path(tempfile.mkdtemp(PARTIAL, ".", folder))
        try:
            yield temporary
            _make_readable(temporary)
            _flush(temporary)
            _move_all(sorted(temporary.iterdir()), folder)
            _flush_names(folder)
            made = []
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except Exception as error:
        if not is_write_error(error):
            raise
        raise unwritable(folder, error) from None
    finally:
        _remove_empty(made)


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


def check_replaceable(folder: Path, is_ours: Callable[[Path], bool]) -> None:
    """Raises InputError when `folder` is a file, or holds something that we did not put there."""
    if not os.path.lexists(folder) or (os.path.isdir(folder) and (not os.listdir(folder) or is_ours(folder))):
        return
    kind = "a folder with other things in it" if os.path.isdir(folder) else "a file"
    raise InputError(f"{folder} is {kind} and would be replaced; choose another name or output folder, or move it away")


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


def _make_folders(folder: Path) -> list[Path]:
    """Makes `folder` and the parents that it lacks; returns those that are new, the deepest first."""
    new = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
    folder.mkdir(parents=True, exist_ok=True)
    return new


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _remove_abandoned(folder: Path) -> None:
    """What a run that was killed left half-written."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name.endswith(PARTIAL) and time.time() - path.lstat().st_mtime > ABANDONED_AFTER:
            shutil.rmtree(path, ignore_errors=True)


def _make_readable(temporary: Path) -> None:
    """The rights that new files and folders get here; tempfile and safetensors give them to their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    for path in temporary.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _flush(folder: Path) -> None:
    """Onto the disk, so that a power cut right after the rename finds whole files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """The folder's list of names onto the disk too, where the system can: a rename that is not there yet can still be lost."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _move_all(paths: list[Path], folder: Path) -> None:
    for path in paths:
        if (folder / path.name).is_dir():  # seen before the first file moves
            raise OSError(errno.EISDIR, "a folder has this name", str(folder / path.name))
    for path in paths:
        os.replace(path, folder / path.name)


def _put(temporary: Path, folder: Path) -> None:
    """`temporary` becomes `folder`; where both exist they are swapped, and the caller removes `temporary`."""
    if not folder.exists():
        os.replace(temporary, folder)
    elif not _exchange(temporary, folder):
        aside = temporary.with_suffix(".old")
        os.replace(folder, aside)
        try:
            os.replace(temporary, folder)
        except BaseException:
            os.replace(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one atomic step. False where the platform or the file system cannot."""
    if sys.platform != "linux":
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
