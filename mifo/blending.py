"""Bringing back what lies outside the mask: pasted, cloned seamlessly, or by tuning the decoder to one picture.

Knows pixels, latents and a VAE. Knows nothing of prompts or of how the latents came about.
Source: Blended Latent Diffusion (arXiv 2206.02779), section 4.2; Poisson image editing (Perez et al. 2003), by OpenCV.
"""

from __future__ import annotations

from copy import deepcopy

import cv2
import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from scipy import ndimage

BoolArray = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

#: weight of the part outside the mask in `tune_to_source`, as published
OUTSIDE_WEIGHT = 100.0
LEARNING_RATES = {"weights": 5e-4, "latents": 5e-2}


def feather(mask: BoolArray, width: float) -> npt.NDArray[np.float32]:
    """(H, W) weight of what is drawn: 0 outside the mask, rising to 1 over `width` pixels inside it.

    In a mask too narrow for that it rises over a quarter of its half width, so that a thin one is not faded out.
    """
    if mask.all():
        return np.ones(mask.shape, np.float32)
    distance = ndimage.distance_transform_edt(mask)  # 1 on the first pixel inside
    return np.clip(distance / (min(width, distance.max() / 4) + 1), 0, 1).astype(np.float32)


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

    A mask without an outside has no edge to start from, and takes `drawn` as it is.
    """
    drawn_bytes = np.rint(drawn).clip(0, 255).astype(np.uint8)
    if mask.all():
        return drawn_bytes
    # OpenCV wants the patch to lie clear of the picture's border; a repeated edge is out of the mask and cut off again
    margin = 2
    padded = [cv2.copyMakeBorder(a, margin, margin, margin, margin, cv2.BORDER_REPLICATE) for a in (source, drawn_bytes)]
    grey = cv2.copyMakeBorder(mask.astype(np.uint8) * 255, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0)
    x, y, width, height = cv2.boundingRect(grey)
    center = (x + width // 2, y + height // 2)
    cloned = cv2.seamlessClone(padded[1], padded[0], grey, center, cv2.NORMAL_CLONE)[margin:-margin, margin:-margin]
    return np.where(mask[..., None], cloned, source)


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
        return (own.decode(values).sample / 2 + 0.5).clamp(0, 1)
