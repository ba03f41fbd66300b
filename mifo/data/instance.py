"""An instance folder, read and checked: one image and one mask for each asset in it, and further photos of the same assets.

    folder/ img.jpg, mask0.png, mask1.png, ..., words.txt (optional)  ->  Instance  ->  FittedInstance
            img1.jpg, img1_mask0.png, ... (optional; an asset that this photo does not show has no mask there)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageStat

from ..errors import InputError
from ..io.image_file import MAX_IMAGE_BYTES, open_image, refuse_file, to_srgb
from ..io.read_files import UnusableFile, check_regular, leads_out, read_regular
from ..prompts import BACKGROUND_TOKEN, asset_token, check_characters
from .mask_file import StoredMask, open_mask
from .mask_orientation import upright_masks

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_NAMES = "img.jpg, img.jpeg, img.png or img.webp"
#: Files and folders that systems and archivers leave beside a user's own; hidden ones are skipped as well.
SYSTEM_NAMES = ("__macosx", "thumbs.db", "desktop.ini", "system volume information", "$recycle.bin", "@eadir", "lost+found")
MIN_SIDE = 16
MAX_MASK_MEGAPIXELS = 500  # of all masks together
MAX_WORDS_BYTES = 1 << 16
MAX_OVERLAP = 0.5
MAX_ASSETS = 64
MAX_PHOTOS = 32  # besides the first
MAX_TRUTH_BYTES = 1 << 20  # of what a drawn scene says of itself
IMAGE_NAME_PATTERN = re.compile(r"img\.(jpe?g|png|webp)", re.IGNORECASE)
MASK_PATTERN = re.compile(r"mask([0-9]+)\.png", re.IGNORECASE)
FURTHER_IMAGE_PATTERN = re.compile(r"img([1-9][0-9]{0,3})\.(?:jpe?g|png|webp)", re.IGNORECASE)
FURTHER_MASK_PATTERN = re.compile(r"img([1-9][0-9]{0,3})_mask([0-9]{1,4})\.png", re.IGNORECASE)
LOOSE_MASK_PATTERN = re.compile(r"mask.*\.(png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Photo:
    """A further photo of an instance's assets."""

    name: str
    """Of its files: "img1" """
    image: Image.Image
    """RGB, upright, sRGB."""
    masks: tuple[Image.Image | None, ...]
    """One an asset: L, 0 or 255, the image's size; None where the photo does not show the asset."""

    @property
    def shown(self) -> tuple[int, ...]:
        """The assets in it."""
        return tuple(i for i, mask in enumerate(self.masks) if mask is not None)


@dataclass(frozen=True)
class Instance:
    """One image and its assets. Asset i has masks[i], words[i] and the token `<asset{i}>`."""

    name: str
    image: Image.Image
    """RGB, upright, sRGB."""
    masks: tuple[Image.Image, ...]
    """L, 0 or 255 (the asset), the image's size."""
    words: tuple[str, ...] | None
    source: Path
    """The folder."""
    warnings: tuple[str, ...] = ()
    """What looks wrong but can be used."""
    notes: tuple[str, ...] = ()
    """How the files were read, where that is not plain."""
    has_background: bool = False
    """The last mask is the complement of the others, and its token is `<background>`."""
    others: tuple[Photo, ...] = ()
    """Further photos of the same assets, to learn from as well. Pictures and figures of the bundle are about the first."""

    @property
    def tokens(self) -> tuple[str, ...]:
        things = tuple(asset_token(i) for i in range(self.count - self.has_background))
        return (*things, BACKGROUND_TOKEN) if self.has_background else things

    @property
    def count(self) -> int:
        return len(self.masks)


@dataclass(frozen=True)
class FittedInstance:
    """An instance at the size at which it is learned."""

    image: Image.Image
    """RGB; the padding has the image's mean colour."""
    masks: tuple[Image.Image, ...]
    """L, 0 or 255; 0 in the padding."""
    valid: Image.Image
    """L, 255 on the image and 0 in the padding."""
    tokens: tuple[str, ...]
    """Of each mask."""
    others: tuple[Photo, ...] = ()
    """At the same size."""


