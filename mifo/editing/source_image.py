"""A picture to be edited and its mask, as files: what the camera wrote beside the pixels goes in, and what is safe comes out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..data.instance import MIN_SIDE
from ..data.mask_file import open_mask
from ..data.mask_orientation import upright_masks
from ..errors import InputError
from ..io.colour_profile import ColourProfile
from ..io.image_file import StoredImage, open_image, own_colours
from ..io.image_metadata import exif_to_write, xmp_to_write

BoolArray = npt.NDArray[np.bool_]
MODE_NAMES = {"L": "grey", "LA": "grey", "I;16": "grey", "1": "black and white"}


@dataclass(frozen=True)
class SourceImage:
    """An upright RGB picture, and what is saved with it."""

    image: Image.Image
    """In sRGB. Transparent parts on white."""
    transparent: Image.Image | None
    """RGBA, as it was stored; None for an opaque picture."""
    exif: bytes
    """Without a turn: the pixels are upright. Empty when there is none to write."""
    icc_profile: bytes | None
    notes: tuple[str, ...]
    """What cannot survive, for the user."""
    orientation: int = 1
    """The EXIF turn that the file's pixels had."""
    profile: ColourProfile | None = None
    """Of the saved picture, where that is not sRGB."""
    stored: Image.Image | None = None
    """The picture in its own profile's numbers, RGB; None where these are `image`."""
    xmp: bytes = b""

    def save(self, path: Path, image: Image.Image, edited: BoolArray, **options: Any) -> None:
        """Writes `image`, an edit of this picture in sRGB, as PNG in the picture's own profile. Pixels that did not change
        have their own numbers, not those of a conversion there and back. A picture with transparency is opaque where
        `edited` (H, W), and as it was stored everywhere else."""
        image = self._in_own_colours(image)
        if self.transparent is not None:
            image = Image.fromarray(np.where(edited[..., None], np.asarray(image.convert("RGBA")), np.asarray(self.transparent)))
        if self.xmp:
            info = options.setdefault("pnginfo", PngInfo())
            info.add_itxt("XML:com.adobe.xmp", self.xmp.decode("utf-8", "replace"))
        image.save(path, "PNG", exif=self.exif, icc_profile=self.icc_profile, **options)

    def _in_own_colours(self, image: Image.Image) -> Image.Image:
        if self.profile is None or self.stored is None:
            return image
        changed = (np.asarray(image) != np.asarray(self.image)).any(-1)  # (H, W)
        result = self.stored.copy()
        box = Image.fromarray(changed).getbbox()
        if box is not None:
            result.paste(self.profile.from_srgb(image.crop(box)), box[:2], Image.fromarray(changed).crop(box))
        return result


def load_source_image(path: Path, metadata: str = "safe") -> SourceImage:
    """Any picture that can be read: the first frame, 8 bits, RGB, upright, in sRGB.

    `metadata` says what of the file's is written into its edits: 'safe' (date, camera, exposure), 'keep' (all EXIF and XMP
    data) or 'strip' (none); the colour profile always stays, because the pixels need it. Raises InputError when there is no
    picture, or it is damaged, too large, or smaller than 16 pixels.
    """
    if not os.path.isfile(path):
        raise InputError(f"There is no picture {str(path)[:300]}; give the path of a JPEG, PNG or WebP file.")
    file = open_image(path)
    own, profile = own_colours(file), file.profile()
    image = profile.to_srgb(own) if profile else own.convert("RGB")
    if min(image.size) < MIN_SIDE:
        size = f"{image.width}x{image.height}"
        raise InputError(f"{path} is {size} pixels, but each side needs at least {MIN_SIDE}; use a larger picture.")
    keeps = profile is not None and profile.can_be_written
    named = file.icc_profile if keeps or (profile is None and file.colour_mode == "RGB" and not _broken(file)) else None
    exif, left_out = _exif(file, metadata)
    return SourceImage(
        image=image,
        transparent=_transparent(file, profile if not keeps else None),
        exif=exif,
        icc_profile=named or None,
        notes=(*file.notes(), *_losses(file, profile), *left_out),
        orientation=file.orientation,
        profile=profile if keeps else None,
        stored=own if keeps else None,
        xmp=xmp_to_write(file.xmp, metadata),
    )


