"""What a learning step sees: union sampling, flips, cached latents, and a typed Batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from ..data.instance import FittedInstance
from ..data.mask_sizes import union_at_latents
from ..io.sheets import pixels_to_tensor
from ..model.base import BaseModel
from ..model.prompt_embeds import ImageSize
from ..prompts import BACKGROUND_TOKEN, join_assets
from .clean_plate import clean_plate, holes
from .composites import Composite, Composites, as_mask
from .union_sampling import choose_assets

PLATE_SHARE = 0.75  # of the steps with <background>
PLATE_STEPS = 0.25  # of all steps that are about <background> alone, where the others are composites
ABOUT_SHARE = 0.5  # of the composites while an asset is relearned: these have it, the others are of any


@dataclass(frozen=True)
class Batch:
    """One training step's instance side: `B` draws of the same subset of assets."""

    assets: tuple[int, ...]
    """Indices of the sampled assets, in the prompt's order."""
    tokens: tuple[str, ...]
    """Their tokens, in the same order."""
    prompt: str
    latents: Callable[[], torch.Tensor]
    """Gives (B, C, h, w), scaled. A composite is encoded only then, so that a step's pictures can be side by side."""
    union_mask: torch.Tensor
    """(1, 1, h, w) at latent size: weights of the diffusion loss, 1 on the assets, and outside 0, or more on a composite"""
    asset_masks: torch.Tensor
    """(len(assets), 1, H, W) in [0, 1] at pixel size, in the order of `assets`"""
    size: ImageSize | None = None
    """As in `View`"""
    filled: torch.Tensor | None = None
    """(1, 1, h, w) in [0, 1]: where the picture was filled in and its details are not the photo's"""


@dataclass(frozen=True)
class View:
    """The picture where it is, or shifted: the VAE's distribution of its latents, and the masks."""

    mean: torch.Tensor
    """(1, C, h, w)"""
    std: torch.Tensor
    masks: torch.Tensor
    """(N, 1, H, W) in [0, 1]"""
    whole: frozenset[int]
    """The assets that lie inside the picture as they did before the shift"""
    size: ImageSize
    """What the UNet is told of the picture: its crop is how many pixels lie outside, as SDXL counts them"""
    filled: torch.Tensor | None = None
    """As in `Batch`"""


@dataclass(frozen=True)
class PhotoViews:
    """One photo as it is, and shifted."""

    shown: tuple[int, ...]
    """The assets in it"""
    views: dict[bool, list[View]]
    """By flip; the unshifted one first"""


class InstanceData:
    """Both flips of an instance's photos, encoded once; the VAE can be freed afterwards, unless there are composites.

    The VAE's distribution is kept, not one sample of it: each step draws afresh, as encoding every step would.
    `placements` shifted copies per asset keep a token from learning where in the photo its asset stood: a step takes one of
    the views in which all of its assets are whole.
    Of several photos a step draws one first, and then of the assets that it shows.
    Where `<background>` is learned by union sampling, most of its steps are about it alone, on a clean plate and in the whole
    picture: the masked loss says nothing about the places where the things stood, and the model would put things there. Beside
    composites it has a share of the steps, and some of the composites stand on it.
    """

    def __init__(self, fitted: FittedInstance, base: BaseModel, placements: int = 0, seed: int = 0,
                 photo_size: tuple[int, int] | None = None, other_sizes: Sequence[tuple[int, int]] = (),
                 about: Sequence[str] = (), composites: Composites | None = None, composite_share: float = 0.0):  # fmt: skip
        """`photo_size`, `other_sizes`: (width, height) before fitting, of the photo and of further ones; by default each was
        fitted from its own size. `about`: tokens of which each step about a photo has one at least, and half of the composites;
        all by default. A `composite_share` of the steps takes one of the `composites`."""
        learned_at = fitted.image.size[::-1]
        self.size = ImageSize(photo_size[::-1] if photo_size else learned_at, learned_at)
        self.drawn_size = ImageSize(learned_at, learned_at)  # of pictures that the model drew at that size
        self.count = len(fitted.masks)
        self.tokens = fitted.tokens
        first = _views(fitted.image, fitted.masks, base, placements, np.random.default_rng([seed, 1]), self.size)
        self.masks = {flip: views[0].masks for flip, views in first.views.items()}  # (N, 1, H, W), of the first photo
        self.moments = {flip: (views[0].mean, views[0].std) for flip, views in first.views.items()}
        self.photos = [first]
        for k, photo in enumerate(fitted.others):
            size = ImageSize(other_sizes[k][::-1] if other_sizes else learned_at, learned_at)
            rng = np.random.default_rng([seed, 1, k + 1])
            self.photos.append(_views(photo.image, photo.masks, base, placements, rng, size))

        self.composites, self.composite_share = composites, composite_share
        self.about = frozenset(self.tokens.index(token) for token in about)
        if self.about:
            self.photos = [photo for photo in self.photos if self.about.intersection(photo.shown)]
        self.background = self.tokens.index(BACKGROUND_TOKEN) if BACKGROUND_TOKEN in self.tokens else None
        self.plate = None if self.background is None else self._plate(fitted, base)

    @property
    def latent_shape(self) -> torch.Size:
        """(C, h, w), of each picture."""
        return self.moments[False][0].shape[1:]

    def _plate(self, fitted: FittedInstance, base: BaseModel) -> dict[bool, View]:
        """The picture without its things, by flip. Its mask for each asset is all that is not padding."""
        things = fitted.masks[: self.background]
        pixels, views = pixels_to_tensor(clean_plate(fitted.image, things)), {}
        covered = as_mask(holes(things)).to(base.device)
        for flip in (False, True):
            valid = self.masks[flip].amax(0, keepdim=True).expand_as(self.masks[flip])
            mean, std = base.encode(pixels.flip(-1) if flip else pixels)
            filled = union_at_latents(covered.flip(-1) if flip else covered, (mean.shape[-2], mean.shape[-1]))
            views[flip] = View(mean, std, valid, frozenset(), self.size, filled)
        return views

    def sample(self, rng: np.random.Generator, generator: torch.Generator, draws: int, union_sampling: bool,
               flip_probability: float, alone_share: float = 0.0) -> Batch:  # fmt: skip
        """Draws a photo, a subset of its assets, a flip, and `draws` latents; or takes a composite."""
        if self.composites and self.plate and rng.random() < PLATE_STEPS:
            return self._of_plate(bool(rng.random() < flip_probability), generator, draws)
        if self.composites and rng.random() < self.composite_share:
            about = self.about if self.about and rng.random() < ABOUT_SHARE else frozenset()
            made = self.composites.draw(rng, union_sampling, flip_probability, alone_share, about)
            return self._of_composite(made, generator, draws)
        photo = self.photos[int(rng.integers(len(self.photos))) if len(self.photos) > 1 else 0]
        assets = choose_assets(photo.shown, rng, union_sampling, alone_share, self.about)
        flip = bool(rng.random() < flip_probability)
        if self.plate and union_sampling and self.background in assets and rng.random() < PLATE_SHARE:
            return self._of_plate(flip, generator, draws)
        fitting = [view for view in photo.views[flip] if view.whole.issuperset(assets)]
        view = fitting[int(rng.integers(len(fitting)))] if len(fitting) > 1 else fitting[0]
        return self._of_view(assets, view, generator, draws)

    def _of_plate(self, flip: bool, generator: torch.Generator, draws: int) -> Batch:
        assert self.background is not None and self.plate is not None
        return self._of_view((self.background,), self.plate[flip], generator, draws)

    def _of_view(self, assets: tuple[int, ...], view: View, generator: torch.Generator, draws: int) -> Batch:
        mean, std = view.mean, view.std
        noise = torch.randn((draws, *mean.shape[1:]), generator=generator).to(mean)
        masks = view.masks[list(assets)]
        union = union_at_latents(masks, (mean.shape[-2], mean.shape[-1]))
        tokens = tuple(self.tokens[i] for i in assets)
        return Batch(assets, tokens, join_assets(tokens), lambda: mean + std * noise, union, masks, view.size, view.filled)

    def _of_composite(self, taken: Composite, generator: torch.Generator, draws: int) -> Batch:
        noise = torch.randn((draws, *self.latent_shape), generator=generator)
        tokens = tuple(self.tokens[i] for i in taken.assets)

        def latents() -> torch.Tensor:
            mean, std = taken.encode()
            return mean + std * noise.to(mean)

        return Batch(taken.assets, tokens, taken.prompt, latents, taken.weights, taken.masks, self.drawn_size, taken.filled)


