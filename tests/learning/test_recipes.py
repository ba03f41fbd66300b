"""Published recipes weigh attention against the picture as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import load_base, write_instance

import mifo.learning.objective as objective
from mifo.attention.record import record_attention
from mifo.attention.sites import choose_sites
from mifo.config import LearnConfig
from mifo.data.instance import fit_instance, load_instance
from mifo.learning.dataset import InstanceData
from mifo.learning.trainer import Trainer
from mifo.model.embedding import initial_vectors, use_assets
from mifo.presets import learn_preset
from mifo.prompts import add_asset_tokens


def mean_square(error: torch.Tensor) -> torch.Tensor:
    return error.square().sum() / error.numel()


def published_attention(recipe: str, maps: list[tuple[torch.Tensor, torch.Tensor]], reward: bool) -> torch.Tensor:
    """The sum over (map, mask) of the recipe's own term with its own weight, as the papers and their code have it."""
    if recipe == "break-a-scene":
        return sum((0.01 * mean_square(a / a.max() - m) for a, m in maps), start=torch.zeros(()))
    if reward:
        return sum((0.01 * mean_square(a - 0.5 * m) for a, m in maps), start=torch.zeros(()))
    return sum((0.02 * mean_square(a * (1 - m)) for a, m in maps), start=torch.zeros(()))


def gradients(loss: torch.Tensor, rows: torch.Tensor) -> float:
    return float(torch.autograd.grad(loss, rows, retain_graph=True)[0].norm())


def ratios(recipe: str, config: LearnConfig, phase_name: str, reward: bool, tmp_path: Path,
           monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:  # fmt: skip
    """Norm of the attention term's gradient over that of the diffusion term's, on the token embeddings: as one learning step
    has it, and as published for the very same predictions and maps."""
    base, maps, pictures = load_base(), [], []
    for name in ("match_loss", "reward_loss", "penalty_loss"):
        real = getattr(objective, name)
        monkeypatch.setattr(objective, name, lambda a, m, real=real: maps.append((a, m)) or real(a, m))
    kept = objective.masked_diffusion_loss
    monkeypatch.setattr(objective, "masked_diffusion_loss",
                        lambda p, t, m, *more: pictures.append((p, t, m)) or kept(p, t, m, *more))  # fmt: skip
    data = InstanceData(fit_instance(load_instance(write_instance(tmp_path / "cups")), base.resolution), base)
    add_asset_tokens(base.tokenizer, data.tokens)
    ids = [base.tokenizer.get_added_vocab()[t] for t in data.tokens]
    rows = initial_vectors(base.text_encoders, base.tokenizer, ["car", "mug"])
    own = getattr(config, phase_name)
    attention = replace(own.attention, max_timestep=1000, levels=(1, 2))  # so that this one step has the term
    phase = replace(own, draws=1, attention=attention)
    with use_assets(base.text_encoders, ids, rows) as embedding:
        trainer = Trainer(base, data, config, embedding)
        sites = choose_sites(base.unet, attention.blocks, attention.levels)
        with record_attention(base.unet, sites) as recorder:
            found: Any = trainer.objective.losses(phase, 0 if reward else 10_000, sites, recorder, None)
        prediction, target, mask = pictures[0]
        diffusion = mean_square((prediction - target) * mask.expand_as(prediction))
        ours = gradients(found.attention, embedding.vectors) / gradients(found.diffusion, embedding.vectors)
        published = published_attention(recipe, maps, reward)
        return ours, gradients(published, embedding.vectors) / gradients(diffusion, embedding.vectors)


@pytest.mark.parametrize(
    "recipe, family, phase, reward",
    [("break-a-scene", "toybox", "embedding", False), ("break-a-scene", "toybox", "lora", False),
     ("break-a-scene", "stable-diffusion", "lora", False), ("mifo", "stable-diffusion", "embedding", True),
     ("mifo", "stable-diffusion", "embedding", False), ("mifo", "stable-diffusion", "lora", False)],
)  # fmt: skip
def test_attention_weighs_beside_the_picture_what_it_does_as_published(
    recipe: str, family: str, phase: str, reward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the toybox's Break-A-Scene had its own weight beside a loss by area, six times too weak on its pictures."""
    ours, published = ratios(recipe, learn_preset(family, recipe), phase, reward, tmp_path, monkeypatch)
    assert published > 0 and np.isclose(ours, published, rtol=1e-3), (ours, published)


def test_the_recipe_is_the_published_loss_on_every_model() -> None:
    for family in ("toybox", "stable-diffusion"):
        assert learn_preset(family, "break-a-scene").masked_loss_by_area is False
