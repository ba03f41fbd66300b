"""The jobs' heaviest moments run on the meta device: their tensors' bytes without their numbers.

Runs the project's own adapters, processors, guidance and losses on parts built from configurations alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig

from ..attention.backend import Backend, use_backend
from ..attention.bounded import BoundedAttention, ForwardPass, bound_attention
from ..attention.record import AttentionRecorder, RecordingProcessor
from ..attention.sites import Site, choose_sites, use_processors
from ..boxes import Box, Layout
from ..config import AttentionTerms, SynthesisConfig
from ..editing.blending import tune_to_source
from ..learning.losses import masked_diffusion_loss, penalty_loss
from ..model.base import BaseModel
from ..model.base_config import SIZE_NUMBERS
from ..model.embedding import use_assets
from ..model.families import family_of
from ..model.load_base import tile_vae
from ..model.lora import add_adapters
from ..model.prompt_embeds import PromptEmbeds, joined, predict
from ..model.quantize import quantizable
from ..model.shapes import native_latents
from ..prompts import TokenizedPrompt, asset_token
from ..sampling.guidance import LatentGuidance, MaskRefinement
from .live_bytes import LiveBytes, Peak, fused_attention_cost

MAPS = "attention maps and masks"


@dataclass(frozen=True)
class Model:
    """A base model's configurations."""

    name: str
    shape: str
    """JSON: part -> configuration; text, so that it can key a cache"""

    @cached_property
    def configs(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.shape)  # type: ignore[no-any-return]

    @property
    def family(self) -> str:
        """By which presets are chosen."""
        return "toybox" if self.name == "toybox" else family_of(self.configs["unet"]).name

    @property
    def vae_factor(self) -> int:
        return 1 << (len(self.configs["vae"]["block_out_channels"]) - 1)

    @property
    def native_resolution(self) -> int:
        return native_latents(self.configs["unet"]) * self.vae_factor

    def check_side(self, resolution: int | None) -> int:
        """Pixels; None is the model's own. Raises InputError for a side that the model cannot take."""
        side = self.native_resolution if resolution is None else resolution
        build(self, torch.float32).check_side("the resolution", side)
        return side

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Numbers of weights: the parts, the UNet's linear layers that NF4 takes, and the largest of those."""
        base = build(self, torch.float32)
        parts = {"unet": [base.unet], "text_encoder": base.text_encoders, "vae": [base.vae]}
        counted = {name: sum(p.numel() for part in found for p in part.parameters()) for name, found in parts.items()}
        linear = [m.weight.numel() for m in quantizable(base.unet).values()]
        return {**counted, "unet linear": sum(linear), "largest linear": max(linear)}


@dataclass(frozen=True)
class LearningTrace:
    peak: Peak
    trainable: tuple[int, ...]
    """Weights of each trained tensor that is on the GPU"""


def build(model: Model, dtype: torch.dtype) -> BaseModel:
    """The parts on the meta device, frozen; no tokenizer."""
    configs = model.configs
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        encoders = [getattr(transformers, t.kind)(CLIPTextConfig(**configs[t.encoder])) for t in family_of(configs["unet"]).texts]
    for part in (unet, vae, *encoders):
        part.requires_grad_(False).eval().to(dtype)
    scheduler = DDIMScheduler.from_config(configs["scheduler"])
    second = encoders[1] if len(encoders) > 1 else None
    return BaseModel(model.name, model.name, None, "", None, encoders[0], vae, unet, scheduler, text_encoder_2=second)


def _known(*parts: torch.nn.Module) -> list[torch.Tensor]:
    return [t for part in parts for t in (*part.parameters(), *part.buffers())]


@contextmanager
def counting(base: BaseModel, backend: str) -> Iterator[LiveBytes]:
    """Within the block new tensors are counted; attention costs what `backend` costs."""
    known = _known(*base.parts.values())
    chosen = Backend("materialized" if backend == "materialized" else "sdpa", "")
    with use_backend(base.unet, chosen), fused_attention_cost(), LiveBytes(known) as live:
        yield live


# --- learning -----------------------------------------------------------------------------------


class _TaggedRecording(RecordingProcessor):
    """Its maps count as maps."""

    def __init__(self, site_name: str, recorder: AttentionRecorder, live: LiveBytes):
        super().__init__(site_name, recorder)
        self.live = live

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        with self.live.tagged(MAPS if self.live.tag == "activations" else self.live.tag):
            return super().attend(query, key, value, scale)