def load_instance(folder: Path, mask_orientation: str = "auto") -> Instance:
    """Reads and checks an instance folder. Raises InputError for whatever is wrong with it.

    `mask_orientation`, for a photo that its camera stored turned: the masks are drawn on the 'upright' picture, on the pixels
    as 'stored', or 'auto': as they fit.
    """
    names = _list_folder(folder)
    _check_files(folder, names)
    masks = dict(enumerate(_find_masks(folder, names)))
    further = _find_further(folder, names, len(masks))
    first = _read_photo(folder, _find_image(folder, names), masks, mask_orientation)
    rest: list[_Read] = []
    for image, files in further:
        rest.append(_read_photo(folder, image, files, mask_orientation, sum(r.megapixels for r in (first, *rest))))
    others = (Photo(_stem(name), read.image, tuple(read.masks.get(i) for i in masks))
              for (name, _), read in zip(further, rest, strict=True))  # fmt: skip
    return Instance(
        name=folder.resolve().name,
        image=first.image,
        masks=tuple(first.masks.values()),
        words=_load_words(folder, names, len(masks)),
        source=folder,
        warnings=(*_ignored_files(folder, names), *(line for read in (first, *rest) for line in read.warnings)),
        notes=tuple(note for read in (first, *rest) for note in read.notes),
        others=tuple(others),
    )


@dataclass(frozen=True)
class _Read:
    image: Image.Image
    masks: dict[int, Image.Image]
    """By asset"""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def megapixels(self) -> float:
        """Of all masks."""
        return len(self.masks) * self.image.width * self.image.height / 1e6


def _read_photo(folder: Path, image_name: str, mask_names: dict[int, str], mask_orientation: str, before: float = 0) -> _Read:
    """A photo and the masks on it. `before`: megapixels of the masks that were read already."""
    photo = open_image(folder / image_name)
    image = to_srgb(photo)
    if min(image.size) < MIN_SIDE:
        raise InputError(
            f"{folder / image_name} is {_size(image)} pixels, but each side needs at least {MIN_SIDE}; use a larger image."
        )
    megapixels = len(mask_names) * image.width * image.height / 1e6
    if before + megapixels > MAX_MASK_MEGAPIXELS:
        if before:
            total = f"{before + megapixels:.0f} megapixels"
            raise InputError(f"with those of {image_name} the masks of {folder} have {total}, but at most "
                             f"{MAX_MASK_MEGAPIXELS} are read; make the photos and the masks smaller.")  # fmt: skip
        raise InputError(
            f"{folder} has {len(mask_names)} masks of {_size(image)} pixels, {megapixels:.0f} megapixels together, but at most "
            f"{MAX_MASK_MEGAPIXELS} are read; make the image and the masks smaller."
        )
    files = [_sized_mask(folder / name, image, image_name, photo.orientation) for name in mask_names.values()]
    greys, turns = upright_masks(image, image_name, photo.orientation, files, mask_orientation)
    inside = [_mask_inside(file, grey) for file, grey in zip(files, greys, strict=True)]
    masks = {asset: Image.fromarray(each.astype(np.uint8) * 255) for asset, each in zip(mask_names, inside, strict=True)}
    return _Read(image, masks, tuple(_overlaps(folder, list(mask_names.values()), inside)),
                 (*photo.notes(), *turns, *(note for file in files for note in file.notes)))  # fmt: skip


