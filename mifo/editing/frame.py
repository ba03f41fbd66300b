"""Where an edit happens: a square crop around the mask, scaled to the model's resolution, and back again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from ..boxes import Box, bounds
from ..errors import InputError

BoolArray = npt.NDArray[np.bool_]
#: The crop's side over the mask's longer side: the thing keeps half of the crop, its surroundings the rest.
CONTEXT = 2.0
#: The part of the schedule over which a dilated mask shrinks to the true one; the rest runs with the true mask.
SHRINKING = 0.75


@dataclass(frozen=True)
class EditFrame:
    """A crop of a picture, `(left, top, right, bottom)` pixels, that stands centred on a square canvas."""

    crop: tuple[int, int, int, int]
    side: int
    """Pixels of the picture along the canvas; the crop's longer side."""
    resolution: int
    """Pixels of the canvas, the model's own."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the crop."""
        return self.crop[2] - self.crop[0], self.crop[3] - self.crop[1]

    @property
    def scale(self) -> float:
        """Canvas pixels per picture pixel."""
        return self.resolution / self.side

    def _placed(self) -> tuple[int, int, int, int]:
        """The crop's left, top, right, bottom on the canvas."""
        width, height = (max(1, round(v * self.scale)) for v in self.size)
        left, top = (self.resolution - width) // 2, (self.resolution - height) // 2
        return left, top, left + width, top + height

    def to_canvas(self, image: Image.Image, resample: Image.Resampling = Image.Resampling.LANCZOS,
                  pad: str = "edge") -> npt.NDArray[np.uint8]:  # fmt: skip
        """The crop on the canvas, (resolution, resolution[, 3]). A picture's own edge is repeated where the crop ends."""
        left, top, right, bottom = self._placed()
        inside = np.asarray(image.crop(self.crop).resize((right - left, bottom - top), resample))
        margins = [(top, self.resolution - bottom), (left, self.resolution - right), (0, 0)][: inside.ndim]
        return np.pad(inside, margins, mode="edge" if pad == "edge" else "constant")

    def coverage(self, mask: BoolArray, size: int) -> npt.NDArray[np.float64]:
        """How much of each pixel of a (size, size) canvas the mask covers, in [0, 1]; 0 outside the crop."""
        grey = Image.fromarray(mask.astype(np.uint8) * 255)
        exact = self.to_canvas(grey, Image.Resampling.BOX, pad="zero")
        return np.asarray(Image.fromarray(exact).resize((size, size), Image.Resampling.BOX)) / 255.0

    def from_canvas(self, canvas: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """(resolution, resolution, 3) -> the crop at the picture's own size, (h, w, 3), float."""
        left, top, right, bottom = self._placed()
        part = np.ascontiguousarray(canvas[top:bottom, left:right]).astype(np.float32)
        if (right - left, bottom - top) == self.size:
            return part
        channels = [Image.fromarray(part[..., c]).resize(self.size, Image.Resampling.BICUBIC) for c in range(3)]
        return np.stack([np.asarray(c) for c in channels], axis=-1)

    def box_on_canvas(self, box: Box, width: int, height: int) -> Box | None:
        """A box of the whole picture (width x height pixels) as one of the canvas; None when it lies outside the crop."""
        left, top, _, _ = self._placed()
        x0, x1 = ((v * width - self.crop[0]) * self.scale + left for v in (box.x0, box.x1))
        y0, y1 = ((v * height - self.crop[1]) * self.scale + top for v in (box.y0, box.y1))
        x0, y0, x1, y1 = (min(max(v / self.resolution, 0.0), 1.0) for v in (x0, y0, x1, y1))
        return Box(x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def make_frame(mask: BoolArray, resolution: int) -> EditFrame:
    """The crop around what is True in `mask` (H, W): twice its longer side, at least the model's resolution where the
    picture is that large, never beyond the picture."""
    height, width = mask.shape
    left, top, right, bottom = bounds(mask)
    longer = max(right - left, bottom - top)
    side = min(max(round(CONTEXT * longer), resolution), max(width, height))
    crop_width, crop_height = min(side, width), min(side, height)
    x = min(max((left + right - crop_width) // 2, 0), width - crop_width)
    y = min(max((top + bottom - crop_height) // 2, 0), height - crop_height)
    return EditFrame((x, y, x + crop_width, y + crop_height), side, resolution)


def latent_mask(frame: EditFrame, mask: BoolArray, latent_side: int) -> BoolArray:
    """(latent_side, latent_side): True where the mask covers at least half of a latent pixel.

    Raises InputError when it covers none, and says what would work.
    """
    inside = frame.coverage(mask, latent_side) >= 0.5
    if not inside.any():
        left, top, right, bottom = bounds(mask)
        needed = int(np.ceil(2 * frame.side / latent_side))
        raise InputError(
            f"the mask is smaller than one latent pixel: it is {right - left}x{bottom - top} pixels, {int(mask.sum())} of them "
            f"white, and here the model works in steps of {frame.side / latent_side:.3g} pixels; make it at least "
            f"{needed}x{needed} pixels, or enlarge the picture and the mask"
        )
    return inside


def thickness(mask: BoolArray) -> int:
    """Pixels along the largest square that fits into a mask: a bar of n pixels has n."""
    side = 0
    while ndimage.binary_erosion(mask, np.ones((side + 1, side + 1))).any():
        side += 1
    return side


def shrinking_masks(mask: BoolArray, dilation: int, steps: int) -> list[BoolArray]:
    """One mask for each step: dilated by `dilation` pixels at first, linearly less over three quarters of the steps, then
    the true mask. Each holds the next one (Blended Latent Diffusion, section 4.3)."""
    masks = []
    for step in range(steps):
        left = 1 - step / max(1e-9, SHRINKING * steps)
        grown = int(np.ceil(dilation * left)) if left > 0 and step < steps - 1 else 0
        masks.append(ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=grown) if grown else mask)
    return masks


def within_length(dilated: BoolArray, mask: BoolArray) -> BoolArray:
    """`dilated` without what lies beyond the ends of `mask` along its longer side: as long as the mask, only thicker."""
    left, top, right, bottom = bounds(mask)
    near = np.zeros_like(mask)
    if bottom - top > right - left:
        near[top:bottom] = True
    elif right - left > bottom - top:
        near[:, left:right] = True
    else:
        near[:] = True
    return dilated & near
