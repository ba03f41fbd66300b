"""How each of toybench's methods is trained.

Baselines follow Break-A-Scene (arXiv 2305.16311, section 4.1): textual inversion and DreamBooth, each with the masked loss and
with pairs, a small collection made from the one picture: random subsets of the assets cut out, on random plain backgrounds,
flipped at random. DreamBooth is trained as LoRA, like everything here but the full fine-tuning. The other methods' assets are
put in boxes with Bounded Attention as published (arXiv 2403.16990), which they do not have themselves; a text of each asset's
own is this project's.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mifo.bundle.store import Bundle, attach, load_bundle
from mifo.config import LearnConfig
from mifo.data.instance import FittedInstance, Instance, fit_instance
from mifo.evaluation.backend import Backend
from mifo.evaluation.checkpoints import checkpoint_judge
from mifo.io.sheets import pixels_to_tensor
from mifo.learning.dataset import Batch, InstanceData
from mifo.learning.learn import learn, lend_adapters
from mifo.learning.prior import make_prior
from mifo.learning.trainer import Trainer
from mifo.model.base import BaseModel
from mifo.model.embedding import initial_vectors, use_assets
from mifo.prompts import add_asset_tokens, join_assets
from scripts.toybench.methods import Training
from scripts.toybench.toybench_items import write_record

PAIRS = 24


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
               flip_probability: float, alone_share: float = 0.0) -> Batch:  # fmt: skip
        """One of the pairs; the loss covers the whole picture."""
        assets, (mean, std) = self.pairs[int(rng.integers(len(self.pairs)))]
        noise = torch.randn((draws, *mean.shape[1:]), generator=generator).to(mean)
        everything = torch.ones((1, 1, *mean.shape[-2:]), device=mean.device)
        tokens = tuple(self.tokens[i] for i in assets)
        return Batch(assets, tokens, join_assets(tokens), lambda: mean + std * noise, everything,
                     self.masks[False][list(assets)])  # fmt: skip


def pair_picture(fitted: FittedInstance, assets: tuple[int, ...], color: tuple[int, ...], flip: bool) -> Image.Image:
    """The assets cut out, at their own places, on one colour."""
    picture = Image.new("RGB", fitted.image.size, color)
    for index in assets:
        picture.paste(fitted.image, (0, 0), fitted.masks[index])
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
