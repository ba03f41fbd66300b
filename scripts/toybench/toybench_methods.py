"""The methods that toybench compares, as changes of this project's own configuration, and how each is trained.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mifo.bundle.store import Bundle, attach, load_bundle
from mifo.config import AttentionTerms, LearnConfig, PriorConfig, SynthesisConfig
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


def _as_it_is(config: SynthesisConfig) -> SynthesisConfig:
    return config


def _no_boxes(config: SynthesisConfig) -> SynthesisConfig:
    return replace(config, bounded=False, guidance=replace(config.guidance, enabled=False))


def _shared_text(config: SynthesisConfig) -> SynthesisConfig:
    """Bounded attention as published: all assets read the one prompt."""
    return replace(config, own_text=False)


@dataclass(frozen=True)
class Method:
    """How assets are learned (a name in `trainings`), how pictures are drawn, and what else stands in the table for it."""

    training: str
    drawing: Callable[[SynthesisConfig], SynthesisConfig] = _as_it_is
    with_boxes: bool = True
    only_boxes: bool = False
    """An ablation of drawing in boxes: assets alone are the same as its training's own method draws."""


#: the table's rows; the first six are the comparison, the others ablations
MAIN = ("mifo", "break-a-scene", "textual-inversion-masked", "textual-inversion-pairs", "dreambooth-lora-masked",
        "dreambooth-lora-pairs")  # fmt: skip
ABLATIONS = ("no-penalty", "penalty-x5", "penalty-x25", "no-locality", "no-placements", "separation-instead", "separation-beside",
             "no-reward", "no-union-sampling", "no-prior", "full-3e-5", "full-1e-4", "full-3e-4", "rank-1", "rank-4", "rank-64",
             "lora-5e-4", "lora-2e-3", "keep-best", "loss-by-picture", "steps-by-count")  # fmt: skip
METHODS: dict[str, Method] = {name: Method(name, _shared_text if name in MAIN[1:] else _as_it_is) for name in (*MAIN, *ABLATIONS)}
METHODS |= {
    "shared-text": Method("mifo", _shared_text, only_boxes=True),
    "shared-text-no-penalty": Method("no-penalty", _shared_text, only_boxes=True),
    "break-a-scene-own-text": Method("break-a-scene", only_boxes=True),
    "no-box-control": Method("mifo", _no_boxes, with_boxes=False, only_boxes=True),
    "masks-only": Method("mifo", lambda c: replace(c, guidance=replace(c.guidance, enabled=False)), only_boxes=True),
    "guidance-only": Method("mifo", lambda c: replace(c, bounded=False), only_boxes=True),
    "guidance-scale-2": Method("mifo", lambda c: replace(c, guidance_scale=2.0), only_boxes=True),
    "no-refinement": Method("mifo", lambda c: replace(c, refinement=replace(c.refinement, enabled=False)), only_boxes=True),
}
DRAWING_ABLATIONS = tuple(name for name, method in METHODS.items() if method.only_boxes)


def choose_methods(text: str) -> list[str]:
    """'main', 'ablations', 'all', or names with commas; raises KeyError for a name that does not exist."""
    groups = {"main": MAIN, "ablations": ("mifo", *ABLATIONS, *DRAWING_ABLATIONS), "all": tuple(METHODS)}
    names = [name for part in text.split(",") for name in groups.get(part.strip(), (part.strip(),))]
    for name in names:
        METHODS[name]
    return list(dict.fromkeys(names))


# --- configurations -----------------------------------------------------------------------------


def training(name: str, seed: int, share: float = 1.0, count: int = 3) -> Training:
    """What a method trains with, for `count` things; `share` of the steps, for quick runs."""
    if name == "steps-by-count":
        share *= max(1, count / 3)
    base = learn_preset("toybox", "break-a-scene" if name == "break-a-scene" else "mifo")
    kind, config = _CHANGES[name](base) if name in _CHANGES else ("product", base)
    embedding = replace(config.embedding, train_steps=_scaled(config.embedding.train_steps, share))
    embedding = replace(embedding, attention=_terms(embedding.attention, reward_steps=_scaled(
        embedding.attention.reward_steps, share)))  # fmt: skip
    lora = replace(config.lora, train_steps=_scaled(config.lora.train_steps, share))
    return Training(kind, replace(config, embedding=embedding, lora=lora, seed=seed))


