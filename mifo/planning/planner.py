"""How much GPU memory a job will need, counted on the meta device without weights, and what to give up when it is too much."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..config import EditConfig, LearnConfig, MemoryConfig, RefinementConfig, SynthesisConfig
from ..errors import InputError
from ..io.json_text import json_text, named_infinities
from ..model.load_base import TOYBOX_FOLDER, model_configs
from ..model.quantize import NF4_BYTES
from ..model.shapes import SHAPES, shape_of
from ..model.single_file import is_single_file
from .live_bytes import Peak
from .trace import Model, spread_boxes, trace_drawing, trace_learning, trace_placing, trace_tuning, trace_vae

GIB = 2**30
RESERVE = GIB // 2
"""Kept free of the budget for the driver's context, libraries' workspaces and the allocator's gaps. Not measured."""
ITEMS = ("frozen weights", "VAE", "LoRA and rows", "gradients", "optimizer states", "activations", "attention maps and masks",
         "workspace")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that decides a job's memory, beside the model."""

    job: str
    resolution: int
    """Pixels of the square"""
    dtype: torch.dtype
    learn: LearnConfig
    synthesis: SynthesisConfig
    assets: int = 3
    batch: int = 1
    """Pictures drawn together by synthesize or edit"""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    backend: str = "sdpa"
    edit: EditConfig = field(default_factory=EditConfig)

    def __post_init__(self) -> None:
        """The drawing that an edit does is a synthesis without refined masks."""
        if self.job == "edit":
            drawing = replace(self.synthesis, bounded=self.edit.bounded, guidance=self.edit.guidance,
                              refinement=RefinementConfig(enabled=False))  # fmt: skip
            object.__setattr__(self, "synthesis", drawing)


@dataclass(frozen=True)
class Phase:
    """One stretch of a job and what is in memory at its peak, in bytes by item."""

    name: str
    items: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.items.values())


@dataclass(frozen=True)
class MemoryOption:
    """One thing to give up."""

    name: str
    cost: str
    turn: Callable[[Settings], Settings]


def _memory(**changes: Any) -> Callable[[Settings], Settings]:
    return lambda s: replace(s, memory=replace(s.memory, **changes))


