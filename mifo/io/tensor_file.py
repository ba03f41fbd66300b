"""A tree of tensors and plain values in one safetensors file, with a checksum. No pickle: what is no tensor stands as JSON in the
file's header."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .json_text import json_text
from .read_files import UnusableFile, check_regular

SCHEMA = "1"
HEADER = "mifo"
#: Of one file: ten times Stable Diffusion's adapters at rank 256 with their optimizer.
MAX_BYTES = 1 << 34


@dataclass(frozen=True)
class Saved:
    """What a file's header says."""

    path: Path
    where: str
    """For people: "phase 1, step 350 of 600"."""
    identity: Any
    """Plain JSON."""


class Damaged(Exception):
    """A checkpoint that cannot be read."""


def _check_file(path: Path) -> None:
    """Raises OSError for a link, and for what is no file of a sane size: the system's own reader would wait for ever, and hear no
    signal."""
    if os.path.islink(path):
        raise UnusableFile(path, "it is a link")
    check_regular(path, MAX_BYTES)


def write_state(path: Path, state: Any, where: str, identity: Any) -> None:
    """A tree of dicts, lists, tuples, tensors and plain values -> one safetensors file with a checksum in its header."""
    tensors: dict[str, torch.Tensor] = {}
    tree = json_text(_pack(state, tensors))
    header = {"schema": SCHEMA, "where": where, "identity": json_text(identity), "tree": tree}
    header["checksum"] = _checksum(tree, tensors)
    save_file(tensors, path, metadata={HEADER: json_text(header)})  # one entry: safetensors writes several in any order


def remove_state(path: Path) -> None:
    """Removes a file that `write_state` wrote; any other of that name, and one that cannot be told from it any more, stays."""
    with suppress(Damaged, OSError):
        read_header(path)
        path.unlink()


def read_header(path: Path) -> Saved:
    """Where the run was, and which run it was. Raises Damaged."""
    try:
        _check_file(path)
        with safe_open(path, "pt") as file:
            header = _metadata(file)
        if header["schema"] != SCHEMA:
            raise ValueError(header["schema"])
        return Saved(path, header["where"], json.loads(header["identity"]))
    except Exception as error:  # a header of random bytes can raise anything
        raise Damaged from error


def read_state(path: Path) -> Any:
    """The inverse of `write_state`, tensors on the CPU. Raises Damaged when a bit of it has changed."""
    try:
        _check_file(path)
        with safe_open(path, "pt") as file:
            header = _metadata(file)
            tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
        if header["checksum"] != _checksum(header["tree"], tensors):
            raise ValueError("checksum")
        return _unpack(json.loads(header["tree"]), tensors)
    except Exception as error:
        raise Damaged from error


def _metadata(file: Any) -> dict[str, str]:
    found = file.metadata()
    header: dict[str, str] = json.loads(found[HEADER]) if HEADER in found else found  # older files have an entry for each value
    return header


def _checksum(tree: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(tree.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain JSON; tensors go into `tensors` and leave their name. Keys of dicts keep their types."""
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {"tuple" if isinstance(value, tuple) else "list": [_pack(v, tensors) for v in value]}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return {"float": str(value)}
    raise TypeError(f"a {type(value).__name__} cannot be kept in a checkpoint")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "tensor":
        return tensors[inside]
    if kind == "float":
        return float(inside)
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in inside}
    items = [_unpack(v, tensors) for v in inside]
    return tuple(items) if kind == "tuple" else items
