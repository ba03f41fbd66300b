"""A picture's embedded colour profile (ICC): its numbers as sRGB, and sRGB as its numbers, by LittleCMS through Pillow."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageCms

#: Levels of 255 by which a profile may differ from sRGB and still be taken as sRGB: makers round its curve differently.
SAME = 2
BLACK_POINT_COMPENSATION = 0x2000  # lcms2.h; Pillow names it since 10.3 only
#: Bytes above which a PNG's profile is not read again, by Pillow among others.
MAX_WRITTEN = 1 << 20
#: What Pillow raises for profiles that are broken, or do not fit the pixels; ImportError: built without LittleCMS.
BROKEN = (ImageCms.PyCMSError, OSError, ValueError, TypeError, ImportError)


@dataclass(frozen=True)
class ColourProfile:
    """A profile that reads. `mode` is the Pillow mode of the numbers that it describes: RGB, L or CMYK."""

    content: bytes
    mode: str

    @cached_property
    def _opened(self) -> Any:
        return ImageCms.getOpenProfile(io.BytesIO(self.content))

    @cached_property
    def _forward(self) -> Any:
        return _transform(self._opened, _srgb(), self.mode, "RGB")

    @cached_property
    def _backward(self) -> Any:
        return _transform(_srgb(), self._opened, "RGB", self.mode)

    @cached_property
    def is_srgb(self) -> bool:
        """True when its numbers mean what sRGB's mean, within SAME levels: there is nothing to convert."""
        if self.mode == "CMYK":
            return False
        levels = np.linspace(0, 255, 9).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        probe = Image.fromarray(colours if self.mode == "RGB" else colours[..., 0].copy())
        there = np.asarray(self.to_srgb(probe)).astype(int)
        return bool(np.abs(there - np.asarray(probe.convert("RGB"))).max() <= SAME)

    @cached_property
    def can_be_written(self) -> bool:
        """True when an RGB picture can keep it: sRGB can be converted into it, and a PNG can hold it."""
        if self.mode != "RGB" or len(self.content) > MAX_WRITTEN:
            return False
        try:
            return self._backward is not None
        except BROKEN:
            return False

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """`image` has the profile's mode; the result is RGB."""
        return _applied(image, self._forward)

    def from_srgb(self, image: Image.Image) -> Image.Image:
        """RGB to the profile's own numbers. Colours that it lacks become its nearest."""
        return _applied(image, self._backward)


def read_profile(content: bytes, mode: str) -> ColourProfile | None:
    """The profile of an image of this mode (RGB, L or CMYK); None for one that is broken or describes another kind of pixels."""
    profile = ColourProfile(content, mode)
    try:
        return profile if profile._forward is not None else None
    except BROKEN:
        return None


def _applied(image: Image.Image, transform: Any) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None only when asked to convert in place
    converted.info.pop("icc_profile", None)
    return converted


def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


def _transform(source: Any, target: Any, mode: str, result: str) -> Any:
    """Relative colorimetric with black point compensation, as photo editors convert by default."""
    return ImageCms.buildTransform(
        source, target, mode, result, ImageCms.Intent.RELATIVE_COLORIMETRIC, BLACK_POINT_COMPENSATION  # type: ignore[arg-type]
    )
