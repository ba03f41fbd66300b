"""Class-prior pictures: what the base model itself draws for the class prompt, made once and kept as latents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..config import PriorConfig
from ..io.files import write_file
from ..io.json_text import json_text, named_infinities
from ..io.tensor_file import Damaged, read_header, read_state, write_state
from ..io.threads import map_in_order
from ..model.base import BaseModel
from ..model.finite import check_latents
from ..model.prompt_embeds import ImageSize
from ..prompts import check_class_prompt, tokenize_prompt
from ..sampling.denoise import denoise, initial_latents


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


def make_prior(base: BaseModel, config: PriorConfig, resolution: int | tuple[int, int], seed: int,
               cache_folder: Path | None = None,
               on_progress: Callable[[int, int], None] | None = None) -> PriorData:  # fmt: skip
    """Draws `num_class_images` latents, or reads them from `cache_folder` when the same were drawn before. `resolution`: in
    pixels, a square's side or (height, width).

    Raises InputError for a class prompt that is empty or too long, when the cache cannot be written, and where the base model
    draws no picture.
    """
    prompts = class_prompts(config)
    base.check_steps("ddim", config.sampling_steps)
    scheduler = base.sampler("ddim")
    sampler = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}  # other settings draw other pictures
    weights = f"{base.dtype} {'nf4' if base.memory.nf4 else ''}".strip()
    pixels = (resolution, resolution) if isinstance(resolution, int) else resolution
    named = pixels[0] if pixels[0] == pixels[1] else pixels
    key = json_text([base.fingerprint, asdict(config), named, seed, weights, base.device.type,
                     named_infinities(sampler)], sort_keys=True, default=str)  # fmt: skip
    cached = cache_folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors" if cache_folder else None
    shape = (int(base.unet.config["in_channels"]), pixels[0] // base.vae_factor, pixels[1] // base.vae_factor)
    known = _read_cache(cached, key, (config.num_class_images, *shape))
    if known is not None:
        return PriorData(prompts, known.to(base.device))
    latents = draw_latents(base, config, prompts, (), config.num_class_images, pixels, seed, on_progress)
    if cached:
        with write_file(cached, overwrite=True) as temporary:
            write_state(temporary, latents, "prior", key)
    return PriorData(prompts, latents)


def draw_latents(base: BaseModel, config: PriorConfig, prompts: Sequence[str], tokens: Sequence[str], count: int,
                 size: tuple[int, int], seed: int,
                 on_progress: Callable[[int, int], None] | None = None) -> torch.Tensor:  # fmt: skip
    """(count, C, h, w): picture k is of prompts[k % len(prompts)], which may name `tokens`, drawn as `config` says.

    `size`: (height, width) in pixels. Raises InputError where the base model draws no picture.
    """
    image_size = ImageSize(size, size)
    shape = (int(base.unet.config["in_channels"]), size[0] // base.vae_factor, size[1] // base.vae_factor)
    named = [[token for token in tokens if token in prompt] for prompt in prompts]
    ids = [tokenize_prompt(base.tokenizer, p, own, "class prompt").input_ids for p, own in zip(prompts, named, strict=True)]

    def draw(first: int) -> torch.Tensor:
        """One batch, of the pictures from number `first` on: (B, C, h, w)"""
        own = range(first, min(first + base.memory.max_batch, count))
        with torch.no_grad():
            prompt_embeds = base.encode_prompt(torch.tensor([ids[k % len(ids)] for k in own]), image_size)
            empty = base.encode_negative(torch.tensor([tokenize_prompt(base.tokenizer, "", []).input_ids]), image_size)
        noise = initial_latents(shape, seed + first, len(own), base.device)
        return denoise(base.unet, base.sampler("ddim"), noise, prompt_embeds, empty, config.sampling_steps, config.guidance_scale)

    rows, done = [], 0
    for latents in map_in_order(draw, range(0, count, base.memory.max_batch), base.is_small):
        rows.append(latents)
        done += len(latents)
        if on_progress:
            on_progress(done, count)
    latents = torch.cat(rows)
    check_latents(latents, base.parts)
    return latents


def class_prompts(config: PriorConfig) -> tuple[str, ...]:
    """The prompts that take turns. Raises InputError when there is none, or one names an asset."""
    return check_class_prompt(config.class_prompt)


def _read_cache(path: Path | None, key: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    """(N, C, h, w), or None when it was never written, is damaged, or is of another prior, and has to be drawn again."""
    if path is None or not os.path.lexists(path):
        return None
    try:
        latents = read_state(path)  # with its checksum
        identity = read_header(path).identity
    except Damaged:
        return None
    fits = isinstance(latents, torch.Tensor) and latents.shape == shape and identity == key
    return latents if fits and bool(torch.isfinite(latents).all()) else None