@lru_cache(maxsize=64)
def trace_learning(model: Model, resolution: int, dtype: torch.dtype, rows: int, assets: int, rank: int, text_lora: bool,
                   text_on_gpu: bool, checkpointing: bool, terms: AttentionTerms, backend: str) -> LearningTrace:  # fmt: skip
    """One step's forward and backward over `rows` latents; rank 0 is phase 1, 0 rows only counts what is trained."""
    base = build(model, dtype)
    trained: list[torch.nn.Parameter] = []
    if rank:
        for adapter in add_adapters(base, rank, text_lora and text_on_gpu).values():
            adapter.to("meta")
            trained += [p for p in adapter.parameters() if p.requires_grad]
    width = base.text_width
    first = int(model.configs["text_encoder"]["vocab_size"])
    with use_assets(base.text_encoders, range(first, first + assets), torch.empty((assets, width), device="meta")) as embedding:
        if text_on_gpu:
            trained.append(embedding.vectors)
        peak = Peak(0, {})
        if rows:
            if checkpointing:
                base.unet.enable_gradient_checkpointing()
            with counting(base, backend) as live:
                live.ignore(embedding.vectors)
                _step(model, base, live, trained, resolution, rows, assets, text_on_gpu, terms)
            peak = live.peak
    return LearningTrace(peak, tuple(p.numel() for p in trained))


def _step(model: Model, base: BaseModel, live: LiveBytes, trained: list[torch.nn.Parameter], resolution: int, rows: int,
          assets: int, text_on_gpu: bool, terms: AttentionTerms) -> None:  # fmt: skip
    """What a learning step computes, with the prior's row first where there are two."""
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: live.retag(p.grad, "gradients"))
    side = resolution // model.vae_factor
    channels = int(model.configs["unet"]["in_channels"])
    length = int(model.configs["text_encoder"]["max_position_embeddings"])
    latents = torch.empty((rows, channels, side, side), device="meta")
    timesteps = torch.empty((rows,), dtype=torch.long, device="meta")
    prompts = min(rows, 2)
    if text_on_gpu:
        prompt_embeds = base.encode_prompt(torch.empty((prompts, length), dtype=torch.long, device="meta"))
    else:
        prompt_embeds = _states(model, base, rows=prompts)
        prompt_embeds.states.requires_grad_(True)
    prompt_embeds = joined([prompt_embeds[:-1], prompt_embeds[-1:].expand(rows - prompts + 1)])
    sites = choose_sites(base.unet, terms.blocks, terms.levels)
    recorder = AttentionRecorder()
    with use_processors(base.unet, {s.name: _TaggedRecording(s.name, recorder, live) for s in sites}):
        recorder.open()
        prediction = predict(base.unet, latents, timesteps, prompt_embeds)
        maps = recorder.take()
        loss = masked_diffusion_loss(prediction, latents, latents[:, :1])
        for found in maps.values():
            for asset in range(assets):
                token = found[-1, :, asset]
                loss = loss + penalty_loss(token, torch.empty_like(token))
        del maps, prediction
        with live.tagged("workspace"):
            loss.backward()


# --- drawing ------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def trace_drawing(model: Model, resolution: int, dtype: torch.dtype, rows: int, backend: str) -> Peak:
    """One call of the UNet without gradients."""
    base = build(model, dtype)
    with torch.no_grad(), counting(base, backend) as live:
        _call_unet(model, base, resolution, rows)
    return live.peak


def _call_unet(model: Model, base: BaseModel, resolution: int, rows: int, texts: int = 1) -> None:
    side = resolution // model.vae_factor
    latents = torch.empty((rows, int(model.configs["unet"]["in_channels"]), side, side), device="meta", dtype=base.dtype)
    predict(base.unet, latents, torch.empty((), dtype=torch.long, device="meta"), _states(model, base, texts).expand(rows))


def _states(model: Model, base: BaseModel, texts: int = 1, rows: int = 1) -> PromptEmbeds:
    """Of texts one behind another, (rows, texts * L, D)."""
    length, width = model.configs["text_encoder"]["max_position_embeddings"], model.configs["unet"]["cross_attention_dim"]
    states = torch.empty((rows, texts * length, width), device="meta", dtype=base.dtype)
    if not base.layout.pooled:
        return PromptEmbeds(states)
    pooled = int(model.configs[base.layout.encoders[-1]]["projection_dim"])
    sizes = (torch.empty((rows, numbers), device="meta", dtype=base.dtype) for numbers in (pooled, SIZE_NUMBERS))
    return PromptEmbeds(states, *sizes)


class BoxedControl(BoundedAttention):
    """What sees what is known from the boxes alone, where refined masks have no values."""

    def known_masks(self, size: tuple[int, int]) -> Iterable[npt.NDArray[np.bool_]]:
        return [self.box_masks(size)] * (1 if self._refined is None else len(self._refined))


