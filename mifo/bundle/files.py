"""A bundle's files, all read at one moment and held in memory: what loads later never meets another bundle under the same name.

Only the files that a bundle has are read, each of them regular and of a sane size; whatever else lies in the folder is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from ..errors import InputError
from ..io.read_files import leads_out, read_regular
from ..model.families import ADAPTERS
from ..model.lora import AGAIN, LORA_CONFIG, LORA_WEIGHTS
from .catalogue import RECORD
from .instance_copy import instance_digest

ROWS = "assets.safetensors"
WEIGHT_TYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Five times the adapters of Stable Diffusion at rank 256.
MAX_WEIGHTS_BYTES = 1 << 29
MAX_JSON_BYTES = 1 << 22
MAX_ENTRIES = 10_000
#: Learned values are below 10. Beyond this the layers overflow, or normalize everything else away.
MAX_WEIGHT = 1e4
TRIES = 5  # at a bundle that is being replaced

Files = Mapping[str, bytes]


def read_bundle_files(folder: Path) -> tuple[dict[str, bytes], str | None]:
    """The files that there are, by their names inside of `folder`, and `references.instance_digest`; all of one bundle, also
    while it is being replaced.

    Raises InputError when one of them cannot be read, is no file, is too large, or leads out of the bundle.
    """
    for _ in range(TRIES):
        before = _which(folder)
        try:
            check_inside(folder)
            files, instance = _read(folder), instance_digest(folder)
        except InputError:
            if _which(folder) == before:
                raise
            continue
        if _which(folder) == before:
            return files, instance
    raise InputError(f"{folder} is being replaced by other runs all the time; wait until they have ended")


def _which(folder: Path) -> tuple[int, int] | None:
    """The folder itself, whatever its name: a bundle is replaced whole, by another folder."""
    try:
        found = os.stat(folder)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _read(folder: Path) -> dict[str, bytes]:
    limits = {RECORD: MAX_JSON_BYTES, ROWS: MAX_WEIGHTS_BYTES}
    for adapter in ADAPTERS:
        limits |= {f"{adapter}/{LORA_CONFIG}": MAX_JSON_BYTES, f"{adapter}/{LORA_WEIGHTS}": MAX_WEIGHTS_BYTES}
    files = {}
    for name, limit in limits.items():
        try:
            files[name] = read_regular(folder / name, limit)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InputError(f"{folder / name} cannot be read ({error.strerror}); {AGAIN}") from None
    return files


def check_inside(folder: Path) -> None:
    """Raises InputError for a link in a bundle that leads out of it: such a bundle would read other files as its own."""
    count = 0
    for place, folders, files in os.walk(folder):  # follows no links
        for path in (os.path.join(place, name) for name in (*folders, *files)):
            count += 1
            if leads_out(folder, path):
                raise InputError(f"{path} is a link out of the bundle; copy the file there, or {AGAIN}")
            if count > MAX_ENTRIES:
                raise InputError(f"{folder} has more than {MAX_ENTRIES} files, but a bundle has a few dozen; {AGAIN}")


def weights_digest(files: Files) -> str:
    """Of all that is learned: a bundle learned anew under its old name draws other pictures."""
    digest = hashlib.sha256()
    for name in sorted(files):
        if name != RECORD:
            digest.update(name.encode() + files[name])
    return digest.hexdigest()[:32]


def parse_json(files: Files, folder: Path, name: str) -> dict[str, Any]:
    """A JSON object. Raises InputError for anything else."""
    path = folder / name
    if name not in files:
        raise InputError(f"{path} is missing; {AGAIN}")
    try:
        record = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({type(error).__name__}); {AGAIN}") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} holds a {type(record).__name__}, expected an object; {AGAIN}")
    return record


def parse_tensors(files: Files, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Finite floats of a size that learning can lead to. Raises InputError for anything else."""
    path = folder / name
    if name not in files:
        raise InputError(f"{path} is missing; {AGAIN}")
    return check_tensors(files[name], path, AGAIN)


def check_tensors(content: bytes, path: Path, advice: str) -> dict[str, torch.Tensor]:
    """As `parse_tensors`, of a file's content; `advice` ends the message."""
    try:
        tensors: dict[str, torch.Tensor] = load(content)
    except Exception as error:  # whatever a hostile header makes safetensors raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is corrupt ({reason}); {advice}") from None
    if wrong := {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype not in WEIGHT_TYPES}:
        raise InputError(f"{path} holds {', '.join(sorted(wrong))}, expected fp32, fp16 or bf16; {advice}")
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise InputError(f"{path} holds values that are not finite; {advice}")
    largest = max((float(t.abs().max()) for t in tensors.values() if t.numel()), default=0.0)
    if largest > MAX_WEIGHT:
        raise InputError(f"{path} holds values up to {largest:.1e}, but learned ones are below 10: no picture comes of them; "
                         f"{advice}, with a lower learning rate")  # fmt: skip
    return tensors
