"""Keeping what lies outside the mask: blended as latents at each step, then pasted, cloned seamlessly, or by tuning the decoder.

Source: Blended Latent Diffusion (arXiv 2206.02779), section 4.2; Poisson image editing (Perez et al. 2003), by OpenCV.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BoolArray = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

#: weight of the part outside the mask in `tune_to_source`, as published
OUTSIDE_WEIGHT = 100.0
#: Pixels up to which OpenCV's Poisson solver runs at full size: it takes about 190 bytes a pixel, 1.4 GiB for these.
MAX_CLONED = 8_000_000
LEARNING_RATES = {"weights": 5e-4, "latents": 5e-2}


@dataclass(frozen=True)
class Blending:
    """Latents whose part outside a mask is the source's, at every noise level (Blended Latent Diffusion, section 4.1)."""

    scheduler: Any
    timesteps: torch.Tensor
    """(S,) of the steps that run"""
    source: torch.Tensor
    """(B, C, h, w), scaled, without noise"""
    noise: torch.Tensor
    """(B, C, h, w). The same outside and inside, and all the way down: DDIM keeps it."""
    masks: Sequence[torch.Tensor]
    """S + 1 of (h, w) bool, True where the edit is drawn: as each step begins, and after the last"""

    def start(self, from_image: bool) -> torch.Tensor:
        """(B, C, h, w) at the first step's noise level: noise inside the mask, or, `from_image`, the noised source there too."""
        known = self.source_at(0)
        return known if from_image else torch.where(self.masks[0], self.noise, known)

    def blend(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) at the noise level at which `step` begins -> the same, outside its mask the source."""
        return torch.where(self.masks[step], latents, self.source_at(step))

    def source_at(self, step: int) -> torch.Tensor:
        """The source as it enters `step`; after the last one, without noise."""
        if step == len(self.timesteps):
            return self.source
        noisy: torch.Tensor = self.scheduler.add_noise(self.source, self.noise, self.timesteps[step].expand(len(self.noise)))
        return noisy


def feather(mask: BoolArray, width: float) -> npt.NDArray[np.float32]:
    """(H, W) weight of what is drawn: 0 outside the mask, rising to 1 over `width` pixels inside it.

    In a mask too narrow for that it rises over a quarter of its half width, so that a thin one is not faded out.
    """
    if mask.all():
        return np.ones(mask.shape, np.float32)
    distance = ndimage.distance_transform_edt(mask)  # 1 on the first pixel inside
    softened: npt.NDArray[np.float32] = np.clip(distance / (min(width, distance.max() / 4) + 1), 0, 1).astype(np.float32)
    return softened


def paste(source: Pixels, drawn: npt.NDArray[np.float32], mask: BoolArray, width: float) -> Pixels:
    """`drawn` inside the mask and `source` outside, byte for byte; both (H, W, 3). The seam is softened inside the mask."""
    return _mix(source.astype(np.float32), drawn, feather(mask, width))


def paste_around(source: Pixels, drawn: npt.NDArray[np.float32], change: npt.NDArray[np.float32], mask: BoolArray,
                 width: float) -> Pixels:  # fmt: skip
    """As `paste`, but outside the mask the source moves by `change`: what the decoder could not bring back, and no more.

    So a large photo keeps its detail around an edit that was drawn at a smaller size.
    """
    return _mix(source.astype(np.float32) + change, drawn, feather(mask, width))


def _mix(outside: npt.NDArray[np.float32], inside: npt.NDArray[np.float32], weight: npt.NDArray[np.float32]) -> Pixels:
    mixed = outside + weight[..., None] * (inside - outside)
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


def clone(source: Pixels, drawn: npt.NDArray[np.float32], mask: BoolArray) -> Pixels:
    """Poisson cloning: inside the mask the gradients of `drawn`, at its edge the colours of `source`; outside, `source`.

    Solved on the mask's bounding box, which is all that OpenCV looks at. A box of more than MAX_CLONED pixels is solved at a
    smaller size, and the shift of colours that comes out is enlarged and added to `drawn`: it is smooth, and `drawn` keeps its
    detail. A mask without an outside has no edge to start from, and takes `drawn` as it is.
    """
    if mask.all():
        return np.rint(drawn).clip(0, 255).astype(np.uint8)
    if not mask.any():
        return source.copy()
    margin = 2  # OpenCV wants the patch to lie clear of the border
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    top, left = max(0, y - margin), max(0, x - margin)
    here = np.s_[top : y + height + margin, left : x + width + margin]
    around, patch, inside = source[here], drawn[here], mask[here]
    if inside.size <= MAX_CLONED:
        cloned = _seamless(around, np.rint(patch).clip(0, 255).astype(np.uint8), inside)
    else:
        cloned = _seamless_small(around, patch, inside)
    result = source.copy()
    result[here][inside] = cloned[inside]
    return result


def _seamless(source: Pixels, drawn: Pixels, mask: BoolArray) -> Pixels:
    """OpenCV leaves the outermost ring of a mask as it is in `source`, and wants the patch to lie clear of the border: at the
    picture's border the ring is put outside, where it is cut off again."""
    ring, clear = 2, 2
    both = ring + clear
    padded = [cv2.copyMakeBorder(a, both, both, both, both, cv2.BORDER_REPLICATE) for a in (source, drawn)]
    grey = cv2.copyMakeBorder(mask.astype(np.uint8) * 255, ring, ring, ring, ring, cv2.BORDER_REPLICATE)
    grey = cv2.copyMakeBorder(grey, clear, clear, clear, clear, cv2.BORDER_CONSTANT, value=0)
    x, y, width, height = cv2.boundingRect(grey)
    center = (x + width // 2, y + height // 2)
    cloned: npt.NDArray[np.uint8] = cv2.seamlessClone(padded[1], padded[0], grey, center, cv2.NORMAL_CLONE)
    return cloned[both:-both, both:-both]


def _seamless_small(source: Pixels, drawn: npt.NDArray[np.float32], mask: BoolArray) -> Pixels:
    """As `_seamless`, within the memory of MAX_CLONED pixels."""
    height, width = mask.shape
    scale = (MAX_CLONED / mask.size) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    small_source = cv2.resize(source, size, interpolation=cv2.INTER_AREA)
    small_drawn = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)
    small_bytes = np.rint(small_drawn).clip(0, 255).astype(np.uint8)
    small_mask = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    shift = _seamless(small_source, small_bytes, small_mask).astype(np.float32) - small_bytes
    # outside the mask the shift means nothing: the nearest one inside stands there when it is enlarged
    nearest = ndimage.distance_transform_edt(~small_mask, return_distances=False, return_indices=True)
    shift = shift[tuple(nearest)]
    result = np.empty_like(source)
    for channel in range(source.shape[2]):  # one at a time: they are large
        enlarged = cv2.resize(shift[..., channel], (width, height), interpolation=cv2.INTER_LINEAR)
        result[..., channel] = np.rint(drawn[..., channel] + enlarged).clip(0, 255)
    return result


