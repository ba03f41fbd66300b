"""Class-prior pictures: what the base model itself draws for the class prompt, made once and kept as latents.

Knows the base model and a prompt. Knows nothing of assets.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .base_model import BaseModel
from .config import PriorConfig
from .denoise import denoise, initial_latents, make_scheduler
from .prompts import tokenize_prompt

BATCH = 8  # pictures denoised together


@dataclass(frozen=True)
class PriorData:
    """`latents[k]` was drawn for `prompts[k % len(prompts)]`."""

    prompts: tuple[str, ...]
    latents: torch.Tensor
    """(N, C, h, w), scaled, fp32"""

    def pick(self, index: int) -> tuple[str, torch.Tensor]:
        """-> (prompt, latents (1, C, h, w))"""
        index %= len(self.latents)
        return self.prompts[index % len(self.prompts)], self.latents[index : index + 1]


def make_prior(base: BaseModel, config: PriorConfig, resolution: int, seed: int, cache_folder: Path | None = None,
               on_progress: Callable[[int, int], None] | None = None) -> PriorData:  # fmt: skip
    """Draws `num_class_images` latents, or reads them from `cache_folder` when the same were drawn before."""
    prompts = tuple(p.strip() for p in config.class_prompt.split("|") if p.strip())
    key = json.dumps([base.fingerprint, asdict(config), resolution, seed, str(base.dtype), base.device.type], sort_keys=True)
    cached = cache_folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors" if cache_folder else None
    if cached and cached.exists():
        return PriorData(prompts, load_file(cached)["latents"].to(base.device))
    size = resolution // base.vae_factor
    shape = (int(base.unet.config["in_channels"]), size, size)
    scheduler = make_scheduler("ddim", base.scheduler)
    rows = []
    for first in range(0, config.num_class_images, BATCH):
        count = min(BATCH, config.num_class_images - first)
        with torch.no_grad():
            ids = [tokenize_prompt(base.tokenizer, prompts[k % len(prompts)], []).input_ids for k in range(first, first + count)]
            states = base.encode_prompt(torch.tensor(ids))
            empty = base.encode_prompt(torch.tensor([tokenize_prompt(base.tokenizer, "", []).input_ids]))
        noise = initial_latents(shape, seed + first, count, base.device)
        rows.append(denoise(base.unet, scheduler, noise, states, empty, config.sampling_steps, config.guidance_scale))
        if on_progress:
            on_progress(first + count, config.num_class_images)
    latents = torch.cat(rows)
    if cached:
        cached.parent.mkdir(parents=True, exist_ok=True)
        temporary = cached.with_suffix(f".{os.getpid()}.tmp")
        save_file({"latents": latents.cpu()}, temporary)
        os.replace(temporary, cached)
    return PriorData(prompts, latents)
