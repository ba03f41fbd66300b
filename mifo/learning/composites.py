"""Training pictures made of the things themselves: each cut out along its mask and put on backgrounds that the base model drew
(this project's own; a simple copy-paste augmentation, Ghiasi et al., arXiv 2012.07177, turned to learning what a token means).

The masked loss says nothing about the outside of a mask, so a token may fill it with its thing once more. On such a picture all
is known: what stands where, what is behind it, and the words for both; so the loss may count everywhere. The base model's
backgrounds often hold things of their own, which are looked for and painted over first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage

from ..config import CompositeConfig, PriorConfig
from ..data.instance import FittedInstance
from ..data.mask_sizes import union_at_latents
from ..io.sheets import pixels_to_tensor, to_images
from ..io.threads import map_in_order
from ..model.base import BaseModel
from ..prompts import BACKGROUND_TOKEN, join_assets
from ..segmentation.grabcut import GrabCut, propose
from .clean_plate import clean_plate, holes
from .prior import make_prior
from .union_sampling import choose_assets

TRIES = 30  # to find a place where a thing covers no other
SEARCHED_SIDE = 256  # pixels: what GrabCut wants to see of a small picture
GROWN = 6  # pixels of that: the soft rim of what is painted over
PHOTO_SHARE = 0.15  # of the composites that stand on the photo's own background and name it, where `<background>` is learned


@dataclass(frozen=True)
class Cutout:
    """A thing as a photo shows it, cut to its mask's bounding box."""

    asset: int
    image: Image.Image
    mask: Image.Image


@dataclass(frozen=True)
class Composite:
    """One picture, and all that a step needs to know of it."""

    assets: tuple[int, ...]
    prompt: str
    encode: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    """Gives its latents' mean and standard deviation, (1, C, h, w) each"""
    masks: torch.Tensor
    """(len(assets), 1, H, W) of 0 and 1; what a later thing covers is not an earlier one's"""
    weights: torch.Tensor
    """(1, 1, h, w): of the diffusion loss; 1 on the things"""
    filled: torch.Tensor | None = None
    """(1, 1, h, w) in [0, 1]: where the photo's own background was filled in"""


