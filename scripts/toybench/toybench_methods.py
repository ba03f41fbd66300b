"""The methods that toybench compares (methods.json, changes of this project's own configuration), and how each is trained.

Baselines follow Break-A-Scene (arXiv 2305.16311, section 4.1): textual inversion and DreamBooth, each with the masked loss and
with pairs, a small collection made from the one picture: random subsets of the assets cut out, on random plain backgrounds,
flipped at random. DreamBooth is trained as LoRA, like everything here but the full fine-tuning. The other methods' assets are
put in boxes with Bounded Attention as published (arXiv 2403.16990), which they do not have themselves; a text of each asset's
own is this project's.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mifo.bundle.store import Bundle, attach, load_bundle
from mifo.config import LearnConfig, SynthesisConfig
from mifo.data.instance import FittedInstance, Instance, fit_instance
from mifo.evaluation.backend import Backend
from mifo.evaluation.checkpoints import checkpoint_judge
from mifo.io.json_text import record_text
from mifo.io.sheets import pixels_to_tensor
from mifo.learning.dataset import Batch, InstanceData
from mifo.learning.learn import learn, lend_adapters
from mifo.learning.prior import make_prior
from mifo.learning.trainer import Trainer
from mifo.model.base import BaseModel
from mifo.model.embedding import initial_vectors, use_assets
from mifo.presets import learn_preset
from mifo.prompts import add_asset_tokens, join_assets

PAIRS = 24


@dataclass(frozen=True)
class Training:
    """`kind`: 'product' (learn and a bundle), 'pairs' or 'full' (trained in memory: no bundle holds them)."""

    kind: str
    config: LearnConfig


@dataclass(frozen=True)
class Method:
    """A row of the table, as `methods.json` describes it.

    `change` and `drawing`: settings by dotted name, of `LearnConfig` and of `SynthesisConfig`; `*.` stands for both phases.
    `steps`: 'as they are', 'all in embedding' and 'all in lora' (the same total in one phase), or 'by count' (more for more than
    three things). `training`: the method whose learned assets are drawn. `boxes`: false where nothing keeps assets to boxes.
    """

    training: str
    group: str
    recipe: str = "mifo"
    kind: str = "product"
    steps: str = "as they are"
    change: Mapping[str, Any] = field(default_factory=dict)
    drawing: Mapping[str, Any] = field(default_factory=dict)
    boxes: bool = True

    @property
    def only_boxes(self) -> bool:
        """An ablation of drawing in boxes: assets alone are the same as its training's own method draws."""
        return self.group == "drawing"

    def synthesis(self, config: SynthesisConfig) -> SynthesisConfig:
        changed: SynthesisConfig = _changed(config, self.drawing)
        return changed


def _read_methods(path: Path) -> dict[str, Method]:
    """`like` takes over another entry's settings; raises TypeError for a field that does not exist."""
    entries = json.loads(path.read_text())
    methods = {}
    for name, entry in entries.items():
        whole = {**entries[entry["like"]], **entry} if "like" in entry else entry
        methods[name] = Method(**{"training": name, **{k: v for k, v in whole.items() if k != "like"}})
    return methods


METHODS = _read_methods(Path(__file__).with_name("methods.json"))


def choose_methods(text: str) -> list[str]:
    """'main', 'ablations', 'all', or names with commas; raises KeyError for a name that does not exist."""
    main = [name for name, method in METHODS.items() if method.group == "main"]
    groups = {"main": main, "ablations": ["mifo", *(n for n in METHODS if n not in main)], "all": list(METHODS)}
    names = [name for part in text.split(",") for name in groups.get(part.strip(), (part.strip(),))]
    for name in names:
        METHODS[name]
    return list(dict.fromkeys(names))


# --- configurations -----------------------------------------------------------------------------


def training(name: str, seed: int, share: float = 1.0, count: int = 3) -> Training:
    """What a method trains with, for `count` things; `share` of the steps, for quick runs."""
    method = METHODS[name]
    config = _changed(learn_preset("toybox", method.recipe), method.change)
    both = config.embedding.train_steps + config.lora.train_steps
    first, second = {"all in embedding": (both, 0), "all in lora": (0, both)}.get(
        method.steps, (config.embedding.train_steps, config.lora.train_steps)
    )
    if method.steps == "by count":
        share *= max(1, count / 3)
    rewarded = config.embedding.attention.reward_steps
    steps = {"embedding.train_steps": first, "embedding.attention.reward_steps": rewarded, "lora.train_steps": second}
    return Training(method.kind, _changed(config, {**{k: _scaled(v, share) for k, v in steps.items()}, "seed": seed}))


