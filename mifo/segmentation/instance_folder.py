"""An instance folder from a photo and masks: what `learn` reads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ..data.instance import IMAGE_SUFFIXES, MAX_ASSETS, MAX_OVERLAP
from ..errors import InputError
from ..io.files import write_folder
from ..io.image_file import StoredImage
from ..io.sheets import ASSET_COLORS, thumbnail
from ..prompts import check_characters
from .grabcut import BoolArray
from .hints import Hint

KIND = "instance"  # of its manifest
OVERVIEW = "overview.png"
#: What marks a thing in the overview, above the mask.
SHADE = 0.45


def check_things(masks: Sequence[BoolArray], words: Sequence[str], hints: Sequence[Hint]) -> None:
    """Raises InputError for no thing, too many, a mask that is empty or everything, and words that do not fit."""
    if not 1 <= len(masks) <= MAX_ASSETS:
        raise InputError(f"{len(masks)} things were marked, but an instance has 1 to {MAX_ASSETS}; give a --box or a --point "
                         "for each")  # fmt: skip
    if words and len(words) != len(masks):
        raise InputError(f"there are {len(words)} --words and {len(masks)} things; give one for each, in the order of the boxes, "
                         "then of the points outside them, or none")  # fmt: skip
    for index, word in enumerate(words):
        if not word.strip():
            raise InputError(f"the words for thing {index} are empty; say what it is, such as --words 'red car'")
        check_characters(word, "--words")
    for index, (mask, hint) in enumerate(zip(masks, hints, strict=True)):
        where = ", ".join(f"{v:.2f}" for v in hint.box.as_tuple())
        if not mask.any():
            raise InputError(f"thing {index} was not found in its box ({where}): all of it looks like what is around; draw the "
                             "box closer, or add a --point on it")  # fmt: skip
        if mask.all():
            raise InputError(f"thing {index} (box {where}) covers the whole picture; draw its box closer")


def without_overlaps(masks: Sequence[BoolArray], hints: Sequence[Hint]) -> list[BoolArray]:
    """A pixel that two masks claim is the one's with the smaller box: what stands before something is mostly the smaller."""
    def area(index: int) -> float:
        box = hints[index].box
        return (box.x1 - box.x0) * (box.y1 - box.y0)

    free = np.ones_like(masks[0]) if masks else np.zeros(0, bool)
    found: dict[int, BoolArray] = {}
    for index in sorted(range(len(masks)), key=area):
        own = masks[index] & free
        found[index] = own if own.sum() >= (1 - MAX_OVERLAP) * masks[index].sum() else masks[index]
        free = free & ~found[index]
    return [found[index] for index in range(len(masks))]


def save_instance(folder: Path, photo: StoredImage, image: Image.Image, masks: Sequence[BoolArray],
                  words: Sequence[str], overwrite: bool = False) -> dict[str, str]:  # fmt: skip
    """`img`, `mask0.png` and so on, `words.txt` where there are words, and an overview; the folder appears whole, or not at
    all. The photo's own file is copied where it is stored upright; else `image`, RGB and upright, is written as PNG.

    Raises InputError where the folder has anything in it; with `overwrite` an earlier instance that this wrote is replaced.
    """
    suffix = photo.path.suffix.lower()
    copied = photo.orientation == 1 and suffix in IMAGE_SUFFIXES and not photo.animated
    name = f"img{suffix}" if copied else "img.png"
    with write_folder(folder, KIND, overwrite) as temporary:
        if copied:
            shutil.copyfile(photo.path, temporary / name)
        else:
            image.save(temporary / name, "PNG")
        for index, mask in enumerate(masks):
            Image.fromarray(mask.astype(np.uint8) * 255).save(temporary / f"mask{index}.png", "PNG")
        if words:
            (temporary / "words.txt").write_text("".join(f"{' '.join(word.split())}\n" for word in words), encoding="utf-8")
        overview(image, masks).save(temporary / OVERVIEW, "PNG")
    return {"image": str(folder / name), "overview": str(folder / OVERVIEW),
            **{f"mask{k}": str(folder / f"mask{k}.png") for k in range(len(masks))}}  # fmt: skip


def overview(image: Image.Image, masks: Sequence[BoolArray]) -> Image.Image:
    """The picture with every mask, (H, W), in its colour and with its number."""
    shown = thumbnail(image)
    pixels: npt.NDArray[np.floating[Any]] = np.asarray(shown, np.float32)
    places = []
    for index, mask in enumerate(masks):
        small = Image.fromarray(mask.astype(np.uint8) * 255).resize(shown.size, Image.Resampling.BOX)
        cover = (np.asarray(small, np.float32) / 255)[..., None]
        pixels = pixels * (1 - SHADE * cover) + SHADE * cover * np.array(ASSET_COLORS[index % len(ASSET_COLORS)], np.float32)
        rows, columns = np.nonzero(np.asarray(small) > 127)
        places.append((int(np.median(columns)), int(np.median(rows))) if len(rows) else None)
    sheet = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(max(14, sheet.width // 30))
    for index, place in enumerate(places):
        if place is not None:
            drawing.text(place, str(index), (255, 255, 255), font, anchor="mm", stroke_width=3, stroke_fill=(0, 0, 0))
    return sheet