class Composites:
    """Makes them, new ones for every step: few that come again and again are learned by heart (LOG.md)."""

    def __init__(self, fitted: FittedInstance, base: BaseModel, config: CompositeConfig, seed: int, cache: Path | None = None,
                 report: Callable[[int, int], None] | None = None):  # fmt: skip
        """`cache`: where drawn backgrounds are kept, as the prior's."""
        self.base, self.config, self.tokens = base, config, fitted.tokens
        self.backgrounds = draw_backgrounds(base, config, fitted.image.size[::-1], seed, cache, report)
        self.cutouts = cut_out_things(fitted)
        self.plate = photo_without_things(fitted) if BACKGROUND_TOKEN in fitted.tokens else None

    def draw(self, rng: np.random.Generator, union_sampling: bool, flip_probability: float, alone_share: float = 0.0,
             about: frozenset[int] = frozenset()) -> Composite:  # fmt: skip
        """`alone_share`, `about`: as `choose_assets` takes them."""
        on_plate = self.plate is not None and rng.random() < PHOTO_SHARE
        if self.plate is not None and on_plate:
            background = cut_anywhere(self.plate, self.backgrounds[0].image.size, rng)
        else:
            background = self.backgrounds[int(rng.integers(len(self.backgrounds)))]
        chosen = choose_assets(sorted(self.cutouts), rng, union_sampling, alone_share, about)
        cutouts = [self.cutouts[i][int(rng.integers(len(self.cutouts[i])))] for i in chosen]
        picture, masks = paste(cutouts, background.image, self.config.scale, flip_probability, rng)
        masks, factor = masks.float().to(self.base.device), self.base.vae_factor
        size = (picture.height // factor, picture.width // factor)
        free = 1 - masks.amax(0, keepdim=True)
        if on_plate:
            chosen, masks = (*chosen, self.tokens.index(BACKGROUND_TOKEN)), torch.cat([masks, free])
        filled = background.filled
        union = union_at_latents(masks, size)
        words = join_assets([self.tokens[i] for i in chosen])
        weights = union + self.config.outside_weight * (1 - union)
        encode = partial(self.base.encode, pixels_to_tensor(picture))
        return Composite(chosen, f"{words} {background.place}".strip(), encode, masks, weights,
                         None if filled is None else union_at_latents(as_mask(filled).to(free) * free, size))  # fmt: skip


@dataclass(frozen=True)
class Backdrop:
    """What things are put on."""

    place: str
    """Words for it, which follow those for the things"""
    image: Image.Image
    filled: Image.Image | None = None
    """L: where the photo was filled in. Drawn ones have none, though they were painted over: there it brought nothing (LOG.md)"""


def photo_without_things(fitted: FittedInstance) -> Backdrop:
    """The photo's own background, without what pads it; `<background>` is the word for it."""
    things = fitted.masks[: fitted.tokens.index(BACKGROUND_TOKEN)]
    photo = np.max([np.asarray(mask) for mask in fitted.masks], axis=0) > 127
    rows, columns = (np.flatnonzero(photo.any(axis)) for axis in (1, 0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Backdrop("", clean_plate(fitted.image, things).crop(box), holes(things).crop(box))


def cut_anywhere(backdrop: Backdrop, size: tuple[int, int], rng: np.random.Generator) -> Backdrop:
    """As much of it as fills (width, height)."""
    where = (float(rng.random()), float(rng.random()))
    filled = backdrop.filled and ImageOps.fit(backdrop.filled, size, Image.Resampling.BILINEAR, centering=where)
    return replace(backdrop, image=ImageOps.fit(backdrop.image, size, Image.Resampling.LANCZOS, centering=where), filled=filled)


def as_mask(image: Image.Image) -> torch.Tensor:
    """L -> (1, 1, H, W) in [0, 1]"""
    return torch.from_numpy(np.asarray(image).copy()).float()[None, None] / 255


def draw_backgrounds(base: BaseModel, config: CompositeConfig, size: tuple[int, int], seed: int, cache: Path | None = None,
                     report: Callable[[int, int], None] | None = None) -> list[Backdrop]:  # fmt: skip
    """Every background, without things. `size`: (height, width)."""
    drawn = make_prior(base, PriorConfig(num_class_images=config.num_backgrounds, class_prompt=config.backgrounds,
                                         sampling_steps=config.sampling_steps, guidance_scale=config.guidance_scale),
                       size, seed, cache, report)  # fmt: skip

    def finish(latents: torch.Tensor) -> Image.Image:
        """`latents`: (C, h, w)"""
        with torch.no_grad():
            return without_things(to_images(base.decode(latents[None]))[0])

    finished = map_in_order(finish, drawn.latents, base.is_small)
    places = [prompt.removeprefix("a photo").strip() for prompt in drawn.prompts]
    return [Backdrop(places[k % len(places)], picture) for k, picture in enumerate(finished)]


def without_things(image: Image.Image) -> Image.Image:
    """What stands out from the picture's rim painted over with what is around it."""
    scale = max(1.0, SEARCHED_SIDE / max(image.size))
    large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    hints = propose(large)
    masks = [mask for mask in GrabCut().masks(large, hints) if mask.any() and not mask.all()] if hints else []
    if not masks:
        return image
    found = ndimage.binary_dilation(np.any(masks, axis=0), iterations=GROWN)
    return clean_plate(image, [Image.fromarray(found.astype(np.uint8) * 255).resize(image.size)])


def cut_out_things(fitted: FittedInstance) -> dict[int, list[Cutout]]:
    """Of each thing, its cut-outs from all photos that show it; `<background>` is none."""
    found: dict[int, list[Cutout]] = {}
    for image, masks in ((fitted.image, fitted.masks), *((photo.image, photo.masks) for photo in fitted.others)):
        for asset, mask in enumerate(masks):
            if mask is not None and fitted.tokens[asset] != BACKGROUND_TOKEN:
                box = mask.getbbox()
                found.setdefault(asset, []).append(Cutout(asset, image.crop(box), mask.crop(box)))
    return found


def paste(cutouts: Sequence[Cutout], background: Image.Image, scale: tuple[float, float], flip_probability: float,
          rng: np.random.Generator) -> tuple[Image.Image, torch.Tensor]:  # fmt: skip
    """The picture, and the things' masks (N, 1, H, W) bool. Each is scaled and flipped at random, and stands anywhere inside,
    apart from the others if there is room."""
    picture = background.copy()
    masks: list[torch.Tensor] = []
    boxes: list[tuple[int, int, int, int]] = []
    for cutout in cutouts:
        by = min(float(rng.uniform(*scale)), background.width / cutout.image.width, background.height / cutout.image.height)
        size = (max(1, round(cutout.image.width * by)), max(1, round(cutout.image.height * by)))
        image, mask = cutout.image.resize(size, Image.Resampling.LANCZOS), cutout.mask.resize(size, Image.Resampling.BOX)
        if rng.random() < flip_probability:
            image, mask = (x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, mask))
        for _ in range(TRIES):
            left, top = (int(rng.integers(0, whole - side + 1)) for whole, side in zip(background.size, size, strict=True))
            box = (left, top, left + size[0], top + size[1])
            if all(box[2] <= b[0] or b[2] <= box[0] or box[3] <= b[1] or b[3] <= box[1] for b in boxes):
                break
        boxes.append(box)
        picture.paste(image, box[:2], mask)
        whole = Image.new("L", background.size)
        whole.paste(mask, box[:2])
        inside = torch.from_numpy(np.asarray(whole) >= 128)[None]
        masks = [earlier & ~inside for earlier in masks]
        masks.append(inside)
    return picture, torch.stack(masks)
