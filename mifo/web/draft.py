"""A photo whose things are being marked: an instance folder in the making, kept in files from the first click on.

    <state>/drafts/<16 hex digits>/  draft.json, photo.png, painted-0.png, ...
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..boxes import Box
from ..data.instance import IMAGE_SUFFIXES
from ..errors import InputError
from ..io.files import write_file
from ..io.image_file import StoredImage
from ..io.json_text import json_text
from ..io.read_files import read_regular
from ..segmentation.grabcut import GrabCut, hint_at
from ..segmentation.hints import Hint
from ..segmentation.instance_folder import save_instance, without_overlaps
from ..segmentation.segment import read_photo

BoolArray = npt.NDArray[np.bool_]
NAME = re.compile(r"[0-9a-f]{16}")
RECORD = "draft.json"
MAX_THINGS = 8
MAX_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Thing:
    """One thing of the photo, as it was marked."""

    box: tuple[float, float, float, float]
    points: tuple[tuple[float, float], ...] = ()
    word: str = ""
    painted: str = ""
    """The file that holds its mask, where somebody painted it."""


@dataclass(frozen=True)
class Draft:
    """What the folder holds; every change writes it."""

    folder: Path
    photo: str
    things: tuple[Thing, ...] = field(default_factory=tuple)

    @property
    def name(self) -> str:
        return self.folder.name

    # --- the photo ------------------------------------------------------------------------------

    def open(self) -> tuple[StoredImage, Image.Image]:
        """The file, and its picture: RGB, upright, sRGB. Raises InputError."""
        return read_photo(self.folder / self.photo)

    def masks(self, image: Image.Image) -> list[BoolArray]:
        """(H, W) for each thing; no pixel is two things'."""
        hints = [Hint(Box(*thing.box), thing.points) for thing in self.things]
        found = iter(GrabCut().masks(image, [hint for hint, thing in zip(hints, self.things, strict=True) if not thing.painted]))
        masks = [self._painted(thing, image.size) if thing.painted else next(found) for thing in self.things]
        return without_overlaps(masks, hints) if masks else []

    def _painted(self, thing: Thing, size: tuple[int, int]) -> BoolArray:
        with Image.open(self.folder / thing.painted) as mask:
            return np.asarray(mask.convert("L").resize(size, Image.Resampling.NEAREST)) > 127

    # --- changes --------------------------------------------------------------------------------

    def add_box(self, box: Sequence[float]) -> Draft:
        """Raises InputError for a box that is none, one too many, or one in which nothing is found."""
        x0, y0, x1, y1 = Box(*box).as_tuple()
        return self._with_thing(Thing((x0, y0, x1, y1)))

    def add_point(self, point: tuple[float, float]) -> Draft:
        """A click: it says what is meant of the thing in whose box it lies, or it is on a thing alone. Raises InputError."""
        around = [k for k, t in enumerate(self.things) if t.box[0] <= point[0] <= t.box[2] and t.box[1] <= point[1] <= t.box[3]]
        if around:
            index = min(around, key=lambda k: Box(*self.things[k].box).area)
            thing = self.things[index]
            return self._replaced(index, replace(thing, points=(*thing.points, point), painted=""))
        hint = hint_at(self.open()[1], point)
        return self._with_thing(Thing(hint.box.as_tuple(), hint.points))

    def remove(self, index: int) -> Draft:
        return self._write(tuple(t for k, t in enumerate(self.things) if k != index))

    def paint(self, index: int, mask: BoolArray) -> Draft:
        """Somebody's own mask, (H, W) of any size. Raises InputError for an empty one."""
        if not mask.any():
            raise InputError(f"nothing of thing {index} is painted; paint over all of it, or take the thing away")
        name = f"painted-{secrets.token_hex(4)}.png"
        with write_file(self.folder / name) as temporary:
            Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, "PNG")
        return self._replaced(index, replace(self.things[index], painted=name))

    def name_things(self, words: Sequence[str]) -> Draft:
        """In the order of the things; those beyond the last word keep theirs."""
        named = [replace(thing, word=" ".join(word.split())[:60]) for thing, word in zip(self.things, words, strict=False)]
        return self._write((*named, *self.things[len(named) :]))

    def _with_thing(self, thing: Thing) -> Draft:
        if len(self.things) >= MAX_THINGS:
            raise InputError(f"there are {MAX_THINGS} things already; take one away first")
        changed = replace(self, things=(*self.things, thing))
        image = self.open()[1]
        mask = GrabCut().masks(image, [Hint(Box(*thing.box), thing.points)])[0]
        if not mask.any():
            raise InputError("nothing was found there: all of it looks like what is around; draw the box closer to the thing")
        return changed._write(changed.things)

    def _replaced(self, index: int, thing: Thing) -> Draft:
        return self._write(tuple(thing if k == index else t for k, t in enumerate(self.things)))

    def _write(self, things: tuple[Thing, ...]) -> Draft:
        record = {"photo": self.photo, "things": [asdict(thing) for thing in things]}
        with write_file(self.folder / RECORD, overwrite=True) as temporary:
            temporary.write_text(json_text(record, indent=1) + "\n")
        return replace(self, things=things)

    # --- the end --------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, str]:
        """The instance folder. Raises InputError where something stands there, and where nothing is marked."""
        stored, image = self.open()
        masks, words = self.masks(image), [thing.word for thing in self.things]
        check_masks_of(masks)
        if any(words) and not all(words):
            missing = ", ".join(str(k) for k, word in enumerate(words) if not word)
            raise InputError(f"say what thing {missing} is in a word or two, such as 'red car'")
        return save_instance(folder, stored, image, masks, words if all(words) else [])


def check_masks_of(masks: Sequence[BoolArray]) -> None:
    """Raises InputError where nothing is marked, or nothing is left of a thing."""
    if not masks:
        raise InputError("nothing is marked yet; click on a thing in the photo, or drag a box around it")
    for index, mask in enumerate(masks):
        if not mask.any():
            raise InputError(f"thing {index} has no pixel left: others cover it; take it away, or paint it")


def new_draft(place: Path, upload: Path) -> Draft:
    """Takes a copy of an uploaded file. Raises InputError for what is no picture."""
    read_photo(upload)
    suffix = upload.suffix.lower()
    folder = place / secrets.token_hex(8)
    folder.mkdir(parents=True)
    photo = f"photo{suffix if suffix in IMAGE_SUFFIXES else '.png'}"
    shutil.copyfile(upload, folder / photo)
    return Draft(folder, photo)._write(())


def open_draft(place: Path, name: Any) -> Draft | None:
    """None where there is none of that name, or it cannot be read."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return None
    try:
        record = json.loads(read_regular(place / name / RECORD, MAX_RECORD_BYTES))
        things = tuple(
            Thing(tuple(map(float, t["box"])), tuple((float(x), float(y)) for x, y in t["points"]), str(t["word"]),  # type: ignore[arg-type]
                  Path(str(t["painted"])).name) for t in record["things"]
        )  # fmt: skip
        return Draft(place / name, Path(str(record["photo"])).name, things)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
