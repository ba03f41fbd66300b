"""The assets' own pictures, cut out of the photo and kept in the bundle: what a candidate is compared with later.

Knows pixels and files. Knows nothing of models.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .instance import DECODE_ERRORS, Instance

FOLDER = "crops"


def cut_out(image: Image.Image, mask: Image.Image, side: int) -> Image.Image:
    """The mask's bounding box as RGBA, transparent outside the mask, its longer side at most `side` pixels."""
    whole = image.convert("RGB")
    whole.putalpha(mask)
    crop = whole.crop(mask.getbbox())
    crop.thumbnail((side, side), Image.Resampling.BOX)
    return crop


def write_crops(folder: Path, instance: Instance, side: int) -> None:
    """`folder/crops/asset0.png`, ..., one for each token."""
    (folder / FOLDER).mkdir()
    for token, mask in zip(instance.tokens, instance.masks, strict=True):
        cut_out(instance.image, mask, side).save(folder / FOLDER / f"{token.strip('<>')}.png")


def read_crop(folder: Path, token: str) -> Image.Image | None:
    """RGBA; None for a bundle that has none (an older one), or one that is damaged: the ranking then does without."""
    path = folder / FOLDER / f"{token.strip('<>')}.png"
    try:
        with Image.open(path, formats=["PNG"]) as image:
            crop = image.convert("RGBA")
    except DECODE_ERRORS:
        return None
    return crop if np.asarray(crop)[..., 3].any() else None