def fit(image: Image.Image, resolution: int | tuple[int, int], fill: int | tuple[int, ...],
        resample: Image.Resampling) -> Image.Image:  # fmt: skip
    """Scales to `resolution`, a square's side or (width, height), as large as it fits, and pads both sides equally with `fill`.

    Returns an image of the same mode.
    """
    whole = (resolution, resolution) if isinstance(resolution, int) else resolution
    scale = min(whole[0] / image.width, whole[1] / image.height)
    width, height = (max(1, min(most, round(side * scale))) for side, most in zip(image.size, whole, strict=True))
    padded = Image.new(image.mode, whole, fill)
    padded.paste(image.resize((width, height), resample), ((whole[0] - width) // 2, (whole[1] - height) // 2))
    return padded


def bucket(size: tuple[int, int], resolution: int, multiple: int) -> tuple[int, int]:
    """(width, height): of the sizes in multiples of `multiple` with nearly as many pixels as a square of `resolution`, and never
    more, the one nearest in shape to `size`."""
    pixels = resolution * resolution
    sides = range(multiple, 4 * resolution + 1, multiple)
    candidates = [(width, height) for width in sides for height in sides if 0.9 * pixels <= width * height <= pixels]
    return min(candidates or [(resolution, resolution)],
               key=lambda c: (abs(math.log(c[0] * size[1] / (c[1] * size[0]))), -c[0] * c[1]))  # fmt: skip


def fit_instance(instance: Instance, resolution: int | tuple[int, int]) -> FittedInstance:
    """The instance at `resolution`, a square's side or (width, height): scaled and padded, never squashed or cropped.

    Raises InputError if a mask has no pixel left at this size.
    """
    mean = tuple(round(channel) for channel in ImageStat.Stat(instance.image).mean)
    everything = Image.new("L", instance.image.size, 255)
    return FittedInstance(
        image=fit(instance.image, resolution, mean, Image.Resampling.LANCZOS),
        masks=tuple(_fit_mask(mask, instance.source / f"mask{i}.png", resolution) for i, mask in enumerate(instance.masks)),
        valid=fit(everything, resolution, 0, Image.Resampling.BOX),
        tokens=instance.tokens,
        others=tuple(_fit_photo(photo, instance.source, resolution) for photo in instance.others),
    )


def _fit_photo(photo: Photo, folder: Path, resolution: int | tuple[int, int]) -> Photo:
    mean = tuple(round(channel) for channel in ImageStat.Stat(photo.image).mean)
    masks = (mask and _fit_mask(mask, folder / f"{photo.name}_mask{i}.png", resolution) for i, mask in enumerate(photo.masks))
    return Photo(photo.name, fit(photo.image, resolution, mean, Image.Resampling.LANCZOS), tuple(masks))


def _fit_mask(mask: Image.Image, path: Path, resolution: int | tuple[int, int]) -> Image.Image:
    """A pixel is the asset's if at least half of its area is. `path` is for the message."""
    fitted = fit(mask, resolution, 0, Image.Resampling.BOX).point(lambda value: 255 if value >= 128 else 0)
    if fitted.getbbox() is None:
        raise InputError(
            f"{path} covers {np.count_nonzero(np.asarray(mask))} pixels of "
            f"{_size(mask)} and none at {_size(fitted)}, the model's resolution; "
            "crop the image closer to the assets, or draw the mask larger."
        )
    return fitted


# Finding the files


def _list_folder(folder: Path) -> list[str]:
    # os.path, because it answers False where Path's own methods raise (a name that is too long, say).
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            raise InputError(f"{folder} is a file; give the folder that holds the image and its masks.")
        near = _instances_in(folder.parent)
        raise InputError(
            f"There is no folder {str(folder)[:300]}; "
            + (f"instances beside it: {', '.join(near)}." if near else "give a folder with an image and its masks.")
        )
    try:
        return sorted(name for name in os.listdir(folder) if not is_system_name(name))
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read ({error.strerror}); check its permissions.") from None


def is_system_name(name: str) -> bool:
    """True for what a system or an archiver leaves behind, and for hidden files and folders: nobody's instance or photo."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_instance_picture(name: str) -> bool:
    """True for the name of a photo or a mask of an instance folder."""
    return any(p.fullmatch(name) for p in (IMAGE_NAME_PATTERN, MASK_PATTERN, FURTHER_IMAGE_PATTERN, FURTHER_MASK_PATTERN))


def _check_files(folder: Path, names: list[str]) -> None:
    """Before anything is done for each mask, and before any file is opened: the folder may come from a stranger.

    Raises InputError for more masks than MAX_ASSETS, and for a file that is none, is too large, or leads out of the folder.
    """
    count = sum(1 for name in names if MASK_PATTERN.fullmatch(name))
    photos = sum(1 for name in names if FURTHER_IMAGE_PATTERN.fullmatch(name))
    if photos > MAX_PHOTOS:
        raise InputError(f"{folder} has {photos} further photos (img1.jpg, img2.jpg, ...), but at most {MAX_PHOTOS} are read; "
                         "keep the best ones.")  # fmt: skip
    if count > MAX_ASSETS:
        raise InputError(f"{folder} has {count} masks, but at most {MAX_ASSETS} are read; keep those of the assets you want.")
    for name in names:
        is_text = name.lower() in ("words.txt", "truth.json")
        if not (is_text or is_instance_picture(name)):
            continue
        path = folder / name
        if leads_out(folder, path):
            raise InputError(f"{path} is a link out of its folder; copy the file there.")
        try:
            check_regular(path, MAX_TRUTH_BYTES if is_text else MAX_IMAGE_BYTES)
        except UnusableFile as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); put another file there, or remove it.") from None
        except OSError:
            continue  # the one that reads it says what is wrong


def _instances_in(parent: Path) -> list[str]:
    try:
        folders = [entry for entry in sorted(parent.iterdir()) if (entry / "mask0.png").is_file()]
    except (OSError, ValueError):
        return []
    return [str(folder) for folder in folders[:8]]


def _find_image(folder: Path, names: list[str]) -> str:
    found = [name for name in names if _stem(name) == "img" and _suffix(name) in IMAGE_SUFFIXES]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{folder} has several images ({', '.join(found)}); keep one of them.")
    others = [name for name in names if _stem(name) == "img" or _suffix(name) in IMAGE_SUFFIXES]
    others = [name for name in others if not name.lower().startswith("mask")]
    there = f"it has {', '.join(others[:5])}; save the photo as img.jpg" if others else "put the photo there as img.jpg"
    raise InputError(f"{folder} has no image ({IMAGE_NAMES}): {there}.")


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].lower()


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _find_masks(folder: Path, names: list[str]) -> list[str]:
    """The mask files in the order of their numbers: mask10 after mask9."""
    numbered = sorted((int(m[1]), name) for name in names if (m := MASK_PATTERN.fullmatch(name)))
    if not numbered:
        others = [name for name in names if LOOSE_MASK_PATTERN.fullmatch(name)]
        there = f" It has {', '.join(others[:5])}; save each as mask<number>.png." if others else ""
        raise InputError(f"{folder} has no masks: mask0.png, mask1.png, ..., one for each asset.{there}")
    for expected, (number, name) in enumerate(numbered):
        if number < expected:
            raise InputError(f"{folder} has two masks number {number} ({numbered[expected - 1][1]}, {name}); keep one.")
        if number > expected:
            raise InputError(f"{folder} has {name} but no mask{expected}.png; number the masks from 0 without gaps.")
    return [name for _, name in numbered]


def _find_further(folder: Path, names: list[str], count: int) -> list[tuple[str, dict[int, str]]]:
    """The names of further photos and of their masks by asset, in the order of the photos' numbers. A photo without any mask is
    left out (and `_ignored_files` says so)."""
    masks: dict[int, dict[int, str]] = {}
    for name in names:
        if found := FURTHER_MASK_PATTERN.fullmatch(name):
            photo, asset = int(found[1]), int(found[2])
            if asset >= count:
                raise InputError(f"{folder} has {name} but no mask{asset}.png: the first photo, img, shows every asset; add that "
                                 "mask, or take the photo that shows them all as the first.")  # fmt: skip
            if other := masks.setdefault(photo, {}).get(asset):
                raise InputError(f"{folder} has two masks of asset {asset} for photo {photo} ({other}, {name}); keep one.")
            masks[photo][asset] = name
    images: dict[int, str] = {}
    for name in names:
        if found := FURTHER_IMAGE_PATTERN.fullmatch(name):
            number = int(found[1])
            if number in masks and number in images:
                raise InputError(f"{folder} has several images of number {number} ({images[number]}, {name}); keep one of them.")
            images[number] = name
    for number in sorted(masks):
        if number not in images:
            mask = next(iter(masks[number].values()))
            raise InputError(f"{folder} has {mask} but no img{number}.jpg (or .png, .webp): put the photo there, or "
                             "remove its masks.")  # fmt: skip
    return [(images[number], dict(sorted(masks[number].items()))) for number in sorted(masks)]


def _ignored_files(folder: Path, names: list[str]) -> list[str]:
    masked = {int(m[1]) for name in names if (m := FURTHER_MASK_PATTERN.fullmatch(name))}
    photos = [name for name in names if (m := FURTHER_IMAGE_PATTERN.fullmatch(name)) and int(m[1]) not in masked]
    bare = [f"{folder / name} is not learned from: it has no masks ({_stem(name)}_mask0.png, ...)" for name in photos]
    return bare + _ignored_masks(folder, names)


def _ignored_masks(folder: Path, names: list[str]) -> list[str]:
    ignored = [name for name in names if LOOSE_MASK_PATTERN.fullmatch(name) and not MASK_PATTERN.fullmatch(name)]
    return [f"{folder / name} is ignored: masks are named mask0.png, mask1.png, ..." for name in ignored]


# Reading masks


def _sized_mask(path: Path, image: Image.Image, image_name: str, orientation: int) -> StoredMask:
    """A mask of the image's size, as the image is seen or as it is stored."""
    mask = open_mask(path)
    size = mask.grey.shape[::-1]
    if size == image.size or (orientation >= 5 and size[::-1] == image.size):
        return mask
    raise InputError(f"{path} is {size[0]}x{size[1]} but {image_name} is {_size(image)}; save the mask at the image's size.")


def _mask_inside(file: StoredMask, grey: npt.NDArray[np.uint8]) -> BoolArray:
    """True on the asset, (H, W)."""
    inside = grey >= 128
    if not inside.any():
        raise InputError(
            f"{file.path} is empty: its brightest pixel is {file.brightest}; paint the asset white (255) on black."
        )
    if inside.all():
        raise InputError(f"{file.path} covers the whole image; paint what is not the asset black.")
    return inside


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _overlaps(folder: Path, names: Sequence[str], masks: Sequence[BoolArray]) -> Iterable[str]:
    areas = [int(mask.sum()) for mask in masks]
    for i, j in combinations(range(len(masks)), 2):
        share = int((masks[i] & masks[j]).sum()) / min(areas[i], areas[j])
        if share > MAX_OVERLAP:
            yield (
                f"In {folder}, {names[i]} and {names[j]} share {share:.0%} of the smaller one; "
                "the two assets will be hard to tell apart."
            )


# Reading words


def _load_words(folder: Path, names: list[str], count: int) -> tuple[str, ...] | None:
    """One word or phrase for each mask, or None without a words.txt."""
    name = next((name for name in names if name.lower() == "words.txt"), None)
    if name is None:
        return None
    path = folder / name
    words = _read_lines(path)
    for number, word in enumerate(words, 1):
        if not word:
            raise InputError(f"{path}: line {number} is empty; write one word or phrase for each mask.")
        check_characters(word, f"{path}: line {number}")
    if len(words) != count:
        raise InputError(f"{path} has {len(words)} lines but there are {count} masks; write one line for each mask.")
    return tuple(words)


def _read_lines(path: Path) -> list[str]:
    """Stripped lines, without the empty ones at the end."""
    try:
        text = read_regular(path, MAX_WORDS_BYTES).decode("utf-8-sig").rstrip()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save the file as UTF-8.") from None
    except UnusableFile as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); write one short phrase for each mask, one a line.") from None
    except OSError as error:
        refuse_file(path, error)
    return [line.strip() for line in text.split("\n")] if text else []


def with_background(instance: Instance) -> Instance:
    """The instance with one more asset, `<background>`: all that no mask covers (Break-A-Scene, section 5). It is that of
    the first photo: other photos may show the assets elsewhere.

    Raises InputError when the masks leave nothing over.
    """
    things = np.any([np.asarray(mask) > 0 for mask in instance.masks], axis=0)
    if things.all():
        raise InputError(f"The masks of {instance.source} cover the whole image: there is no background to learn.")
    rest = Image.fromarray((~things).astype(np.uint8) * 255)
    words = (*instance.words, "background") if instance.words else None
    others = tuple(replace(photo, masks=(*photo.masks, None)) for photo in instance.others)
    return replace(instance, masks=(*instance.masks, rest), words=words, has_background=True, others=others)


def without_background(instance: Instance) -> Instance:
    """The instance's things alone: `<background>` is learned like an asset, but is nothing that stands somewhere."""
    if not instance.has_background:
        return instance
    words = instance.words[:-1] if instance.words else None
    others = tuple(replace(photo, masks=photo.masks[:-1]) for photo in instance.others)
    return replace(instance, masks=instance.masks[:-1], words=words, has_background=False, others=others)