def _views(picture: Image.Image, masks_of: Sequence[Image.Image | None], base: BaseModel, placements: int,
           rng: np.random.Generator, size: ImageSize) -> PhotoViews:  # fmt: skip
    """A photo and its shifted copies, encoded; an asset without a mask is not in it."""
    image, empty = pixels_to_tensor(picture), Image.new("L", picture.size)
    masks = torch.stack([torch.from_numpy(np.asarray(m or empty).copy()).float() / 255 for m in masks_of])[:, None]
    shown = tuple(i for i, mask in enumerate(masks_of) if mask is not None)
    views = {flip: [View(*base.encode(image.flip(-1) if flip else image), (masks.flip(-1) if flip else masks).to(base.device),
                         frozenset(shown), size)] for flip in (False, True)}  # fmt: skip
    for dx, dy in random_shifts(masks[list(shown)], placements, rng):
        moved, moved_masks = shift(image, dx, dy), shift(masks, dx, dy, fill=0.0)
        whole = frozenset(i for i in shown if float(moved_masks[i].sum()) == float(masks[i].sum()))
        for flip in (False, True):
            turned, their_masks = (x.flip(-1) if flip else x for x in (moved, moved_masks))
            left = max(0, dx) if flip else max(0, -dx)  # a flip turns the right side to the left
            cropped = replace(size, crop=(max(0, -dy), left))
            views[flip].append(View(*base.encode(turned), their_masks.to(base.device), whole, cropped))
    return PhotoViews(shown, views)


def random_shifts(masks: torch.Tensor, per_asset: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(N, 1, H, W) masks -> `per_asset` shifts (dx, dy) in pixels for each, any that leave its bounding box inside."""
    height, width = masks.shape[-2:]
    shifts = []
    for mask in masks:
        rows, columns = (mask[0].amax(axis).nonzero().flatten().tolist() for axis in (1, 0))
        for _ in range(per_asset):
            dx = int(rng.integers(-columns[0], width - columns[-1]))
            shifts.append((dx, int(rng.integers(-rows[0], height - rows[-1]))))
    return shifts


def shift(pixels: torch.Tensor, dx: int, dy: int, fill: float | None = None) -> torch.Tensor:
    """(B, C, H, W) moved right by `dx` and down by `dy`; what comes in is `fill`, or each channel's mean."""
    empty = pixels.mean((2, 3), keepdim=True) if fill is None else torch.tensor(fill)
    moved = empty.expand_as(pixels).clone()
    height, width = pixels.shape[-2:]
    to_rows, to_columns = slice(max(0, dy), height + min(0, dy)), slice(max(0, dx), width + min(0, dx))
    from_rows, from_columns = slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))
    moved[..., to_rows, to_columns] = pixels[..., from_rows, from_columns]
    return moved
