"""Models, scenes, trainers and counting for the bench and the memory measurements. Random weights; nothing is read from disk."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTokenizer

from mifo.attention.record import record_attention
from mifo.attention.sites import choose_sites
from mifo.boxes import Box, Layout
from mifo.config import MemoryConfig
from mifo.data.instance import Instance, load_instance
from mifo.learning.dataset import InstanceData
from mifo.learning.learn import gradient_checkpointing, lend_adapters
from mifo.learning.optimizer import make_optimizer
from mifo.learning.prior import PriorData
from mifo.learning.trainer import Trainer
from mifo.model.base import BaseModel
from mifo.model.embedding import initial_vectors, use_assets
from mifo.model.families import family_of
from mifo.model.shapes import shape_of
from mifo.presets import learn_preset
from mifo.prompts import add_asset_tokens
from scripts.make_random_sd import sharpen, write_tokenizer


def build_base(name: str, width_divisor: int, dtype: torch.dtype, device: str, channels_last: bool = False,
               seed: int = 0) -> BaseModel:  # fmt: skip
    """The same weights for the same seed on one kind of device, whatever the dtype."""
    shape = shape_of(name, width_divisor)
    torch.manual_seed(seed)
    with torch.device(device):  # a GPU draws a billion random weights in no time, a CPU in a quarter of a minute
        parts: list[Any] = [sharpen(UNet2DConditionModel(**shape["unet"])), AutoencoderKL(**shape["vae"])]
        parts += [getattr(transformers, t.kind)(CLIPTextConfig(**shape[t.encoder])) for t in family_of(shape["unet"]).texts]
    for part in parts:
        part.requires_grad_(False).eval().to(device, dtype)
    if channels_last:
        parts[0].to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch) / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(Path(scratch) / "tokenizer")
    scheduler = DDIMScheduler(**shape["scheduler"])
    second = parts[3] if len(parts) > 3 else None
    return BaseModel(name, "random", None, "random", tokenizer, parts[2], parts[1], parts[0], scheduler, MemoryConfig(),
                     text_encoder_2=second)  # fmt: skip


def boxes_for(assets: int) -> Layout:
    """Side by side in two rows, so that the smallest map has a pixel for each."""
    columns = -(-assets // 2)
    places = [(k % columns, k // columns) for k in range(assets)]
    boxes = [Box((x + 0.05) / columns, (y + 0.1) / 2, (x + 0.95) / columns, (y + 0.9) / 2) for x, y in places]
    return Layout(tuple(f"<asset{i}>" for i in range(assets)), tuple(boxes))


def write_scene(assets: int, side: int) -> Instance:
    """Coloured rectangles where `boxes_for` has its boxes, on grey, with their masks."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "scene"
        folder.mkdir()
        image = Image.new("RGB", (side, side), "grey")
        for index, (_, box) in enumerate(boxes_for(assets)):
            corners = [round(side * v) for v in (box.x0, box.y0, box.x1, box.y1)]
            ImageDraw.Draw(image).rectangle(corners, fill=(200 - 20 * index, 25 * index, 90))
            mask = Image.new("L", (side, side))
            ImageDraw.Draw(mask).rectangle(corners, fill=255)
            mask.save(folder / f"mask{index}.png")
        image.save(folder / "img.png")
        return load_instance(folder)


@contextmanager
def make_trainer(base: BaseModel, instance: Any, options: Any, lora: bool) -> Iterator[Trainer]:
    """A trainer with its rows, adapters and optimizer in place, on random prior latents. `options`: as bench.Options."""
    config = learn_preset("stable-diffusion")
    config = replace(
        config,
        embedding=replace(config.embedding, draws=options.draws),
        lora=replace(config.lora, draws=options.draws),
        union_sampling=False,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    data = InstanceData(instance, base)
    tokens = [f"<asset{i}>" for i in range(data.count)]
    add_asset_tokens(base.tokenizer, tokens)
    ids = [base.tokenizer.get_added_vocab()[t] for t in tokens]
    prior = PriorData(("a photo of a house",), torch.randn(data.moments[False][0].shape).to(base.device))
    rows = initial_vectors(base.text_encoders, base.tokenizer, [None] * data.count)
    with ExitStack() as stack:
        embedding = stack.enter_context(use_assets(base.text_encoders, ids, rows))
        stack.enter_context(gradient_checkpointing(base, config.gradient_checkpointing))
        trainer = Trainer(base, data, config, embedding, prior if lora else None)
        parameters: list[Any] = [embedding.vectors]
        if lora:
            adapters = stack.enter_context(lend_adapters(base, config.lora, 0))
            embedding.vectors.requires_grad_(True)
            parameters += [p for a in adapters.values() for p in a.parameters() if p.requires_grad and p is not embedding.vectors]
        groups = [{"params": parameters, "lr": 1e-4}]
        trainer.optimizer = make_optimizer(groups, config, lora)  # type: ignore[attr-defined]
        trainer.parameters = parameters  # type: ignore[attr-defined]
        yield trainer


def run_step(trainer: Any, phase: str) -> Callable[[], None]:
    """One whole optimizer step, as the trainer's own loop makes it."""
    settings = trainer.config.lora if phase == "phase2" else trainer.config.embedding
    sites = choose_sites(trainer.base.unet, settings.attention.blocks, settings.attention.levels)
    optimizer = trainer.optimizer

    def step() -> None:
        with record_attention(trainer.base.unet, sites) as recorder:
            losses = trainer.objective.losses(settings, 0, sites, recorder, trainer.prior)
            trainer.stepper.backward(losses.total)
            trainer.stepper.clip(optimizer, trainer.parameters, trainer.config.max_grad_norm)
            trainer.stepper.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
            losses.as_floats()

    return step


class ResidentGrowth:
    """Growth of the process's peak resident memory from now on; Linux alone can begin to count anew."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the C library holds back would hide growth
        Path("/proc/self/clear_refs").write_text("5")
        self.before_gib = self._peak()

    def growth_gib(self) -> float:
        return self._peak() - self.before_gib

    @staticmethod
    def _peak() -> float:
        line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """So that no case meets memory that another one left."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
