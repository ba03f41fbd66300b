"""Long jobs of many pictures: each is kept as soon as it is drawn, so that the same job goes on after an interruption; what
fails does not stop the rest.

    <parent of the output folder>/.checkpoints/<its name>/  lock, item-<digest of the recipe>.safetensors, ...
    output/<bundle>/.checkpoints/<command>-<digest of the job>/  ... where the output folder is the next number
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from .. import __version__
from ..bundle.store import Bundle
from ..config import to_dict
from ..errors import InputError, NotFinite
from ..io.files import write_file
from ..io.json_text import json_text
from ..io.lock import checkpoint_folder, open_folder
from ..io.tensor_file import Damaged, read_state, remove_state, write_state
from ..io.terminal import without_folders
from ..model.base import BaseModel

Draw = Callable[[], list[Image.Image]]
#: (name for people, recipe, number of pictures, how to draw them) -> the pictures, or None where drawing them failed
Keep = Callable[[str, Mapping[str, Any], int, Draw], "Sequence[Image.Image] | None"]


def draw_now(name: str, recipe: Mapping[str, Any], count: int, draw: Draw) -> Sequence[Image.Image] | None:
    """Keeps nothing and catches nothing."""
    return draw()


class Kept(Sequence[Image.Image]):
    """The pictures of one item: read from its file whenever they are looked at, so that a long job need not hold them all."""

    def __init__(self, path: Path, count: int):
        self.path, self.length = path, count

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        """Raises InputError when the file has gone or changed since it was written."""
        return self._read()[index]

    def __iter__(self) -> Iterator[Image.Image]:
        return iter(self._read())

    def _read(self) -> list[Image.Image]:
        images = _read(self.path)
        if images is None or len(images) != self.length:
            raise InputError(f"{self.path} was removed or changed while the job ran; give the same command again")
        return images


class ImageJob:
    """The items of one job; make it with `open_job`. An item is some pictures that are drawn together."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], again: str = "the same command"):
        self.folder, self.facts, self.again = folder, dict(facts), again
        self.done = 0
        """Items."""
        self.reused = 0
        """Items among them that an earlier, interrupted or failed job has left."""
        self.failures: dict[str, str] = {}
        """Name of an item -> why it is missing."""
        self._only_input = True

    def images(self, name: str, recipe: Mapping[str, Any], count: int, draw: Draw) -> Sequence[Image.Image] | None:
        """The `count` pictures (RGB) of `recipe`, plain JSON that holds all that decides them beside the job's own facts: those
        that are kept, or else what `draw` returns, which are then kept. None when `draw` fails; the reason is noted.

        Raises InputError when they cannot be written: so would all that follow.
        """
        digest = hashlib.sha256(json_text([self.facts, recipe], sort_keys=True).encode()).hexdigest()[:32]
        path = self.folder / f"item-{digest}.safetensors"
        images = _read(path)
        if images is not None and len(images) == count:
            self.reused += 1
        else:
            try:
                images = draw()
            except Exception as error:  # the others may well succeed; Ctrl-C is no Exception
                self._only_input &= isinstance(error, InputError)
                told = isinstance(error, InputError | NotFinite)
                self.failures[name] = str(error) if told else f"{type(error).__name__}: {error}"
                return None
            with write_file(path, overwrite=True) as temporary:
                pixels = [torch.from_numpy(np.array(image)) for image in images]  # (H, W, 3), 0 .. 255
                write_state(temporary, pixels, name, recipe)
        self.done += 1
        return Kept(path, count)

    def failed(self) -> dict[str, str]:
        """`failures` for a record that is passed on: of paths in the reasons, the last part alone."""
        return {name: without_folders(reason) for name, reason in self.failures.items()}

    @property
    def status(self) -> int:
        """The exit status: 0 all is done, 2 the input was at fault wherever something is missing, 1 otherwise."""
        return 0 if not self.failures else 2 if self._only_input else 1

    def hint(self) -> str:
        """For the message of an interrupted job."""
        return f"; {self.done} items are kept: the same command goes on from there" if self.done else ""

    def summary(self) -> list[str]:
        """Lines for people: how much is missing, and each failure with its reason."""
        total = self.done + len(self.failures)
        lines = [f"error: {len(self.failures)} of {total} items failed; {self.again} tries only them again"]
        return [*lines, *(f"  {name}: {reason}" for name, reason in self.failures.items())]

    def clear(self) -> None:
        """Forgets everything, once it has become the job's result; not while something is missing."""
        if not self.failures:
            for path in self.folder.glob("item-*.safetensors"):
                remove_state(path)


@contextmanager
def open_job(given: Path | None, place: Path, command: str, recipe: Any, base: BaseModel, bundle: Bundle) -> Iterator[ImageJob]:
    """The job that draws with `bundle` on `base` and writes to the folder `given`, or to the next number in `place`; locked
    against a second one while the block lasts. `recipe`, plain JSON, tells one job of `command` from another.

    Raises InputError when another process has the lock, or the folder cannot be made.
    """
    facts = {"mifo": __version__, "base": base.fingerprint, "dtype": str(base.dtype), "device": base.device.type,
             "memory": to_dict(base.memory), "bundle": bundle.digest}  # fmt: skip
    again = "the same command"
    if given is not None:
        target = Path(os.path.realpath(given))
        folder, what = checkpoint_folder(target), f"writing to {target}"
        again += " with --overwrite"  # over what was written without them
    else:
        digest = hashlib.sha256(json_text([facts, recipe], sort_keys=True).encode()).hexdigest()[:16]
        folder, what = checkpoint_folder(Path(os.path.realpath(place)) / f"{command}-{digest}"), "drawing just the same"
    with open_folder(folder, what, "give another --output-path"):
        yield ImageJob(folder, facts, again)


def _read(path: Path) -> list[Image.Image] | None:
    """None when they are not there, or a bit of them has changed."""
    try:
        return [Image.fromarray(pixels.numpy()) for pixels in read_state(path)] if os.path.isfile(path) else None
    except (Damaged, AttributeError, TypeError, ValueError):
        return None
