"""What `learn` shows: attention maps over training, attention inside the masks, preview pictures, versions."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..attention.record import record_attention, token_maps
from ..attention.sites import choose_sites
from ..config import AttentionTerms
from ..data.instance import Instance, fit
from ..io.sheets import ASSET_COLORS, PAPER, caption_below, grid, outline
from ..model.base import BaseModel
from ..model.finite import blame
from ..model.prompt_embeds import predict
from ..prompts import join_assets, tokenize_prompt
from ..sampling.sample import PREVIEW_STEPS, sample_prompts
from .dataset import InstanceData

PROBE_TIMESTEPS = (100, 250, 400)  # below 500, where the attention terms apply
NEAREST = Image.Resampling.NEAREST


def environment() -> dict[str, Any]:
    """Versions of what the result depends on."""
    packages = ("torch", "diffusers", "peft", "transformers", "accelerate", "bitsandbytes")
    return {"versions": {"python": platform.python_version(), **{p: _version(p) for p in packages}}}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@torch.no_grad()
def snapshot_maps(base: BaseModel, data: InstanceData, tokens: Sequence[str], terms: AttentionTerms) -> torch.Tensor:
    """Where each asset's token looks in the learned picture itself: (N, h, w), mean over sites and probe timesteps.

    Maps of all supervised sites at the largest supervised size; fixed noise, so that snapshots can be compared.
    """
    sites = choose_sites(base.unet, terms.blocks, terms.levels)
    prompt = tokenize_prompt(base.tokenizer, join_assets(list(tokens)), tokens)
    prompt_embeds = base.encode_prompt(torch.tensor([prompt.input_ids]), data.size)
    mean, _ = data.moments[False]
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    size = mean.shape[-2:]
    largest = max(s.map_size(*size) for s in sites)
    total = torch.zeros((len(tokens), *largest), device=mean.device)
    with record_attention(base.unet, sites) as recorder:
        for timestep in PROBE_TIMESTEPS:
            steps = torch.tensor([timestep], device=mean.device)
            recorder.open()
            predict(base.unet, base.scheduler.add_noise(mean, noise, steps), steps, prompt_embeds)
            maps = recorder.take()
            for index, token in enumerate(tokens):
                for found in token_maps(maps, sites, prompt.asset_positions[token], 0, (size[0], size[1])):
                    total[index] += F.interpolate(found[None, None].float(), largest, mode="bilinear")[0, 0]
    return total / (len(sites) * len(PROBE_TIMESTEPS))


def attention_shares(base: BaseModel, data: InstanceData, tokens: Sequence[str], terms: AttentionTerms) -> list[float]:
    """Per asset, the share of its token's attention that falls inside its mask.

    Raises InputError or NotFinite where the maps are not finite.
    """
    maps = snapshot_maps(base, data, tokens, terms)  # (N, h, w)
    if not bool(torch.isfinite(maps).all()):
        raise blame("the attention maps", maps, base.parts)
    masks = F.interpolate(data.masks[False], maps.shape[-2:], mode="area")[:, 0]
    return [float((m * k).sum() / m.sum().clamp(min=1e-8)) for m, k in zip(maps, masks, strict=True)]


def draw_attention_sheet(snapshots: Sequence[tuple[str, torch.Tensor]], instance: Instance,
                         tokens: Sequence[str]) -> Image.Image:  # fmt: skip
    """One row per asset: its mask, then where its token looked as training went on."""
    side = 128
    cells = []
    for index, token in enumerate(tokens):
        cells.append(caption_below(_outlined(instance, [index], side), token))
        for label, maps in snapshots:
            cells.append(caption_below(_heat(maps[index], side), label))
    return grid(cells, columns=1 + len(snapshots))


def _heat(attention: torch.Tensor, side: int) -> Image.Image:
    """(h, w) map -> black over orange to yellow, scaled to its own maximum, as large as it fits into a square of `side`."""
    values = (attention / attention.max().clamp(min=1e-8)).cpu().numpy() * 255
    height, width = attention.shape
    size = max(1, round(side * width / max(attention.shape))), max(1, round(side * height / max(attention.shape)))
    red = Image.fromarray(values.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    heat = Image.merge("RGB", (red, red.point(lambda v: v * v // 255), red.point(lambda v: v // 3)))
    if size == (side, side):
        return heat
    padded = Image.new("RGB", (side, side), PAPER)
    padded.paste(heat, ((side - size[0]) // 2, (side - size[1]) // 2))
    return padded


def save_attention_film(path: Path, snapshots: Sequence[tuple[str, torch.Tensor]], instance: Instance,
                        tokens: Sequence[str]) -> None:  # fmt: skip
    """`draw_attention_sheet` as an animated WebP: a frame a snapshot, the assets beside each other, their masks above."""
    side = 192
    masks = [caption_below(_outlined(instance, [index], side), token) for index, token in enumerate(tokens)]
    frames = [grid([*masks, *(caption_below(_heat(maps[index], side), label) for index in range(len(tokens)))], len(tokens))
              for label, maps in snapshots]  # fmt: skip
    frames[0].save(path, "WEBP", save_all=True, append_images=frames[1:], duration=700, loop=0, quality=80)


def draw_preview(instance: Instance, base: BaseModel, tokens: Sequence[str], seed: int, resolution: int | None = None,
                 on_progress: Callable[[int, int], None] | None = None) -> Image.Image:  # fmt: skip
    """The picture with its masks outlined, and one sample per asset, at the resolution that was learned."""
    side = 192
    cells = [caption_below(_outlined(instance, range(len(tokens)), side), instance.name)]
    prompts = [f"a photo of {t}" for t in tokens]
    images = sample_prompts(base, prompts, tokens, seed, PREVIEW_STEPS, resolution, on_progress)
    cells += [caption_below(image.resize((side, side), NEAREST), t) for image, t in zip(images, tokens, strict=True)]
    return grid(cells, columns=len(cells))


def _outlined(instance: Instance, indices: Sequence[int] | range, side: int) -> Image.Image:
    """The picture at `side` x `side` pixels with the masks' edges; shrunk first, because a photo's edges take minutes."""
    image = fit(instance.image, side, PAPER, Image.Resampling.LANCZOS)
    for index in indices:
        mask = fit(instance.masks[index], side, 0, Image.Resampling.NEAREST)
        image = outline(image, mask, ASSET_COLORS[index % len(ASSET_COLORS)])
    return image
