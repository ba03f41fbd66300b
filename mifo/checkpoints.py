"""Checkpoints of a run: state between two steps, in one safetensors file each, whole or absent; and the lock of the run.

    <output folder>/.checkpoints/<name>/  lock, 00000350.safetensors, 00000400.safetensors

Knows trees of tensors and plain values, files and processes. Knows nothing of what is learned. No pickle: what is no tensor
stands as JSON in the file's header.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .errors import InputError
from .files import write_file
from .json_text import json_text
from .lock import hold_lock
from .read_files import UnusableFile, check_regular
from .temporary import remove_abandoned

SCHEMA = "1"
HEADER = "mifo"
KEPT = 2
#: Of one checkpoint: ten times Stable Diffusion's adapters at rank 256 with their optimizer.
MAX_BYTES = 1 << 34


@dataclass(frozen=True)
class Checkpointing:
    """How often state is kept, and what to do with the state of an interrupted run."""

    every_steps: int = 50
    """0 keeps none."""
    every_seconds: float = 120.0
    resume: bool | None = False
    """True goes on from the last checkpoint if there is one, False starts over; None refuses to throw away a checkpoint that
    this very run could go on from."""
    strict: bool = True
    """With `resume`: refuses the checkpoint of a run with other settings; otherwise such a run starts over."""


@dataclass(frozen=True)
class Saved:
    """What a checkpoint's header says."""

    path: Path
    where: str
    """For people: "phase 1, step 350 of 600"."""
    identity: Any
    """Plain JSON."""


def checkpoint_folder(target: Path) -> Path:
    """Where the checkpoints of the run that writes `target` are kept."""
    return target.parent / ".checkpoints" / target.name


class Checkpoints:
    """The checkpoints of one run; make it with `open_checkpoints`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], options: Checkpointing):
        self.folder, self.options = folder, options
        self.identity = json.loads(json_text(identity))  # as it will be read again
        self.last_saved: str | None = None
        self._count = max((int(p.stem) for p in _numbered(folder)), default=0)
        self._time = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The newest state that can be read, or None to start from the beginning.

        Raises InputError when it belongs to a run with other settings, or when nobody said whether to go on from it.
        """
        if self.options.resume is False:
            return None
        for path in reversed(_files(self.folder)):
            try:
                saved = read_header(path)
                differences = different_keys(saved.identity, self.identity)
                if self.options.resume is None:
                    _refuse_to_forget(saved, differences)
                    return None
                if differences and not self.options.strict:
                    return None
                if differences:
                    raise InputError(
                        f"the interrupted run in {self.folder} cannot be resumed with other settings: "
                        f"{'; '.join(differences[:8])}; give the same ones, or --no-resume to start over"
                    )
                state = read_state(path)
            except Damaged:
                continue  # a power cut may leave the newest half on the disk: the one before it is whole
            self.last_saved = saved.where
            return state
        return None

    def due(self, step: int, last: bool) -> bool:
        """True when `step` steps of a phase are done and the state should be kept."""
        every = self.options.every_steps
        return bool(every) and (last or step % every == 0 or time.monotonic() - self._time >= self.options.every_seconds)

    def save(self, state: dict[str, Any], where: str) -> None:
        """Writes `state` whole or not at all, then removes all but the last two.

        Raises InputError when the disk is full or the folder is gone; the checkpoints from before are kept.
        """
        self._count += 1
        with write_file(self.folder / f"{self._count:08d}.safetensors") as temporary:
            write_state(temporary, state, where, self.identity)
        self.last_saved, self._time = where, time.monotonic()
        for old in _files(self.folder)[:-KEPT]:
            remove_state(old)

    def clear(self) -> None:
        """Removes every checkpoint: the run has ended well."""
        for path in _files(self.folder):
            remove_state(path)


@contextmanager
def open_checkpoints(target: Path, identity: Mapping[str, Any], options: Checkpointing) -> Iterator[Checkpoints]:
    """The checkpoints of the run that will write `target`, locked against a second run for as long as the block lasts.

    Raises InputError when another process has the lock.
    """
    folder = checkpoint_folder(target)
    with open_folder(folder, f"learning to {target}", "give another --name"):
        yield Checkpoints(folder, identity, options)


@contextmanager
def open_folder(folder: Path, what: str, instead: str) -> Iterator[None]:
    """`hold_lock`, without what a killed run left half-written in `folder`: the lock says that nobody writes it any more."""
    with hold_lock(folder, what, instead):
        remove_abandoned(folder, after=0)
        yield


def latest(target: Path) -> Saved | None:
    """The newest checkpoint of an interrupted run that would write `target`; None when there is none that can be read."""
    for path in reversed(_files(checkpoint_folder(target))):
        with suppress(Damaged):
            return read_header(path)
    return None


def different_keys(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two trees of plain values differ: "config.lora.rank is 2 there and 4 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = dict.fromkeys([*there, *here])
        return [d for k in keys for d in different_keys(there.get(k), here.get(k), f"{name}.{k}" if name else k)]
    if there == here:
        return []
    return [f"{name} is {json_text(there)[:60]} there and {json_text(here)[:60]} here"]


def _refuse_to_forget(saved: Saved, differences: list[str]) -> None:
    if not differences:
        raise InputError(
            f"an interrupted run of exactly this has a checkpoint at {saved.where}; go on from it with --resume, or start over "
            "with --no-resume"
        )


def _files(folder: Path) -> list[Path]:
    """The checkpoints, oldest first. What is no regular file was not written by a run, and is neither read nor removed."""
    return sorted(p for p in _numbered(folder) if stat.S_ISREG(os.lstat(p).st_mode))


def _numbered(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*.safetensors") if p.stem.isascii() and p.stem.isdigit()]


# --- one file -----------------------------------------------------------------------------------


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
    return json.loads(found[HEADER]) if HEADER in found else found  # older files have an entry for each value


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
