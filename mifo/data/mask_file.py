"""A mask file, read: which of its numbers say where the asset is, and what does not belong to its body.

    mask.png (black and white, 16 bits, 0 and 1, shape in the transparency)  ->  greys 0 .. 255
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..io.image_file import open_image

BoolArray = npt.NDArray[np.bool_]
Greys = npt.NDArray[np.uint8]

#: Levels from black or from white that still count as two-valued, and the share of pixels that may lie between them.
NEAR = 16
BETWEEN = 0.1
#: Of the opaque part of a mask with transparency: less than this neither black nor white, and at least so much of both, and it
#: was painted black and white.
PAINTED_BETWEEN, PAINTED_BOTH = 0.02, 0.02
#: An island is an accident when it has less than this share of the mask's area ...
ISLAND_AREA = 0.005
#: ... and is further from every larger part than this share of the body's longer side, at least so many pixels.
ISLAND_DISTANCE, ISLAND_PIXELS = 0.25, 8


@dataclass(frozen=True)
class StoredMask:
    """A mask as its file has it, turned by its own EXIF orientation, which is 1 in most files."""

    path: Path
    grey: Greys
    """(H, W), 0 .. 255"""
    orientation: int
    notes: tuple[str, ...] = ()
    """How it was read, where that is not plain."""
    brightest: str = ""
    """For the message about an empty mask: "1 of 255", say."""

    def resized(self, size: tuple[int, int], orientation: int) -> StoredMask:
        """At the `size` (width, height) of a picture whose file turns it by `orientation`; lying on its side where the mask's
        proportions fit only so."""
        height, width = self.grey.shape
        if (width, height) == size:
            return self
        upright, lying = width / height / (size[0] / size[1]), width / height / (size[1] / size[0])
        wanted = size[::-1] if orientation >= 5 and abs(np.log(lying)) < abs(np.log(upright)) else size
        grey = np.asarray(Image.fromarray(self.grey).resize(wanted, Image.Resampling.BILINEAR))
        return replace(self, grey=grey)


def open_mask(path: Path) -> StoredMask:
    """Raises InputError for a file that is damaged, too large, or no image."""
    stored = open_image(path)
    image = stored.image
    notes: list[str] = []
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        limit = 65535
    elif image.has_transparency_data:
        levels, limit = _with_transparency(image, path.name, notes), 255
    else:
        levels, limit = np.asarray(image.convert("RGB").convert("L")), 255
    brightest = int(levels.max())
    grey = _to_greys(levels, limit, path.name, notes)
    return StoredMask(path, grey, stored.orientation, tuple(notes), f"{brightest} of {limit}")


def _to_greys(levels: npt.NDArray[Any], limit: int, name: str, notes: list[str]) -> Greys:
    """White is the format's own white; the mask's own brightest level where the mask is two-valued and all below half."""
    brightest = int(levels.max())
    if brightest >= (limit + 1) // 2 or brightest == 0:
        return levels if limit == 255 else np.round(levels / 257).astype(np.uint8)
    if limit > 255 and brightest > 1 and brightest <= 255 and not _two_valued(levels, brightest):
        notes.append(f"{name} has 16 bits, but levels up to {brightest} only: it is read as one of 8 bits")
        return levels.astype(np.uint8)
    if levels.min() == brightest or not _two_valued(levels, brightest):
        return np.round(levels * (255 / limit)).astype(np.uint8)
    notes.append(f"{name} has two levels, {int(levels.min())} and {brightest} of {limit}: the brighter one is read as white")
    return np.where(levels > brightest / 2, 255, 0).astype(np.uint8)


def _two_valued(levels: npt.NDArray[Any], brightest: int) -> bool:
    near = NEAR / 255 * brightest
    allowed = BETWEEN if brightest > NEAR else 0  # the noise of a dark mask has all levels
    return bool(((levels > near) & (levels < brightest - near)).mean() <= allowed)


def _with_transparency(image: Image.Image, name: str, notes: list[str]) -> Greys:
    """The transparency where it holds the shape; else the colours, over black."""
    rgba = image.convert("RGBA")
    channels = np.asarray(rgba)  # (H, W, 4)
    alpha = channels[..., 3]
    if alpha.min() == alpha.max():
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "black"), rgba).convert("L"))
    plain = (channels[..., :3].min(axis=(0, 1)) == channels[..., :3].max(axis=(0, 1))).all()  # one colour throughout
    cut_out = _two_valued(alpha, 255) and not _is_black_and_white(channels[..., :3][alpha >= 128])
    if plain or cut_out:
        notes.append(f"{name} has its shape in the transparency: what is opaque is the asset")
        return alpha
    notes.append(f"{name} has transparency, but its shape is in its colours, read over black")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "black"), rgba).convert("L"))


def _is_black_and_white(colours: Greys) -> bool:
    """(N, 3): painted as a mask, with enough of both."""
    if not len(colours):
        return False
    black, white = (colours <= NEAR).all(1).mean(), (colours >= 255 - NEAR).all(1).mean()
    return bool(black >= PAINTED_BOTH and white >= PAINTED_BOTH and black + white >= 1 - PAINTED_BETWEEN)


# --- islands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Island:
    """A few pixels of a mask far from its body: `box` is left, top, right, bottom, exclusive."""

    box: tuple[int, int, int, int]
    pixels: int


def without_islands(mask: BoolArray) -> tuple[BoolArray, tuple[Island, ...]]:
    """The mask (H, W) without its tiny islands, and these, largest first.

    A part is left out when it has less than 0.5 % of the mask's area and its distance to every larger part is more than a
    quarter of the body's longer side (and 8 pixels), from box to box. What is near the body is its rough edge, and stays.
    """
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count <= 2:
        return mask, ()
    boxes, areas = stats[1:, :4].astype(np.int64), stats[1:, cv2.CC_STAT_AREA].astype(np.int64)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)  # (N, 4): left, top, right, bottom
    body = corners[np.argmax(areas)]
    far = max(ISLAND_PIXELS, ISLAND_DISTANCE * max(body[2] - body[0], body[3] - body[1]))
    tiny = areas < ISLAND_AREA * areas.sum()
    if tiny.all() or not tiny.any():  # all of it is specks: nothing is its body
        return mask, ()
    parts = corners[~tiny]  # at most 200 of them, by their share
    left = np.array([bool(small) and _distance(box, parts) > far for small, box in zip(tiny, corners, strict=True)])
    if not left.any():
        return mask, ()
    kept = mask & ~np.concatenate([[False], left])[labels]
    order = [k for k in np.argsort(-areas, kind="stable") if left[k]]
    return kept, tuple(Island(tuple(int(v) for v in corners[k]), int(areas[k])) for k in order)  # type: ignore[arg-type]


def _distance(box: npt.NDArray[Any], others: npt.NDArray[Any]) -> float:
    """Pixels between a box and the nearest of `others` (N, 4); 0 where they touch or overlap."""
    across = np.maximum(0, np.maximum(others[:, 0] - box[2], box[0] - others[:, 2]))
    along = np.maximum(0, np.maximum(others[:, 1] - box[3], box[1] - others[:, 3]))
    return float(np.hypot(across, along).min())


def islands_in_words(islands: tuple[Island, ...]) -> str:
    """Such as: 3 tiny islands far from its body (1 pixel at (3, 5), ...)."""
    places = [f"{i.pixels} pixel{'s' if i.pixels > 1 else ''} at ({i.box[0]}, {i.box[1]})" for i in islands[:3]]
    more = ", ..." if len(islands) > 3 else ""
    count = f"{len(islands)} tiny islands" if len(islands) > 1 else "a tiny island"
    return f"{count} far from its body ({', '.join(places)}{more})"