_FREE_VAE = MemoryOption("VAE on the CPU when idle", "nothing but two moves: latents are cached", _memory(vae_on_cpu=True))
_TEXT = MemoryOption("text encoder on the CPU", "a slower text encoder", _memory(text_encoder_on_cpu=True))
_TILES = MemoryOption("tiled VAE", "small differences where tiles meet", _memory(tiled_vae=True))
_NF4 = MemoryOption("UNet in NF4", "4-bit weights: slower, and slightly other pictures", _memory(nf4=True))
#: What each job can give up, the cheapest first. Fused attention and cached latents cost nothing and are always on.
MEMORY_OPTIONS: dict[str, tuple[MemoryOption, ...]] = {
    "learn": (
        _FREE_VAE,
        MemoryOption("8-bit Adam", "coarser optimizer states",
             lambda s: replace(s, learn=replace(s.learn, lora=replace(s.learn.lora, use_8bit_adam=True)))),
        MemoryOption("prior and previews one by one", "a slower start", _memory(max_batch=1)),
        MemoryOption("gradient checkpointing", "about a third more time a step",
             lambda s: replace(s, learn=replace(s.learn, gradient_checkpointing=True))),
        _TEXT, _TILES, _NF4,
    ),
    "synthesize": (_FREE_VAE, _TEXT, _TILES, _NF4),
    "edit": (_FREE_VAE, _TEXT, _TILES, _NF4),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The settings that fit, or all that could be given up and still does not."""

    model: str
    settings: Settings
    phases: tuple[Phase, ...]
    budget: int | None
    given_up: tuple[str, ...] = ()
    """Names of what was turned on"""
    tried: tuple[tuple[str, str, int], ...] = field(default=())
    """(memory option, cost, peak in bytes with it and all before it)"""

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda p: p.peak)

    @property
    def fits(self) -> bool:
        return self.budget is None or self.largest.peak + RESERVE <= self.budget

    def check(self) -> None:
        """Raises InputError with the arithmetic when the budget is too small."""
        if self.fits or self.budget is None:
            return
        worst = self.largest
        parts = " + ".join(f"{n / GIB:.2f} {name}" for name, n in worst.items.items() if n >= 0.005 * GIB)
        raise InputError(
            f"{self.settings.job} with {self.model} at {self.settings.resolution} pixels does not fit into "
            f"{self.budget / GIB:.2f} GiB even with {', '.join(k.name for k in MEMORY_OPTIONS[self.settings.job])}: "
            f"{worst.name} needs "
            f"{parts} = {worst.peak / GIB:.2f} GiB, and {RESERVE / GIB:.2f} are kept for the driver; lower the size or raise "
            "--vram-gib"
        )


# --- models -------------------------------------------------------------------------------------


def read_model(name: str) -> Model:
    """Configurations of 'toybox', one of SHAPES, a local folder or a .safetensors file; reads no weights, downloads nothing.

    Raises InputError for anything else, for a folder that lacks a configuration, and for other kinds of model.
    """
    folder = TOYBOX_FOLDER if name == "toybox" else Path(name).expanduser()
    if name in SHAPES:
        return Model(name, json_text(shape_of(name)))
    if not name or not (folder.is_dir() or is_single_file(folder)):
        raise InputError(f"'{name}' cannot be planned for: expected {', '.join(SHAPES)}, toybox, a local folder or a .safetensors"
                         " file")  # fmt: skip
    shape = {part: {k: v for k, v in found.items() if k == "_diffusers_version" or not k.startswith("_")}
             for part, found in model_configs(folder).items()}  # fmt: skip
    shape["scheduler"] = named_infinities(shape["scheduler"])  # DPM-Solver's least lambda is minus infinity by right
    try:
        return Model(name, json_text(shape))
    except ValueError:
        raise InputError(f"the configuration of '{name}' has a number that is not finite; fetch or copy it again") from None


# --- phases -------------------------------------------------------------------------------------


def phases_of(model: Model, settings: Settings) -> tuple[Phase, ...]:
    """What the job's stretches need at their peaks."""
    return _learn_phases(model, settings) if settings.job == "learn" else _drawing_phases(model, settings)


def _learn_phases(model: Model, s: Settings) -> tuple[Phase, ...]:
    config, memory = s.learn, s.memory
    resident = _weights(model, s)
    encoded = trace_vae(model, s.resolution, s.dtype, False, memory.tiled_vae)
    decoded = trace_vae(model, s.resolution, s.dtype, True, memory.tiled_vae)
    phases = [Phase("encode", _with_vae(model, s, resident, encoded))]
    if config.composites.share:
        together = 2 * min(memory.max_batch, config.composites.num_backgrounds)
        phases.append(Phase("backgrounds", _merge(resident, trace_drawing(model, s.resolution, s.dtype, together, s.backend))))
        phases.append(Phase("backgrounds' decoding", _with_vae(model, s, resident, decoded)))
    preserved = config.prior.enabled and config.lora.train_steps > 0
    if preserved:
        drawn = trace_drawing(model, s.resolution, s.dtype, 2 * min(memory.max_batch, config.prior.num_class_images), s.backend)
        phases.append(Phase("prior", _merge(resident, drawn)))
    shown = trace_drawing(model, s.resolution, s.dtype, 2 * min(memory.max_batch, s.assets), s.backend)
    text = not memory.text_encoder_on_cpu
    for name, phase in (("phase 1", config.embedding), ("phase 2", config.lora)):
        if not phase.train_steps:
            continue
        rank = config.lora.rank if name == "phase 2" else 0
        rows = phase.draws + (1 if preserved and rank else 0)
        traced = trace_learning(model, s.resolution, s.dtype, rows, s.assets, rank, config.lora.text_encoder, text,
                                config.gradient_checkpointing, phase.attention, s.backend)  # fmt: skip
        learned = traced.trainable
        eight = bool(rank) and config.lora.use_8bit_adam and text
        states = sum(_state_bytes(n, eight) for n in learned)
        items = {**resident, "LoRA and rows": 4 * sum(learned), "optimizer states": states}
        if config.composites.share:  # made between two steps, when there are no activations and no gradients
            phases.append(Phase(f"{name}'s composites", _with_vae(model, s, items, encoded)))
        phases.append(Phase(name, _merge(items, traced.peak)))
    # the adapters and the optimizer's states are still there when the previews are drawn
    last = {k: phases[-1].items.get(k, 0) for k in ("LoRA and rows", "optimizer states")}
    phases.append(Phase("preview", _merge({**resident, **last}, shown)))
    phases.append(Phase("preview's decoding", _with_vae(model, s, {**resident, **last}, decoded)))
    return tuple(phases)


def _drawing_phases(model: Model, s: Settings) -> tuple[Phase, ...]:
    resident = _weights(model, s)
    rank = s.learn.lora.rank if s.learn.lora.train_steps else 0
    empty = trace_learning(model, s.resolution, s.dtype, 0, s.assets, rank, s.learn.lora.text_encoder,
                           not s.memory.text_encoder_on_cpu, False, s.learn.lora.attention, s.backend)  # fmt: skip
    resident["LoRA and rows"] = 4 * sum(empty.trainable)
    phases = []
    if s.job == "edit":
        encoded = trace_vae(model, s.resolution, s.dtype, False, s.memory.tiled_vae)
        phases.append(Phase("encode", _with_vae(model, s, resident, encoded)))
    if s.assets and (s.synthesis.bounded or s.job == "synthesize"):
        guidance, sampling = trace_placing(model, s.resolution, s.dtype, s.batch, spread_boxes(s.assets), s.synthesis, s.backend)
        if s.synthesis.guidance.enabled:
            phases.append(Phase("guidance", _merge(resident, guidance)))
    else:
        sampling = trace_drawing(model, s.resolution, s.dtype, 2 * s.batch, s.backend)
    phases.append(Phase("sampling", _merge(resident, sampling)))
    decoded = trace_vae(model, s.resolution, s.dtype, True, s.memory.tiled_vae)
    phases.append(Phase("decode", _with_vae(model, s, resident, decoded)))
    if s.job == "edit" and s.edit.background == "optimization":
        tuned = trace_tuning(model, s.resolution, s.dtype, s.memory.tiled_vae, s.edit.optimize)
        phases.append(Phase("background", _with_vae(model, s, resident, tuned)))
    return tuple(phases)


def _weights(model: Model, s: Settings) -> dict[str, int]:
    size, sizes = s.dtype.itemsize, model.sizes
    linear = sizes["unet linear"]
    unet = (sizes["unet"] - linear) * size + (int(linear * NF4_BYTES) if s.memory.nf4 else linear * size)
    text = 0 if s.memory.text_encoder_on_cpu else sizes["text_encoder"] * size
    vae = 0 if s.memory.vae_on_cpu else sizes["vae"] * size
    # an NF4 layer is unpacked for each use, one at a time
    return {"frozen weights": unet + text, "VAE": vae, "workspace": sizes["largest linear"] * size if s.memory.nf4 else 0}


def _with_vae(model: Model, s: Settings, resident: dict[str, int], traced: Peak) -> dict[str, int]:
    """The VAE at work: its weights and all that it makes count as the VAE's."""
    return _ordered({**resident, "workspace": 0, "VAE": model.sizes["vae"] * s.dtype.itemsize + traced.total})


def _merge(resident: dict[str, int], traced: Peak) -> dict[str, int]:
    return _ordered({**resident, **{t: resident.get(t, 0) + n for t, n in traced.by_tag.items()}})


def _ordered(items: dict[str, int]) -> dict[str, int]:
    unknown = set(items) - set(ITEMS)
    assert not unknown, unknown
    return {name: items.get(name, 0) for name in ITEMS}


def _state_bytes(weights: int, eight_bit: bool) -> int:
    """Adam's two moments of one tensor; bitsandbytes keeps tensors of fewer than 4096 weights in fp32."""
    return int(weights * (2 + 2 * 4 / 256)) if eight_bit and weights >= 4096 else 8 * weights


# --- fitting ------------------------------------------------------------------------------------


def make_plan(model: Model, settings: Settings, vram_gib: float | None = None) -> Plan:
    """Gives things up, the cheapest first, until every phase fits; then takes back those that were not needed.

    Without `vram_gib`, the plan of the settings as they are, with what giving up each would bring.
    """
    budget = None if vram_gib is None else int(vram_gib * GIB)
    phases = phases_of(model, settings)
    chain, tried, current, plan = [], [], settings, Plan(model.name, settings, phases, budget)
    for option in MEMORY_OPTIONS[settings.job]:
        if budget is not None and plan.fits:
            break
        turned = option.turn(current)
        if turned == current:
            continue
        current = turned
        chain.append(option)
        found = phases_of(model, current)
        tried.append((option.name, option.cost, max(p.peak for p in found)))
        if budget is not None:
            plan = Plan(model.name, current, found, budget)
    if budget is not None and plan.fits:
        chain, plan = _without_needless(model, settings, chain, plan)
    return replace(plan, given_up=tuple(k.name for k in chain) if budget is not None else (), tried=tuple(tried))


def _without_needless(model: Model, settings: Settings, chain: list[MemoryOption], plan: Plan) -> tuple[list[MemoryOption], Plan]:
    """What was given up early for nothing is taken back, the dearest first."""
    for option in reversed(chain[:-1]):
        shorter = [k for k in chain if k is not option]
        current = settings
        for each in shorter:
            current = each.turn(current)
        found = Plan(plan.model, current, phases_of(model, current), plan.budget)
        if found.fits:
            chain, plan = shorter, found
    return chain, plan
