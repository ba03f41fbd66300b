"""The folders that fuzz targets spoil, each made once a process: an instance, a bundle, a base model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from _tiny import tiny_base_folder, tiny_bundle_folder, write_instance

_holder = tempfile.TemporaryDirectory(prefix="mifo-fuzz-")


@cache
def scratch() -> Path:
    return Path(_holder.name)


@cache
def instance_folder() -> Path:
    return write_instance(scratch() / "cups")


@cache
def bundle_folder() -> Path:
    return Path(shutil.copytree(tiny_bundle_folder(), scratch() / "bundle"))


def with_file(folder: Path, name: str, content: bytes, use: Callable[[Path], object]) -> None:
    """`use(folder)` while `name` holds `content`; afterwards the folder is as it was."""
    path = folder / name
    before = path.read_bytes() if path.exists() else None
    path.write_bytes(content)
    try:
        use(folder)
    finally:
        path.unlink() if before is None else path.write_bytes(before)


@cache
def base_folder() -> Path:
    return Path(shutil.copytree(tiny_base_folder(), scratch() / "base"))
