"""An asset's own picture, cut out of the photo that it was learned from: what a candidate is compared with."""

from __future__ import annotations

from PIL import Image


def cut_out(image: Image.Image, mask: Image.Image, side: int) -> Image.Image:
    """The mask's bounding box as RGBA, transparent outside the mask, its longer side at most `side` pixels."""
    whole = image.convert("RGB")
    whole.putalpha(mask)
    crop = whole.crop(mask.getbbox())
    crop.thumbnail((side, side), Image.Resampling.BOX)
    return crop