def _scaled(steps: int, share: float) -> int:
    return max(1, round(steps * share)) if steps else 0


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with other values at these dotted names; raises AttributeError or TypeError for a name it has not."""
    for name, value in changes.items():
        for phase in ("embedding.", "lora.") if name.startswith("*.") else ("",):
            config = _set(config, (phase + name.removeprefix("*.")).split("."), value)
    return config


def _set(config: Any, names: list[str], value: Any) -> Any:
    inner = value if len(names) == 1 else _set(getattr(config, names[0]), names[1:], value)
    return replace(config, **{names[0]: inner})


# --- training -----------------------------------------------------------------------------------


@contextmanager
def trained(base: BaseModel, instance: Instance, plan: Training, work: Path, backend: Backend,
            kept: Path) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The base model with `instance` learned, for as long as the block lasts; yields what training cost.

    A bundle stays in `kept`, and is taken from there instead of learned anew: another way of drawing costs no training.
    Everything else goes into `work`. Prior latents go beside either folder, where other scenes find them.
    """
    started = time.monotonic()
    if plan.kind == "product":
        bundle, facts = learned(base, instance, plan.config, backend, kept)
        with attach(base, bundle):
            yield facts
        return
    fitted, seed = fit_instance(instance, base.resolution), plan.config.seed
    data = PairData(fitted, base, seed) if plan.kind == "pairs" else InstanceData(fitted, base, plan.config.placements, seed)
    known = base.tokenizer.get_added_vocab()
    add_asset_tokens(base.tokenizer, [t for t in instance.tokens if t not in known])
    ids = [base.tokenizer.get_added_vocab()[t] for t in instance.tokens]
    rows = initial_vectors(base.text_encoders, base.tokenizer, [None] * instance.count)
    config = plan.config
    with_prior = config.prior.enabled and config.lora.train_steps > 0
    prior = make_prior(base, config.prior, base.resolution, config.seed, work.parent / ".prior") if with_prior else None
    with use_assets(base.text_encoders, ids, rows) as embedding:
        trainer = Trainer(base, data, config, embedding, prior)
        trainer.train_embedding()
        lend = whole_model(base, embedding.table) if plan.kind == "full" else lend_adapters(base, config.lora, config.seed)
        with lend as parts:
            trainer.train_lora(parts)
            yield {"learn_seconds": round(time.monotonic() - started, 1)}


def learned(base: BaseModel, instance: Instance, config: LearnConfig, backend: Backend,
            kept: Path) -> tuple[Bundle, dict[str, Any]]:  # fmt: skip
    """The bundle, and what learning it cost. That is written last, so where it is, all is."""
    cost = kept.with_name(f"{kept.name}.json")
    if cost.exists():
        return load_bundle(kept), json.loads(cost.read_text())
    started = time.monotonic()
    judge = checkpoint_judge(backend, config.keep.samples) if config.keep.enabled else None
    bundle = learn(instance, base, config, kept, judge=judge)
    facts = {"learn_seconds": round(time.monotonic() - started, 1), "peak_gib": bundle.metadata["peak_gib"]}
    if "kept" in bundle.metadata:
        facts["kept_step"] = bundle.metadata["kept"]["step"]
    write_record(cost, facts)
    return bundle, facts


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: a run may be killed at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(record_text(record) + "\n")
    os.replace(partial, path)


@contextmanager
def whole_model(base: BaseModel, table: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """UNet and text encoder themselves as what is trained, as published; afterwards their weights are as they were."""
    parts: dict[str, Any] = {"unet": base.unet, "text_encoder": base.text_encoder}
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    for part in parts.values():
        part.requires_grad_(True)
    table.requires_grad_(False)
    try:
        yield parts
    finally:
        for name, part in parts.items():
            part.load_state_dict(before[name])
            part.requires_grad_(False)


class PairData(InstanceData):
    """Break-A-Scene's adaptation of single-concept methods: whole pictures of random subsets on plain backgrounds."""

    def __init__(self, fitted: FittedInstance, base: BaseModel, seed: int):
        super().__init__(fitted, base)
        rng = np.random.default_rng(seed)
        self.pairs = []
        for _ in range(PAIRS):
            size = int(rng.integers(1, self.count + 1))
            assets = tuple(int(i) for i in rng.permutation(self.count)[:size])
            color = tuple(int(v) for v in rng.integers(0, 256, 3))
            self.pairs.append((assets, base.encode(pixels_to_tensor(pair_picture(fitted, assets, color, rng.random() < 0.5)))))

    def sample(self, rng: np.random.Generator, generator: torch.Generator, draws: int, union_sampling: bool,
               flip_probability: float) -> Batch:  # fmt: skip
        """One of the pairs; the loss covers the whole picture."""
        assets, (mean, std) = self.pairs[int(rng.integers(len(self.pairs)))]
        noise = torch.randn((draws, *mean.shape[1:]), generator=generator).to(mean)
        everything = torch.ones((1, 1, *mean.shape[-2:]), device=mean.device)
        tokens = tuple(self.tokens[i] for i in assets)
        return Batch(assets, tokens, join_assets(tokens), mean + std * noise, everything,
                     self.masks[False][list(assets)])  # fmt: skip


def pair_picture(fitted: FittedInstance, assets: tuple[int, ...], color: tuple[int, ...], flip: bool) -> Image.Image:
    """The assets cut out, at their own places, on one colour."""
    picture = Image.new("RGB", fitted.image.size, color)
    for index in assets:
        picture.paste(fitted.image, (0, 0), fitted.masks[index])
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
