"""Plain samples of a prompt, without boxes: a quick look at what a model draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from ..io.sheets import to_images
from ..io.threads import one_thread_an_operation
from ..model.base import BaseModel
from ..model.prompt_embeds import ImageSize
from ..presets import synthesis_preset
from ..prompts import tokenize_prompt
from .denoise import denoise, initial_latents

PREVIEW_STEPS = 20


def sample_prompts(base: BaseModel, prompts: Sequence[str], tokens: Sequence[str], seed: int,
                   steps: int = PREVIEW_STEPS, resolution: int | None = None,
                   on_progress: Callable[[int, int], None] | None = None) -> list[Image.Image]:  # fmt: skip
    """One plain sample per prompt, as a quick look; no boxes. `resolution`: the side in pixels, the model's own by default."""
    side = (resolution or base.resolution) // base.vae_factor
    most = base.memory.max_batch
    images: list[Image.Image] = []
    total = steps * -(-len(prompts) // most)
    for first in range(0, len(prompts), most):  # picture k has seed `seed + k` however they are grouped

        def progress(step: int, of: int, first: int = first) -> None:
            if on_progress:
                on_progress(min(total, steps * (first // most) + step * steps // of), total)

        group = prompts[first : first + most]
        images += _sample_together(base, group, tokens, seed + first, steps, side, progress)
    return images


def _sample_together(base: BaseModel, prompts: Sequence[str], tokens: Sequence[str], seed: int, steps: int, side: int,
                     on_progress: Callable[[int, int], None]) -> list[Image.Image]:  # fmt: skip
    """`side` is that of the latents."""
    latents = initial_latents((int(base.unet.config["in_channels"]), side, side), seed, len(prompts), base.device)
    with torch.no_grad(), one_thread_an_operation(base.is_small):
        ids = [tokenize_prompt(base.tokenizer, p, [t for t in tokens if t in p]).input_ids for p in prompts]
        size = ImageSize((side * base.vae_factor,) * 2, (side * base.vae_factor,) * 2)
        prompt_embeds = base.encode_prompt(torch.tensor(ids), size)
        empty = base.encode_negative(torch.tensor([tokenize_prompt(base.tokenizer, "", []).input_ids]), size)
        scale = synthesis_preset(base.family).guidance_scale
        latents = denoise(base.unet, base.sampler("ddim"), latents, prompt_embeds, empty, steps, scale, on_progress=on_progress)
        return to_images(base.decode(latents))