def _broken(file: StoredImage) -> bool:
    return any("cannot be read" in note for note in file.notes())


def _exif(file: StoredImage, metadata: str) -> tuple[bytes, tuple[str, ...]]:
    """What is written, and notes on what is not."""
    try:
        kept, left_out = exif_to_write(file.exif, metadata)
    except ValueError:
        return b"", (f"{file.path} has EXIF data that cannot be written again; it is left out",)
    left_out = (*left_out, *(["XMP data"] if file.xmp and metadata == "safe" else []))
    if not left_out:
        return kept, ()
    words = ", ".join(left_out)
    return kept, (f"{file.path} says more than the edit will: its {words} stay out; --metadata keep takes all over",)


def _png_bits(path: Path) -> int:
    """Bits a channel in a PNG's header; PIL does not tell of colours. 8 for other files."""
    with path.open("rb") as file:
        header = file.read(25)
    return header[24] if header.startswith(b"\x89PNG") and len(header) == 25 else 8


def _transparent(file: StoredImage, converted_by: ColourProfile | None) -> Image.Image | None:
    """None as well where the transparency is there but hides nothing. A profile that the result cannot keep is applied."""
    if not file.image.has_transparency_data:
        return None
    rgba = file.image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return None
    if converted_by is not None:
        colours = converted_by.to_srgb(rgba.convert("RGB").convert(file.colour_mode))
        colours.putalpha(alpha)
        return colours
    return rgba


def _losses(file: StoredImage, profile: ColourProfile | None) -> tuple[str, ...]:
    path, mode, notes = file.path, file.image.mode, []
    if file.animated:
        notes.append(f"{path} is an animation; its first frame is edited")
    if file.colour_mode == "CMYK" or (profile is not None and file.colour_mode == "L"):
        notes.append(f"{path} is {MODE_NAMES.get(mode, mode)}; the result is RGB, in sRGB, without its colour profile")
    elif profile is not None and not profile.can_be_written:
        notes.append(f"{path} has a colour profile that can only be read; the result is in sRGB, without it")
    if _png_bits(path) == 16:
        notes.append(f"{path} has more than 8 bits a channel; the result has 8")
    return tuple(notes)


def load_edit_mask(path: Path, image: Image.Image, name: str, resize: bool = False, invert: bool = False,
                   orientation: int = 1, drawn: str = "auto") -> tuple[BoolArray, tuple[str, ...]]:  # fmt: skip
    """True where the picture may change, (H, W), greys above half counting as white; and notes on how the file was read.

    `orientation` is the EXIF turn that the picture's pixels had in their file, and `drawn` says whether the mask is drawn on
    the 'upright' picture, on the pixels as 'stored', or 'auto': as it fits. Raises InputError when the mask has another size
    and `resize` is not set, or nothing is left to edit.
    """
    if not os.path.isfile(path):
        raise InputError(f"There is no mask {str(path)[:300]}; give the path of a PNG that is white where it counts.")
    file = open_mask(path)
    if resize:
        file = file.resized(image.size, orientation)
    (grey,), turns = upright_masks(image, name, orientation, [file], drawn)
    height, width = grey.shape
    if (width, height) != image.size:
        turned = " It fits when turned: draw it on the upright picture." if (height, width) == image.size else ""
        raise InputError(
            f"{path} is {width}x{height} but {name} is {image.width}x{image.height}; save the mask at the picture's "
            f"size, or add --resize-mask.{turned}"
        )
    inside = grey >= 128
    if invert:
        inside = ~inside
    if not inside.any():
        what = "white all over, and --invert-mask leaves nothing to edit; paint what is to be kept white, the rest black"
        empty = f"empty: its brightest pixel is {file.brightest}; paint what is to be edited white (255) on black"
        raise InputError(f"{path} is {what if invert else empty}.")
    return inside, (*file.notes, *turns)
