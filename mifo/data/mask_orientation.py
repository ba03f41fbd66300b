"""Masks of a photo that its camera stored turned: drawn on the upright picture, or on the pixels as they lie in the file?

Editors turn such photos upright, many scripts do not. Where the sizes do not tell (upside down, mirrored, square), the masks'
outlines are laid over the picture's edges both ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from ..errors import InputError
from ..io.image_file import TURNS, turn_in_words
from .mask_file import StoredMask

FloatArray = npt.NDArray[np.float32]

READINGS = ("upright", "stored")
SIDE = 384  # pixels of the longer side at which outlines and edges are compared
BLUR = 1.5  # standard deviation, pixels at that size: how far a hand-drawn outline may miss the edge
#: The better reading's outline must lie on edges so many times as strong as the other's, and as those at a usual place ...
MARGIN = 1.5
#: ... and stronger than all but this share of the shifts below: texture alone is no fit.
CHANCE = 0.05
SHIFTS = [(round(r * np.sin(a)), round(r * np.cos(a))) for r in (16, 28, 44, 64) for a in np.arange(10) * np.pi / 5 + r]
LEFT_INSIDE = 0.5  # share of the outline that a shift must leave inside the picture to count


def turned(mask: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """A mask drawn on the stored pixels, as it lies on the upright picture."""
    return np.asarray(Image.fromarray(mask).transpose(TURNS[orientation])) if orientation in TURNS else mask


def upright_masks(image: Image.Image, name: str, orientation: int, masks: Sequence[StoredMask],
                  wanted: str = "auto") -> tuple[list[npt.NDArray[np.uint8]], tuple[str, ...]]:  # fmt: skip
    """Each mask's greys as they lie on the upright `image` (RGB), and notes on what was found out.

    `orientation` is the photo's, 1 to 8; `wanted` is 'upright', 'stored', or 'auto': by the sizes, else by the picture's
    edges. A mask that fits in no way is handed back as it is. Raises InputError when nothing tells, or the size forbids
    what is wanted.
    """
    if orientation not in TURNS:
        return [mask.grey for mask in masks], ()
    readings = [_by_size(image, mask, orientation, wanted) for mask in masks]
    open_ones = [mask for mask, reading in zip(masks, readings, strict=True) if reading == "either"]
    notes = []
    if open_ones:
        found = fitting_reading(image, [mask.grey >= 128 for mask in open_ones], orientation)
        files = _names(open_ones)
        if found is None:
            raise InputError(
                f"{name} is stored {turn_in_words(orientation)} (EXIF orientation {orientation}), and {files} may be drawn on "
                "the upright picture or on the stored pixels: neither fits its edges clearly better. Say --mask-orientation "
                "upright or --mask-orientation stored, or save the photo upright and draw on that."
            )
        readings = [found if reading == "either" else reading for reading in readings]
        if any((turned(m.grey, orientation) != m.grey).any() for m in open_ones):
            place = "the upright picture" if found == "upright" else "the pixels as they are stored"
            notes.append(f"{files}: drawn on {place}, by the edges in {name}; --mask-orientation says otherwise")
    moved = [m for m, reading in zip(masks, readings, strict=True) if reading == "stored"]
    if moved:
        notes.append(f"{_names(moved)}: turned with {name}, as drawn on its stored pixels")
    return [turned(m.grey, orientation) if r == "stored" else m.grey for m, r in zip(masks, readings, strict=True)], tuple(notes)


def _names(masks: Sequence[StoredMask]) -> str:
    names = [mask.path.name for mask in masks]
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more masks"


def _by_size(image: Image.Image, mask: StoredMask, orientation: int, wanted: str) -> str:
    """'upright', 'stored', or 'either' when the size allows both."""
    size = mask.grey.shape[::-1]
    fits = {"upright": size == image.size, "stored": (size[::-1] if orientation >= 5 else size) == image.size}
    if wanted in READINGS and fits["upright"] != fits["stored"] and not fits[wanted]:
        raise InputError(
            f"--mask-orientation is {wanted}, but {mask.path} is {size[0]}x{size[1]} and fits the other way only; leave it out."
        )
    if not all(fits.values()):
        return "stored" if fits["stored"] else "upright"  # neither: its size is complained about where it is used
    if wanted in READINGS:
        return wanted
    return "upright" if mask.orientation != 1 else "either"  # a mask that says its own turn was turned by it


def fitting_reading(image: Image.Image, masks: Sequence[npt.NDArray[np.bool_]], orientation: int) -> str | None:
    """'upright' or 'stored': how the outlines of `masks` (H, W), all in the same way, lie on the edges of `image`.

    None when neither is clear: the better one must be MARGIN times the other and the median of the places beside it, and beat
    all but CHANCE of these.
    """
    both = [_small(mask, image.size) for mask in masks], [
        _small(turned(mask.astype(np.uint8) * 255, orientation) > 0, image.size) for mask in masks
    ]
    if all(np.array_equal(a, b) for a, b in zip(*both, strict=True)):
        return "upright"  # symmetrical: nothing to choose
    edges = _gradients(np.asarray(image.resize(_small_size(image.size), Image.Resampling.BOX), np.float32))
    found = [_fit(edges, [_gradients(mask[..., None]) for mask in kind]) for kind in both]
    for reading, (score, usual, chance), (other, _, _) in zip(READINGS, found, found[::-1], strict=True):
        if score > MARGIN * max(other, usual) and chance <= CHANCE:
            return reading
    return None


def _small_size(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _small(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> FloatArray:
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize(_small_size(size), Image.Resampling.BOX), np.float32)


def _gradients(pixels: FloatArray) -> FloatArray:
    """(2, h, w, C): d/dy and d/dx, smoothed."""
    orders = ((1, 0, 0), (0, 1, 0))
    return np.stack([ndimage.gaussian_filter(pixels, (BLUR, BLUR, 0), order=o, mode="nearest") for o in orders])


def _fit(edges: FloatArray, outlines: Sequence[FloatArray]) -> tuple[float, float, float]:
    """The mean gradient of the picture across the masks' outlines; its median over shifted places, and the share of these
    with as much of it."""
    scores = np.zeros(1 + len(SHIFTS))
    for k, shift in enumerate([(0, 0), *SHIFTS]):
        across = [_across(edges, outline[..., 0], shift) for outline in outlines]
        kept = [a for a in across if a is not None]
        scores[k] = np.mean(kept) if len(kept) == len(across) else np.nan
    beside = scores[1:][~np.isnan(scores[1:])]
    if np.isnan(scores[0]) or len(beside) < 8:
        return 0.0, 0.0, 1.0
    return float(scores[0]), float(np.median(beside)), float((beside >= scores[0]).mean())


def _across(edges: FloatArray, outline: FloatArray, shift: tuple[int, int]) -> float | None:
    """Mean over one outline, moved by `shift`, of the picture's gradient across it; None when too much of it is moved out."""
    strength = np.hypot(outline[0], outline[1])  # (h, w)
    rows, columns = np.nonzero(strength > 0.05 * strength.max())
    weights = strength[rows, columns]
    if not weights.size or weights.sum() == 0:
        return None
    there = rows + shift[0], columns + shift[1]
    inside = (there[0] >= 0) & (there[0] < edges.shape[1]) & (there[1] >= 0) & (there[1] < edges.shape[2])
    if weights[inside].sum() < LEFT_INSIDE * weights.sum():
        return None
    normal = outline[:, rows[inside], columns[inside]]  # (2, n), as long as its weight
    slope = edges[:, there[0][inside], there[1][inside]]  # (2, n, C)
    across = np.linalg.norm((slope * normal[..., None]).sum(0), axis=-1)
    return float(across.sum() / weights[inside].sum())
