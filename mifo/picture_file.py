"""A picture to be edited and its mask, as files: what the camera wrote beside the pixels goes in and comes out again.

Knows files and pixels. Knows nothing of models or of what is edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from .errors import InputError
from .instance import DECODE_ERRORS, FORMATS, MIN_SIDE, load_grey, load_image

BoolArray = npt.NDArray[np.bool_]
#: modes whose colour profile still fits once the picture is RGB
RGB_MODES = ("RGB", "RGBA", "P", "PA")
MODE_NAMES = {"L": "grey", "LA": "grey", "I;16": "grey", "1": "black and white"}


@dataclass(frozen=True)
class Picture:
    """An upright RGB picture, and what is saved with it."""

    image: Image.Image
    """Transparent parts on white."""
    transparent: Image.Image | None
    """RGBA, as it was stored; None for an opaque picture."""
    exif: bytes
    """Without an orientation: the pixels are upright. Empty when there is none."""
    icc_profile: bytes | None
    notes: tuple[str, ...]
    """What cannot survive, for the user."""

    def save(self, path: Path, image: Image.Image, edited: BoolArray, **options: Any) -> None:
        """Writes `image`, an edit of this picture, as PNG. One with transparency is opaque where `edited` (H, W), and as it was
        stored everywhere else."""
        if self.transparent is not None:
            image = Image.fromarray(np.where(edited[..., None], np.asarray(image.convert("RGBA")), np.asarray(self.transparent)))
        image.save(path, "PNG", exif=self.exif, icc_profile=self.icc_profile, **options)


def load_picture(path: Path) -> Picture:
    """Any picture that can be read: the first frame, 8 bits, RGB, upright.

    Raises InputError when there is none, or it is damaged, too large, or smaller than 16 pixels.
    """
    image = load_image(path)
    if min(image.size) < MIN_SIDE:
        size = f"{image.width}x{image.height}"
        raise InputError(f"{path} is {size} pixels, but each side needs at least {MIN_SIDE}; use a larger picture.")
    try:
        with Image.open(path, formats=FORMATS) as stored:
            notes = _losses(path, stored)
            exif = stored.getexif()
            profile = stored.info.get("icc_profile") if stored.mode in RGB_MODES else None
            transparent = _transparent(stored)
    except DECODE_ERRORS as error:
        raise InputError(f"{path} cannot be read ({error}); save it again.") from None
    exif.pop(ExifTags.Base.Orientation, None)
    try:
        kept = exif.tobytes() if len(exif) else b""
    except Exception:  # what a camera wrote may be read and still be too odd to write; PIL then raises many kinds
        kept, notes = b"", (*notes, f"{path} has EXIF data that cannot be written again; it is left out")
    return Picture(image, transparent, kept, profile, notes)


def _png_bits(path: Path) -> int:
    """Bits a channel in a PNG's header; PIL does not tell of colours. 8 for other files."""
    with path.open("rb") as file:
        header = file.read(25)
    return header[24] if header.startswith(b"\x89PNG") and len(header) == 25 else 8


def _transparent(stored: Image.Image) -> Image.Image | None:
    """None as well where the transparency is there but hides nothing."""
    if not stored.has_transparency_data:
        return None
    upright = ImageOps.exif_transpose(stored.convert("RGBA"))
    return upright if np.asarray(upright)[..., 3].min() < 255 else None


def _losses(path: Path, stored: Image.Image) -> tuple[str, ...]:
    notes = []
    if stored.format in ("GIF", "PNG", "WEBP") and getattr(stored, "n_frames", 1) > 1:
        notes.append(f"{path} is an animation; its first frame is edited")
    if stored.mode == "CMYK" or (stored.mode not in RGB_MODES and stored.info.get("icc_profile")):
        notes.append(f"{path} is {MODE_NAMES.get(stored.mode, stored.mode)}; the result is RGB, without its colour profile")
    if _png_bits(path) == 16:
        notes.append(f"{path} has more than 8 bits a channel; the result has 8")
    return tuple(notes)


def load_edit_mask(path: Path, picture: Image.Image, name: str, resize: bool = False, invert: bool = False) -> BoolArray:
    """True where the picture may change, (H, W); greys above half count as white.

    Raises InputError when the mask has another size and `resize` is not set, or nothing is left to edit.
    """
    grey = load_grey(path)
    height, width = grey.shape
    if (width, height) != picture.size:
        if not resize:
            turned = " It fits when turned: draw it on the upright picture." if (height, width) == picture.size else ""
            raise InputError(
                f"{path} is {width}x{height} but {name} is {picture.width}x{picture.height}; save the mask at the picture's "
                f"size, or add --resize-mask.{turned}"
            )
        grey = np.asarray(Image.fromarray(grey).resize(picture.size, Image.Resampling.BILINEAR))
    inside = grey >= 128
    if invert:
        inside = ~inside
    if not inside.any():
        what = "white all over, and --invert-mask leaves nothing to edit; paint what is to be kept white, the rest black"
        empty = f"empty: its brightest pixel is {grey.max()} of 255; paint what is to be edited white (255) on black"
        raise InputError(f"{path} is {what if invert else empty}.")
    return inside
