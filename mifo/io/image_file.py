"""An image file, read: damage and sizes, the first frame, the EXIF turn, the colour profile.

    path  ->  StoredImage (upright, own mode, own colours)  ->  RGB, sRGB
"""

from __future__ import annotations

import os
import struct
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ..errors import InputError
from .colour_profile import ColourProfile, read_profile
from .image_metadata import ORIENTATION, check_exif, check_metadata
from .read_files import UnusableFile, check_regular

# Only formats that PIL decodes by itself; among the others is EPS, which runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_MEGAPIXELS = 50
MAX_IMAGE_BYTES = 1 << 28
#: What PIL's decoders raise for damaged files, beside its own UnidentifiedImageError (an OSError).
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, struct.error)
#: What turns stored pixels upright, by the EXIF orientation (EXIF 2.32, tag 0x0112).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class StoredImage:
    """A file's first frame, upright, in the file's own mode and colours."""

    path: Path
    image: Image.Image
    orientation: int
    """1 to 8: the EXIF turn that the pixels had in the file."""
    format: str
    animated: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)
    """PIL's `info`: "exif", "xmp", "icc_profile", ... where the file has them."""

    @property
    def exif(self) -> bytes:
        return _as_bytes(self.metadata.get("exif"))

    @property
    def xmp(self) -> bytes:
        return _as_bytes(self.metadata.get("xmp") or self.metadata.get("XML:com.adobe.xmp"))

    @property
    def icc_profile(self) -> bytes:
        return _as_bytes(self.metadata.get("icc_profile"))

    @property
    def colour_mode(self) -> str:
        """The kind of numbers that a profile of this image describes: RGB, L or CMYK."""
        if self.image.mode == "CMYK":
            return "CMYK"
        return "L" if self.image.mode in ("1", "L", "LA", "La", "F") or self.image.mode.startswith("I") else "RGB"

    def profile(self) -> ColourProfile | None:
        """None as well for a profile that is broken, or says nothing but sRGB."""
        found = read_profile(self.icc_profile, self.colour_mode) if self.icc_profile else None
        return found if found and not found.is_srgb else None

    def notes(self) -> tuple[str, ...]:
        """What a user should know of how the file is read."""
        found = []
        if self.orientation != 1:
            found.append(f"{self.path} is stored {turn_in_words(self.orientation)} (EXIF orientation {self.orientation}) and was "
                         "turned upright")  # fmt: skip
        if self.icc_profile and read_profile(self.icc_profile, self.colour_mode) is None:
            found.append(f"{self.path} has a colour profile that cannot be read; its colours are taken as sRGB")
        return tuple(found)


def turn_in_words(orientation: int) -> str:
    return {3: "upside down", 6: "lying on its left side", 8: "lying on its right side"}.get(orientation, "mirrored")


def open_image(path: Path) -> StoredImage:
    """Decodes the first frame. Raises InputError for a file that is missing, damaged, too large, or no image."""
    try:
        check_regular(path, MAX_IMAGE_BYTES)
        check_metadata(path)
        with warnings.catch_warnings():  # PIL's own limit is below ours, so its warnings say nothing
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                megapixels = image.width * image.height / 1e6
                if megapixels <= MAX_MEGAPIXELS:
                    return _decoded(path, image)
    except Image.DecompressionBombError:
        megapixels = float("inf")
    except UnusableFile as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); put a JPEG, PNG or WebP file there.") from None
    except (MemoryError, InputError):
        raise
    except Exception as error:  # damaged files make PIL's decoders raise TypeError, struct.error, IndexError, ...
        refuse_file(path, error)
    shown = f"{megapixels:.0f}" if megapixels < float("inf") else "far too many"
    raise InputError(f"{path} has {shown} megapixels, but at most {MAX_MEGAPIXELS} are read; make it smaller.")


def _decoded(path: Path, image: Any) -> StoredImage:
    image.load()
    check_exif(path, _as_bytes(image.info.get("exif")).removeprefix(b"Exif\0\0"))
    if len(image.info.get("Raw profile type exif", "")) > 1 << 17:  # EXIF as text; PIL parses it too
        image.info.pop("Raw profile type exif")
    orientation = _orientation(image)
    turn = TURNS.get(orientation)
    upright = image.transpose(turn) if turn is not None else image.copy()
    return StoredImage(path, upright, orientation, image.format, _is_animated(image), dict(image.info))


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data says nothing; the pixels are whole
        return 1
    return value if value in TURNS else 1


def _is_animated(image: Any) -> bool:
    if image.format not in ("GIF", "PNG", "WEBP"):
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except DECODE_ERRORS:  # a damaged second frame
        return True


def _as_bytes(value: Any) -> bytes:
    return value.encode("utf-8", "replace") if isinstance(value, str) else bytes(value or b"")


def refuse_file(path: Path, error: BaseException) -> NoReturn:
    """Raises the InputError for a file that cannot be read or decoded."""
    if isinstance(error, UnidentifiedImageError):
        raise InputError(f"{path} is not an image that can be read; save it again as PNG or JPEG.") from None
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    raise InputError(f"{path} cannot be read ({reason}); it may be damaged or cut short: save it again.") from None


def to_8_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    """16-bit greys, which PIL's own conversion would clip at 255."""
    greys = np.asarray(image).astype(np.float32).clip(0, 65535)  # (H, W)
    return np.round(greys / 257).astype(np.uint8)


def own_colours(stored: StoredImage) -> Image.Image:
    """The numbers that a profile describes, 8 bits, opaque: RGB, L or CMYK. Transparent parts lie on white."""
    image = stored.image
    if image.mode.startswith("I"):
        return Image.fromarray(to_8_bit(image))
    if image.has_transparency_data:
        opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return opaque.convert("RGB").convert(stored.colour_mode)
    return image.convert(stored.colour_mode)


def to_srgb(stored: StoredImage) -> Image.Image:
    """RGB, in sRGB by the file's profile; without one its numbers are taken as sRGB."""
    profile = stored.profile()
    image = own_colours(stored)
    return profile.to_srgb(image) if profile else image.convert("RGB")


def load_image(path: Path) -> Image.Image:
    """Any picture that can be read, upright, RGB, in sRGB by its colour profile.

    Raises InputError when there is none, or it is damaged or too large.
    """
    if not os.path.isfile(path):
        raise InputError(f"There is no picture {str(path)[:300]}; give the path of a JPEG, PNG or WebP file.")
    return to_srgb(open_image(path))