def _scaled(steps: int, share: float) -> int:
    return max(1, round(steps * share)) if steps else 0


def _terms(terms: AttentionTerms, **changes: Any) -> AttentionTerms:
    return replace(terms, **changes)


def _both(config: LearnConfig, **changes: Any) -> LearnConfig:
    """The same change of the attention terms in both phases."""
    return replace(config, embedding=replace(config.embedding, attention=_terms(config.embedding.attention, **changes)),
                   lora=replace(config.lora, attention=_terms(config.lora.attention, **changes)))  # fmt: skip


def _penalty_times(config: LearnConfig, factor: float) -> LearnConfig:
    return _both(config, penalty_weight=factor * config.lora.attention.penalty_weight)


def _baseline(config: LearnConfig) -> LearnConfig:
    """Without what is this project's own: no attention loss, no shifted copies, no locality; a plain prior prompt."""
    return replace(_both(config, loss="none"), placements=0, locality_weight=0.0,
                   prior=replace(config.prior, class_prompt=PriorConfig.class_prompt))  # fmt: skip


def _textual_inversion(config: LearnConfig) -> LearnConfig:
    config = _baseline(config)
    steps = config.embedding.train_steps + config.lora.train_steps
    return replace(config, embedding=replace(config.embedding, train_steps=steps), lora=replace(config.lora, train_steps=0),
                   prior=replace(config.prior, enabled=False))  # fmt: skip


def _dreambooth(config: LearnConfig) -> LearnConfig:
    """Tokens stay as they start; only the weights learn, for all the steps."""
    config = _baseline(config)
    steps = config.embedding.train_steps + config.lora.train_steps
    return replace(config, embedding=replace(config.embedding, train_steps=0),
                   lora=replace(config.lora, train_steps=steps, row_learning_rate=0.0))  # fmt: skip


def _full(rate: float) -> Callable[[LearnConfig], tuple[str, LearnConfig]]:
    return lambda c: ("full", replace(c, lora=replace(c.lora, learning_rate=rate)))


def _rank(rank: int) -> Callable[[LearnConfig], tuple[str, LearnConfig]]:
    return lambda c: ("product", replace(c, lora=replace(c.lora, rank=rank)))


def _rate(rate: float) -> Callable[[LearnConfig], tuple[str, LearnConfig]]:
    return lambda c: ("product", replace(c, lora=replace(c.lora, learning_rate=rate)))


_CHANGES: dict[str, Callable[[LearnConfig], tuple[str, LearnConfig]]] = {
    "textual-inversion-masked": lambda c: ("product", _textual_inversion(c)),
    "textual-inversion-pairs": lambda c: ("pairs", _textual_inversion(c)),
    "dreambooth-lora-masked": lambda c: ("product", _dreambooth(c)),
    "dreambooth-lora-pairs": lambda c: ("pairs", _dreambooth(c)),
    "penalty-x5": lambda c: ("product", _penalty_times(c, 5)),
    "penalty-x25": lambda c: ("product", _penalty_times(c, 25)),
    "no-locality": lambda c: ("product", replace(c, locality_weight=0.0)),
    "no-placements": lambda c: ("product", replace(c, placements=0)),
    "no-penalty": lambda c: ("product", _both(c, penalty_weight=0.0)),
    "separation-instead": lambda c: ("product", _both(c, penalty_weight=0.0, separation_weight=0.1)),
    "separation-beside": lambda c: ("product", _both(c, separation_weight=0.1)),
    "no-reward": lambda c: ("product", _both(c, reward_steps=0)),
    "no-union-sampling": lambda c: ("product", replace(c, union_sampling=False)),
    "no-prior": lambda c: ("product", replace(c, prior=replace(c.prior, enabled=False))),
    "full-3e-5": _full(3e-5), "full-1e-4": _full(1e-4), "full-3e-4": _full(3e-4),
    "rank-1": _rank(1), "rank-4": _rank(4), "rank-64": _rank(64),
    "lora-5e-4": _rate(5e-4), "lora-2e-3": _rate(2e-3),
    "keep-best": lambda c: ("product", replace(c, keep=replace(c.keep, enabled=True))),
    "loss-by-picture": lambda c: ("product", replace(c, masked_loss_by_area=False)),
}  # fmt: skip


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
