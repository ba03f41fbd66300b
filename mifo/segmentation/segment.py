"""A photo, boxes and clicks -> a mask for each thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..boxes import Box
from ..errors import InputError
from ..io.image_file import StoredImage, open_image, to_srgb
from .grabcut import BoolArray, GrabCut, hint_at, propose
from .hints import Hint, Point, points_by_box
from .instance_folder import check_things, save_instance, without_overlaps


class Segmenter(Protocol):
    """What makes a mask of a box and points: `GrabCut`, or `sam2.Sam2`."""

    name: str

    def masks(self, image: Image.Image, hints: Sequence[Hint]) -> list[BoolArray]:
        """(H, W) bool for each hint, True on the thing."""


@dataclass(frozen=True)
class Segmentation:
    """A photo with a mask for each thing in it."""

    photo: StoredImage
    image: Image.Image
    """RGB, upright, sRGB."""
    hints: tuple[Hint, ...]
    masks: tuple[BoolArray, ...]
    """(H, W) each, True on the thing; none is empty, and no two share a pixel unless one would lose more than half."""

    def save(self, folder: Path, words: Sequence[str] = (), overwrite: bool = False) -> dict[str, str]:
        """An instance folder for `learn`; see `save_instance`. `words`: one for each thing, or none. Raises InputError."""
        check_things(self.masks, words, self.hints)
        return save_instance(folder, self.photo, self.image, self.masks, words, overwrite)


def read_photo(path: Path) -> tuple[StoredImage, Image.Image]:
    """The file, and its picture: RGB, upright, sRGB. Raises InputError."""
    photo = open_image(path)
    return photo, to_srgb(photo)


def segment(photo: StoredImage, image: Image.Image, boxes: Sequence[Box] = (), points: Sequence[Point] = (),
            segmenter: Segmenter | None = None) -> Segmentation:  # fmt: skip
    """A mask for each box, then for each point that lies in no box; points in a box say that they are on its thing.

    `photo`, `image`: as `read_photo` gives them. `segmenter`: `GrabCut` by default. Raises InputError for a thing that is not
    found.
    """
    hints, alone = points_by_box(boxes, points)
    hints += [hint_at(image, point) for point in alone]
    if not hints:
        raise InputError("no thing was marked; give a --box or a --point for each, or --auto")
    masks = (segmenter or GrabCut()).masks(image, hints)
    check_things(masks, (), hints)
    return Segmentation(photo, image, tuple(hints), tuple(without_overlaps(masks, hints)))


def segment_salient(photo: StoredImage, image: Image.Image, chosen: Sequence[int] = (),
                    segmenter: Segmenter | None = None) -> Segmentation:  # fmt: skip
    """The things that stand out from the picture's rim, the most salient first; `chosen` are their numbers, from 0.

    Raises InputError where nothing stands out, or a number does not exist.
    """
    hints = propose(image)
    if not hints:
        raise InputError(f"nothing in {photo.path} stands out from the picture's rim; give a --box around each thing")
    masks = (segmenter or GrabCut()).masks(image, hints)
    there = [k for k, mask in enumerate(masks) if mask.any() and not mask.all()]
    hints, masks = [hints[k] for k in there], [masks[k] for k in there]
    if missing := [k for k in chosen if not 0 <= k < len(hints)]:
        raise InputError(f"--choose {', '.join(map(str, missing))}: {len(hints)} things were proposed, 0 to {len(hints) - 1}; "
                         "look at the overview of --auto without --choose")  # fmt: skip
    kept = list(dict.fromkeys(chosen)) or range(len(hints))
    hints, masks = [hints[k] for k in kept], [masks[k] for k in kept]
    check_things(masks, (), hints)
    return Segmentation(photo, image, tuple(hints), tuple(without_overlaps(masks, hints)))
