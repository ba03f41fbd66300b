"""What drawing takes beside the weights: a guidance pass with its gradient, sampling passes, decoding. For measure_memory.py."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from mifo.attention.bounded import BoundedAttention, ForwardPass, bound_attention
from mifo.attention.sites import attention_sites
from mifo.config import SynthesisConfig
from mifo.io.json_text import json_text, record_text
from mifo.model.base import BaseModel
from mifo.model.base_config import SIZE_NUMBERS
from mifo.model.prompt_embeds import PromptEmbeds, predict
from mifo.model.shapes import shape_of
from mifo.planning.live_bytes import LiveBytes
from mifo.planning.trace import BoxedControl, Model, trace_placing, trace_vae
from mifo.prompts import TokenizedPrompt, asset_token
from mifo.sampling.guidance import LatentGuidance, MaskRefinement
from scripts.performance.bench_setup import boxes_for

GIB = 2**30
PIECES = ("guidance", "sampling", "decode")


def planned(model: Model, resolution: int, dtype: torch.dtype, assets: int) -> dict[str, float]:
    """GiB by piece."""
    guidance, sampling = trace_placing(model, resolution, dtype, 1, boxes_for(assets), SynthesisConfig(), "sdpa")
    peaks = (guidance, sampling, trace_vae(model, resolution, dtype, True, False))
    return {piece: peak.total / GIB for piece, peak in zip(PIECES, peaks, strict=True)}


def draw(base: BaseModel, piece: str, resolution: int, assets: int, between: Callable[[], Any] = lambda: None) -> None:
    """Runs one piece as `synthesize` does; `between` is called between two passes of the UNet."""
    side, config = resolution // base.vae_factor, SynthesisConfig()
    positions: dict[str, tuple[int, ...]] = {asset_token(i): (1 + i,) for i in range(assets)}
    length = int(base.text_encoder.config.max_position_embeddings)
    prompt = TokenizedPrompt(list(range(length)), positions, (), assets + 1, assets + 2)
    latents = torch.zeros((1, int(base.unet.config["in_channels"]), side, side), device=base.device)
    timestep = torch.tensor(900, device=base.device)
    if piece == "decode":
        with torch.no_grad():
            (base.vae.decode(latents.to(base.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
        return
    control = BoxedControl(prompt, boxes_for(assets), (side, side), base.device, config.own_text)
    shape = (1, len(control.texts) * length, int(base.unet.config["cross_attention_dim"]))
    prompt_embeds = PromptEmbeds(torch.zeros(shape, dtype=base.dtype, device=base.device), *_of_picture(base))
    with bound_attention(base.unet, control):
        if piece == "guidance":
            latents.requires_grad_(True)
            alone = prompt_embeds.first_tokens(length)
            losses = LatentGuidance(base.unet, control, config.guidance, alone).losses(0, timestep, latents)
            torch.autograd.grad(losses.sum(), latents)
            return
        control.begin(ForwardPass(unconditional=False, guiding=True))
        guiding_masks = _masks(base, control)  # they stay while it samples
        control.end()
        pair = (torch.cat([latents, latents]), timestep, prompt_embeds.expand(2))
        with torch.no_grad():
            predict(base.unet, *pair)
            del guiding_masks
            control.refine(control.subject_masks((side, side)).unflatten(-1, (side, side)))
            MaskRefinement(base.unet, control, config.refinement, 0).before(0)
            between()
            predict(base.unet, *pair)


def _of_picture(base: BaseModel) -> tuple[torch.Tensor, ...]:
    """One row of what SDXL's UNet is told of the picture as a whole; nothing for the others."""
    if not base.layout.pooled:
        return ()
    numbers = (int(base.text_encoders[-1].config.projection_dim), SIZE_NUMBERS)
    return tuple(torch.zeros((1, n), dtype=base.dtype, device=base.device) for n in numbers)


def _masks(base: BaseModel, control: BoundedAttention) -> list[torch.Tensor | None]:
    """Those that a guidance pass makes."""
    widths = {s.name: base.unet.get_submodule(s.name.removesuffix(".processor")).inner_dim for s in attention_sites(base.unet)}
    return [control.visible(s) for s in attention_sites(base.unet) if not control.groups(s, widths[s.name])]


def measured_for_real(shape: str, width_divisor: int, piece: str, resolution: int, assets: int, dtype: torch.dtype,
                      device: str) -> float:  # fmt: skip
    """GiB beside what was there: the GPU allocator's, or all tensors' on the CPU."""
    from scripts.performance.bench_setup import build_base

    base = build_base(shape, width_divisor, dtype, device)
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        draw(base, piece, resolution, assets)
        return float((torch.cuda.max_memory_allocated() - before) / GIB)
    with LiveBytes([t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]) as live:
        draw(base, piece, resolution, assets)
    return float(live.peak.total / GIB)


def rows(shape: str, width_divisor: int, resolution: int, dtype: torch.dtype, measure: Callable[[str], float],
         assets: int = 3) -> list[dict[str, Any]]:  # fmt: skip
    """A row a piece: planned, measured, and how far apart."""
    model = Model(shape, json_text(shape_of(shape, width_divisor)))
    found = []
    for piece, plan in planned(model, resolution, dtype, assets).items():
        measured = measure(piece)
        found.append({"piece": piece, "planned_gib": round(plan, 4), "measured_gib": round(measured, 4),
                      "plan_off_percent": round(100 * (plan / measured - 1), 1)})  # fmt: skip
        print(record_text(found[-1]), flush=True)
    return found
