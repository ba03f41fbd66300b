"""What a learning step sees: union sampling, flips, cached latents, and a typed Batch.

Knows an instance's latents and masks. Knows nothing of losses or optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .base_model import BaseModel
from .instance import FittedInstance
from .prompts import join_assets


@dataclass(frozen=True)
class Batch:
    """One training step's instance side: `B` draws of the same subset of assets."""

    assets: tuple[int, ...]
    """Indices of the sampled assets, in the prompt's order."""
    tokens: tuple[str, ...]
    """Their tokens, in the same order."""
    prompt: str
    latents: torch.Tensor
    """(B, C, h, w), scaled"""
    union_mask: torch.Tensor
    """(1, 1, h, w) in [0, 1] at latent size"""
    asset_masks: torch.Tensor
    """(len(assets), 1, H, W) in [0, 1] at pixel size, in the order of `assets`"""


class InstanceData:
    """Both flips of one instance, encoded once; the VAE can be freed afterwards.

    The VAE's distribution is kept, not one sample of it: each step draws afresh, as encoding every step would.
    """

    def __init__(self, fitted: FittedInstance, base: BaseModel):
        self.count = len(fitted.masks)
        self.tokens = fitted.tokens
        image = pixels_to_tensor(fitted.image)
        masks = torch.stack([torch.from_numpy(np.asarray(m).copy()).float() / 255 for m in fitted.masks])[:, None]
        self.masks = {False: masks.to(base.device), True: masks.flip(-1).to(base.device)}  # (N, 1, H, W)
        self.moments = {False: encode(base, image), True: encode(base, image.flip(-1))}

    def sample(self, rng: np.random.Generator, generator: torch.Generator, draws: int, union_sampling: bool,
               flip_probability: float) -> Batch:  # fmt: skip
        """Draws a subset (size uniform in 1..N, random order), a flip, and `draws` latents."""
        size = int(rng.integers(1, self.count + 1)) if union_sampling else self.count
        assets = tuple(int(i) for i in rng.permutation(self.count)[:size])
        flip = bool(rng.random() < flip_probability)
        mean, std = self.moments[flip]
        noise = torch.randn((draws, *mean.shape[1:]), generator=generator).to(mean)
        masks = self.masks[flip][list(assets)]
        union = masks.amax(0, keepdim=True)
        union = torch.nn.functional.interpolate(union, mean.shape[-2:], mode="area")
        tokens = tuple(self.tokens[i] for i in assets)
        return Batch(assets, tokens, join_assets(tokens), mean + std * noise, (union > 0.5).float(), masks)


def encode(base: BaseModel, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and standard deviation of the scaled latents, each (B, C, h, w), fp32."""
    with torch.no_grad(), base.lend_vae() as vae:
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    scale = base.vae.config["scaling_factor"]
    return posterior.mean.float() * scale, posterior.std.float() * scale


def pixels_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> (1, 3, H, W) in [-1, 1]."""
    array = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    return array.permute(2, 0, 1)[None].float() / 127.5 - 1