@torch.enable_grad()
def tune_to_source(vae: AutoencoderKL, latents: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, steps: int,
                   tuned: str = "weights") -> torch.Tensor:  # fmt: skip
    """Decodes so that the outside comes out as in the source: tunes a copy of the decoder's weights, or the latents, on
    MSE(inside, as decoded before) + 100 * MSE(outside, the source).

    latents (1, C, h, w), scaled; source (1, 3, H, W) in [-1, 1]; mask (1, 1, H, W), 1 where edited; `tuned` is 'weights'
    or 'latents'. Returns (1, 3, H, W) in [0, 1], fp32. The VAE stays as it was.
    """
    own = deepcopy(vae).float()
    values = (latents.float() / vae.config["scaling_factor"]).detach().clone()
    with torch.no_grad():
        before = own.decode(values).sample
    moving = [values.requires_grad_(True)] if tuned == "latents" else list(own.decoder.parameters())
    for parameter in moving:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(moving, lr=LEARNING_RATES[tuned])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for _ in range(steps):
        decoded = own.decode(values).sample
        inside, outside = (decoded - before) * mask, (decoded - source) * (1 - mask)
        loss = inside.pow(2).mean() + OUTSIDE_WEIGHT * outside.pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pixels: torch.Tensor = own.decode(values).sample
        return (pixels / 2 + 0.5).clamp(0, 1)