class _TaggedControl(BoxedControl):
    """Its masks and wanted maps count as such."""

    live: LiveBytes

    def visible(self, site: Site) -> torch.Tensor | None:
        with self.live.tagged(MAPS):
            return super().visible(site)

    def note(self, site: Site, probabilities: torch.Tensor) -> None:
        self.live.retag(probabilities, MAPS)
        super().note(site, probabilities)


def spread_boxes(assets: int) -> Layout:
    """Small boxes in two rows: each asset's pixels see nearly everything, so attention keeps much.

    Not the most there is: with three tiny or overlapping boxes a guidance pass takes up to 0.06 GiB more (sd2.1,
    1024 pixels, bf16).
    """
    columns = -(-assets // 2)
    corners = [((k % columns) / columns, (k // columns) / 2) for k in range(assets)]
    boxes = tuple(Box(x, y, x + 0.5 / columns, y + 0.25) for x, y in corners)
    return Layout(tuple(asset_token(i) for i in range(assets)), boxes)


@lru_cache(maxsize=64)
def trace_placing(model: Model, resolution: int, dtype: torch.dtype, batch: int, layout: Layout, config: SynthesisConfig,
                  backend: str) -> tuple[Peak, Peak]:  # fmt: skip
    """A guidance pass with its gradient, and bounded sampling passes after it."""
    base = build(model, dtype)
    side = resolution // model.vae_factor
    assets, length = len(layout), int(model.configs["text_encoder"]["max_position_embeddings"])
    positions: dict[str, tuple[int, ...]] = {token: (1 + i,) for i, token in enumerate(layout.tokens)}
    prompt = TokenizedPrompt(list(range(length)), positions, (), assets + 1, assets + 2)
    control = _TaggedControl(prompt, layout, (side, side), "meta", config.own_text and config.bounded, config.bounded,
                             sampling=ForwardPass(batch))  # fmt: skip
    texts = len(control.texts)
    guidance = LatentGuidance(base.unet, control, config.guidance, _states(model, base))
    with counting(base, backend) as live, bound_attention(base.unet, control):
        control.live = live
        latents = torch.empty((batch, int(model.configs["unet"]["in_channels"]), side, side), device="meta", requires_grad=True)
        losses = guidance.losses(0, torch.empty((), dtype=torch.long, device="meta"), latents)
        with live.tagged("workspace"):
            torch.autograd.grad(losses.sum(), latents)
        guided = live.peak
        del losses
        live.peak = Peak(0, {})
        with torch.no_grad():
            _call_unet(model, base, resolution, 2 * batch, texts)
            if config.bounded and config.refinement.enabled:  # refined masks are a picture's own, and maps are kept for it
                control.refine(torch.empty((batch, assets, side, side), dtype=torch.bool, device="meta"))
                MaskRefinement(base.unet, control, config.refinement, 0).before(0)
                _call_unet(model, base, resolution, 2 * batch, texts)
    return guided, live.peak


@lru_cache(maxsize=64)
def trace_vae(model: Model, resolution: int, dtype: torch.dtype, decode: bool, tiled: bool) -> Peak:
    """Encoding or decoding one picture."""
    base = build(model, dtype)
    if tiled:
        tile_vae(base.vae)
    side = resolution // model.vae_factor
    with torch.no_grad(), counting(base, "sdpa") as live:
        if decode:
            channels = int(model.configs["vae"]["latent_channels"])
            pixels = base.vae.decode(torch.empty((1, channels, side, side), device="meta", dtype=dtype)).sample
            (pixels.float() / 2 + 0.5).clamp(0, 1)
        else:
            base.vae.encode(torch.empty((1, 3, resolution, resolution), device="meta", dtype=dtype))
    return live.peak


@lru_cache(maxsize=64)
def trace_tuning(model: Model, resolution: int, dtype: torch.dtype, tiled: bool, tuned: str) -> Peak:
    """Bringing back a picture's background by tuning a copy of the decoder, or the latents; two steps are as good as 75."""
    base = build(model, dtype)
    if tiled:
        tile_vae(base.vae)
    side = resolution // model.vae_factor
    latents, image, mask = (torch.empty(shape, device="meta") for shape in (
        (1, int(model.configs["vae"]["latent_channels"]), side, side), (1, 3, resolution, resolution),
        (1, 1, resolution, resolution)))  # fmt: skip
    with counting(base, "sdpa") as live:
        tune_to_source(base.vae, latents, image, mask, 2, tuned)
    return live.peak
