"""One asset of a bundle learned again, or one more learned into it, while the others stay (this project's own).

Training starts from the bundle's embeddings and LoRA. The others' embeddings are held; the LoRA, which all assets share, is kept
from forgetting them by pictures of them. Where composites are learned from, half of those are about any assets: their cut-outs
show the others as they are. Where none are, the bundle draws pictures of each, which take turns with those of the class prior,
and every step is about an asset that is learned, alone or with others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from ..bundle.store import Bundle, check_fits
from ..config import LearnConfig
from ..data.instance import Instance
from ..errors import InputError, did_you_mean
from ..model.base import BaseModel
from ..model.embedding import AssetEmbedding
from ..prompts import BACKGROUND_TOKEN
from .prior import PriorData, draw_latents
from .state import PhaseRun
from .trainer import Callback, Trainer

PICTURES = 8  # of each asset that stays
STEPS = 0.4  # of the preset's: half of them took more than half of the time (LOG.md)


@dataclass(frozen=True)
class Start:
    """The bundle that training goes on from, and the tokens that are learned; the others stay."""

    bundle: Bundle
    only: tuple[str, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        return tuple(token for token in self.bundle.tokens if token not in self.only)


def start_from(bundle: Bundle, names: Sequence[str], instance: Instance) -> Start:
    """`names`: "asset1" or "<asset1>", of the instance.

    Raises InputError unless each asset of the instance is learned or in the bundle, and each of the bundle in the instance.
    """
    only = tuple(dict.fromkeys(f"<{name.strip().strip('<>')}>" for name in names))
    there = ", ".join(instance.tokens)
    for token in only:
        if token not in instance.tokens:
            raise InputError(f"{instance.source} has no {token}: its assets are {there}{did_you_mean(token, instance.tokens)}")
    if not only:
        raise InputError(f"no asset is named that is learned into {bundle.name}; name one of {there}, such as --only asset0")
    if lost := [token for token in bundle.tokens if token not in instance.tokens]:
        raise InputError(f"{bundle.name} has {', '.join(lost)}, which {instance.source} has no mask for; add it, "
                         "or learn another bundle")  # fmt: skip
    if new := [token for token in instance.tokens if token not in (*bundle.tokens, *only)]:
        raise InputError(f"{bundle.name} has no {', '.join(new)} yet: learn that too, or take its mask away")
    start = Start(bundle, only)
    if not start.kept:
        raise InputError(f"no asset of {bundle.name} would stay: learn the bundle anew, with --overwrite")
    return start


def relearn_config(config: LearnConfig, bundle: Bundle) -> LearnConfig:
    """A preset for learning into `bundle`: LoRA and picture size as the bundle has them, and `STEPS` of the steps."""
    rank = rank_of(bundle)
    lora = replace(config.lora, train_steps=round(STEPS * config.lora.train_steps) if rank else 0, rank=rank or config.lora.rank,
                   text_encoder=len(bundle.lora) > 1)  # fmt: skip
    phase1 = config.embedding
    terms = replace(phase1.attention, reward_steps=round(STEPS * phase1.attention.reward_steps))
    embedding = replace(phase1, train_steps=max(1, round(STEPS * phase1.train_steps)),
                        warmup_steps=round(STEPS * phase1.warmup_steps), attention=terms)  # fmt: skip
    return replace(config, embedding=embedding, lora=lora, resolution=bundle.config.resolution, aspect=bundle.config.aspect)


def check_start(start: Start, base: BaseModel, config: LearnConfig) -> None:
    """Raises InputError where `config` cannot go on from the bundle on this base model."""
    check_fits(base, start.bundle)
    rank = rank_of(start.bundle)
    if rank is None and config.lora.train_steps:
        raise InputError(f"{start.bundle.name} was learned without LoRA; leave phase 2 out here too (0 steps)")
    if rank is not None and rank != config.lora.rank:
        raise InputError(f"{start.bundle.name} has LoRA of rank {rank}, but {config.lora.rank} was asked for; leave the rank out")


def rank_of(bundle: Bundle) -> int | None:
    """Of its LoRA, the same in every part; None where it has none."""
    return next((adapter.config.r for adapter in bundle.lora.values()), None)


def starting_vectors(start: Start, tokens: Sequence[str], fresh: torch.Tensor) -> torch.Tensor:
    """(N, D): the bundle's own for those that stay, `fresh` (N, D) for those that are learned."""
    own = dict(zip(start.bundle.tokens, start.bundle.token_embeddings, strict=True))
    return torch.stack([row if token in start.only else own[token].to(row) for token, row in zip(tokens, fresh, strict=True)])


def prior_of_the_others(base: BaseModel, start: Start, config: LearnConfig, prior: PriorData | None, size: tuple[int, int],
                        on_progress: Callable[[int, int], None]) -> PriorData | None:  # fmt: skip
    """Pictures of each asset that stays, as the bundle draws it, taking turns with those of the class prior. The assets and the
    bundle's adapters must be in the base model. `size`: (height, width) in pixels."""
    prompts = [f"a photo of {token}" for token in start.kept if token != BACKGROUND_TOKEN]
    if not prompts:
        return prior
    drawn = draw_latents(base, config.prior, prompts, start.kept, len(prompts) * PICTURES, size, config.seed, on_progress)
    others = [(prompts[k % len(prompts)], drawn[k : k + 1]) for k in range(len(drawn))]
    if prior is None:
        return PriorData(tuple(prompt for prompt, _ in others), drawn)
    turns = max(len(others), len(prior.latents))
    found = list(chain.from_iterable((prior.pick(k), others[k % len(others)]) for k in range(turns)))
    return PriorData(tuple(prompt for prompt, _ in found), torch.cat([latents for _, latents in found]))


def relearned(start: Start, config: LearnConfig, seconds: float) -> list[dict[str, Any]]:
    """What a bundle's record says of it: every relearning, the last one last."""
    steps = [config.embedding.train_steps, config.lora.train_steps]
    before = start.bundle.metadata.get("relearned")
    return [*(before if isinstance(before, list) else []),
            {"tokens": list(start.only), "steps": steps, "seed": config.seed, "seconds": seconds}]  # fmt: skip


class HoldOthers(Callback):
    """Puts the embeddings of the assets that stay back after each step. Comes first: what is saved must have them."""

    def __init__(self, embedding: AssetEmbedding, start: Start, tokens: Sequence[str]):
        self.embedding = embedding
        self.rows = [i for i, token in enumerate(tokens) if token not in start.only]
        self.values = embedding.vectors.detach()[self.rows].clone()

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        with torch.no_grad():
            self.embedding.vectors[self.rows] = self.values
        return False
