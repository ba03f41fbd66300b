"""Checkpoints of a run: state between two steps, in one safetensors file each, whole or absent; and the lock of the run.

    <output folder>/.checkpoints/<name>/  lock, 00000350.safetensors, 00000400.safetensors
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.files import write_file
from ..io.json_text import json_text
from ..io.lock import checkpoint_folder, open_folder
from ..io.tensor_file import Damaged, Saved, read_header, read_state, remove_state, write_state

KEPT = 2


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
                state: dict[str, Any] = read_state(path)
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
def read_checkpoints(target: Path, identity: Mapping[str, Any], options: Checkpointing) -> Iterator[Checkpoints]:
    """As `open_checkpoints` for a process that only reads them, beside the one that writes and has the lock."""
    yield Checkpoints(checkpoint_folder(target), identity, options)


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
