"""A step in parts equals the step whole; terms that are computed now and then weigh the same on average."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import load_base, write_instance

from mifo.attention.record import record_attention
from mifo.attention.sites import Site, choose_sites
from mifo.config import AttentionTerms, LearnConfig, LoraPhase
from mifo.data.instance import fit_instance, load_instance, with_background
from mifo.data.mask_sizes import union_at_latents
from mifo.errors import InputError
from mifo.learning.dataset import Batch, InstanceData
from mifo.learning.learn import lend_adapters
from mifo.learning.objective import FILLED_FROM, Draws, Objective, StepLosses, attention_loss, parts_of, where_it_counts
from mifo.learning.prior import PriorData
from mifo.model.embedding import initial_vectors, use_assets
from mifo.presets import learn_preset
from mifo.prompts import add_asset_tokens

PRESET = learn_preset("toybox")
CONFIG = replace(PRESET, placements=0, locality_every=1, prior=replace(PRESET.prior, every_steps=1))


class Step:
    """One step of phase 2 on the tiny base, from the same random state each time."""

    def __init__(self, folder: Path, config: LearnConfig, draws: int = 3):
        self.base = load_base()
        self.data = InstanceData(fit_instance(load_instance(folder), self.base.resolution), self.base)
        add_asset_tokens(self.base.tokenizer, self.data.tokens)
        terms = replace(config.lora.attention, max_timestep=1000, levels=(1, 2))  # so that each draw has the attention term
        self.phase = replace(config.lora, draws=draws, attention=terms)
        self.config = config
        self.prior = PriorData(("a photo of a house",), torch.ones(self.data.moments[False][0].shape))

    def run_picture(self, drawn: Draws) -> StepLosses:
        """The losses of one picture's draws, drawn already."""

        class Drawn(Objective):
            def draw(self, *_: Any) -> list[Draws]:
                return [replace(drawn, own=slice(0, drawn.own.stop - drawn.own.start))]

        return self.run(0, None, Drawn)[0]

    def run(self, step: int, pool: ThreadPoolExecutor | None,
            kind: type[Objective] = Objective) -> tuple[StepLosses, list[torch.Tensor | None]]:  # fmt: skip
        ids = [self.base.tokenizer.get_added_vocab()[t] for t in self.data.tokens]
        vectors = initial_vectors(self.base.text_encoders, self.base.tokenizer, ["car", "mug"])
        sites = choose_sites(self.base.unet, self.phase.attention.blocks, self.phase.attention.levels)
        objective = kind(self.base, self.data, self.config, np.random.default_rng(0), torch.Generator().manual_seed(0))
        with (use_assets(self.base.text_encoders, ids, vectors) as embedding,
              lend_adapters(self.base, LoraPhase(rank=2), 0) as lora,
              record_attention(self.base.unet, sites) as recorder):  # fmt: skip
            embedding.vectors.requires_grad_(True)
            parameters: list[Any] = [embedding.vectors]
            parameters += [p for a in lora.values() for p in a.parameters() if p.requires_grad and p is not embedding.vectors]
            if pool is None:
                losses = objective.losses(self.phase, step, sites, recorder, self.prior)
                losses.total.backward()
            else:
                losses = objective.gradients(self.phase, step, sites, recorder, self.prior, parameters, pool)
            return losses, [None if p.grad is None else p.grad.clone() for p in parameters]


def test_the_relative_penalty_stands_beside_the_loss_on_one_map_of_all_sites_at_all_timesteps() -> None:
    sites = [Site(f"up_blocks.{k}", "up_blocks", True, k) for k in (0, 1)]
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1  # the left half
    batch = Batch((0,), ("<asset0>",), "a photo of <asset0>", lambda: torch.zeros(2, 4, 4, 4), mask, mask)
    large, small = torch.zeros(2, 16, 3), torch.zeros(2, 4, 3)  # (draws, pixels, tokens): the asset's is the second
    large[:, :, 1] = torch.tensor([0.02, 0.02, 0.01, 0.01] * 4)
    small[:, :, 1] = torch.tensor([0.02, 0.01] * 2)
    maps = {sites[0].name: large, sites[1].name: small}

    def loss(late: int, **terms: Any) -> float:
        """Of two draws, at timesteps 100 and `late`."""
        weights = AttentionTerms(**{"penalty_weight": 1.0, **terms})
        return float(attention_loss(maps, sites, weights, batch, {"<asset0>": (1,)}, torch.tensor([100, late]), 0, 0, (4, 4)))

    # the two sites' mean has its maximum of 0.02 on the left and half of it in the last column; the column between has 0.01 and,
    # of the smaller map as it is enlarged, 0.0125
    relative = ((0.01 + 0.0125) / 2 / 0.02) ** 2 / 4 + 0.5**2 / 4
    alone = loss(900, loss="none", relative_penalty_weight=3.0)
    assert alone == pytest.approx(3 * relative, rel=1e-5), "every draw counts, whatever its timestep"
    assert loss(900, loss="none") == 0
    assert loss(900, relative_penalty_weight=3.0) == pytest.approx(alone + loss(900))
    assert loss(100) == pytest.approx(2 * loss(900)) and loss(900) > 0, "the published penalty below max_timestep alone"


def test_what_was_filled_in_counts_where_there_is_too_much_noise_to_see_its_details() -> None:
    """Its blur was learned as what the background looks like, and drawn into walls."""
    mask, filled = torch.tensor([[[[1.0, 1.0], [0.5, 0.0]]]]), torch.tensor([[[[1.0, 0.0], [0.5, 1.0]]]])
    batch = Batch((0,), ("<background>",), "a photo of <background>", lambda: torch.zeros(2, 4, 2, 2), mask, mask, filled=filled)
    late, early = where_it_counts(batch, torch.tensor([FILLED_FROM - 1, FILLED_FROM]))
    assert torch.equal(late, torch.tensor([[[0.0, 1.0], [0.25, 0.0]]])) and torch.equal(early, mask[0])
    assert torch.equal(where_it_counts(replace(batch, filled=None), torch.tensor([0, 999])), mask)


def test_a_step_on_the_clean_plate_counts_filled_places_early_alone(tmp_path: Path) -> None:
    instance = with_background(load_instance(write_instance(tmp_path / "cups")))
    base = load_base()
    data = InstanceData(fit_instance(instance, base.resolution), base)
    assert data.plate is not None and data.plate[False].filled is not None
    things = union_at_latents(data.masks[False][:2], tuple(data.plate[False].filled.shape[-2:]))
    assert bool((data.plate[False].filled >= things).all()) and float(data.plate[False].filled.mean()) < 1
    add_asset_tokens(base.tokenizer, data.tokens)
    ids = [base.tokenizer.get_added_vocab()[t] for t in data.tokens]
    phase = replace(CONFIG.lora, draws=1, attention=AttentionTerms(loss="none"))
    sites = choose_sites(base.unet, phase.attention.blocks, phase.attention.levels)
    objective = Objective(base, data, replace(CONFIG, locality_weight=0.0), np.random.default_rng(0), torch.Generator())
    vectors = initial_vectors(base.text_encoders, base.tokenizer, [None] * 3)
    losses = {}
    with use_assets(base.text_encoders, ids, vectors), record_attention(base.unet, sites) as recorder, torch.no_grad():
        (drawn,) = objective.draw(phase, 0, None)
        for kind, filled in (("all", torch.ones(1, 1, 16, 16)), ("none", None)):
            for timestep in (FILLED_FROM - 1, FILLED_FROM):
                at = replace(drawn, batch=replace(drawn.batch, filled=filled), timesteps=torch.tensor([timestep]))
                found = objective.compute(at, phase, 0, sites, recorder, slice(0, 1), with_prior=False)
                losses[kind, timestep] = float(found.diffusion)
    assert losses["all", FILLED_FROM - 1] == 0 < losses["none", FILLED_FROM - 1]
    assert losses["all", FILLED_FROM] == losses["none", FILLED_FROM] > 0


def test_a_step_in_parts_on_threads_equals_the_step_whole(tmp_path: Path) -> None:
    step = Step(write_instance(tmp_path / "cups"), CONFIG)  # three draws: two in one part, and one beside the prior image
    whole, expected = step.run(0, None)
    with ThreadPoolExecutor(2) as pool:
        parts, found = step.run(0, pool)
        again, same = step.run(0, pool)
    assert whole.as_floats() == pytest.approx(parts.as_floats(), rel=1e-4)
    assert whole.as_floats()["prior"] > 0 and whole.as_floats()["attention"] > 0
    assert sum(g is not None and bool(g.any()) for g in expected) > 3
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # fp32, another order of summation
    assert parts.as_floats() == again.as_floats(), "whichever thread is first"
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True) if a is not None and b is not None)


def test_a_step_on_several_pictures_is_the_mean_of_steps_on_each(tmp_path: Path) -> None:
    step = Step(write_instance(tmp_path / "cups"), replace(CONFIG, pictures=2), draws=4)
    whole, expected = step.run(0, None)
    with ThreadPoolExecutor(2) as pool:
        parts, found = step.run(0, pool)
    assert whole.as_floats() == pytest.approx(parts.as_floats(), rel=1e-4)
    for a, b in zip(expected, found, strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)  # fp32, another order of summation
    # by hand: the two pictures of the same random state, with two draws each, one after the other
    objective = Objective(step.base, step.data, step.config, np.random.default_rng(0), torch.Generator().manual_seed(0))
    drawn = objective.draw(step.phase, 0, step.prior)
    assert [(each.own, len(each.latents), len(each.prompts)) for each in drawn] == [(slice(0, 2), 2, 1), (slice(2, 4), 3, 2)]
    two = Step(tmp_path / "cups", replace(CONFIG, prior=replace(CONFIG.prior, every_steps=1)), draws=2)
    alone = two.run_picture(drawn[0]), two.run_picture(drawn[1])
    for name in ("diffusion", "attention"):
        assert whole.as_floats()[name] == pytest.approx(sum(each.as_floats()[name] for each in alone) / 2, rel=1e-4)
    first, last = (each.as_floats()["prior"] for each in alone)
    assert whole.as_floats()["prior"] == pytest.approx(last, rel=1e-4) and first == 0


def test_pictures_of_a_step_are_of_different_subsets_or_of_one_asset_alone(tmp_path: Path) -> None:
    step = Step(write_instance(tmp_path / "cups"), CONFIG, draws=4)

    def subsets(alone_share: float) -> list[list[tuple[int, ...]]]:
        config = replace(CONFIG, pictures=4, alone_share=alone_share)
        objective = Objective(step.base, step.data, config, np.random.default_rng(0), torch.Generator().manual_seed(0))
        steps = [objective.draw(step.phase, k, None) for k in range(20)]
        assert all([each.own for each in drawn] == [slice(k, k + 1) for k in range(4)] for drawn in steps)
        return [[each.batch.assets for each in drawn] for drawn in steps]

    assert sum(len(set(drawn)) > 1 for drawn in subsets(0.0)) > 10
    assert {len(assets) for drawn in subsets(0.0) for assets in drawn} == {1, 2}
    assert {len(assets) for drawn in subsets(1.0) for assets in drawn} == {1}


def test_more_pictures_than_draws_are_refused() -> None:
    with pytest.raises(InputError, match=r"pictures is 5, and embedding.draws 4: expected one draw a picture at least"):
        replace(PRESET, pictures=5)


@pytest.mark.parametrize("pictures, at_least, processes", [(1, 2, 1), (2, 2, 1), (2, 1, 4), (3, 2, 1), (4, 2, 2), (1, 2, 2)])
def test_every_draw_is_in_one_part_of_one_process(pictures: int, at_least: int, processes: int) -> None:
    ends = [12 * k // pictures for k in range(pictures + 1)]
    drawn: list[Any] = [SimpleNamespace(own=slice(a, b)) for a, b in pairwise(ends)]
    share = 12 // processes
    each = [parts_of(drawn, slice(k * share, (k + 1) * share), at_least) for k in range(processes)]
    places = [picture.own.start + row for parts in each for picture, rows in parts for row in range(rows.start, rows.stop)]
    assert places == list(range(12)) and all(len(parts) >= at_least for parts in each)


def test_logit_normal_timesteps_lie_in_the_middle(tmp_path: Path) -> None:
    step = Step(write_instance(tmp_path / "cups"), CONFIG)

    def shares(kind: Any) -> list[float]:
        objective = Objective(step.base, step.data, CONFIG, np.random.default_rng(0), torch.Generator().manual_seed(0))
        (drawn,) = objective.draw(replace(step.phase, draws=5000, timesteps=kind), 0, None)
        found = drawn.timesteps
        assert int(found.min()) >= 0 and int(found.max()) < 1000
        return [float((found < bound).float().mean()) for bound in (100, 337, 500, 663, 900)]

    # the normal distribution's at logit(0.1) = -2.197, -0.675, 0, 0.675 and 2.197; four standard errors of 5,000 draws
    assert shares("logit-normal") == pytest.approx([0.014, 0.25, 0.5, 0.75, 0.986], abs=0.03)
    assert shares("uniform") == pytest.approx([0.1, 0.337, 0.5, 0.663, 0.9], abs=0.03)


def test_a_term_of_every_other_step_weighs_twice_as_much_then_and_nothing_in_between(tmp_path: Path) -> None:
    folder = write_instance(tmp_path / "cups")

    def losses(step: int, **settings: Any) -> dict[str, float]:
        return Step(folder, replace(CONFIG, **settings)).run(step, None)[0].as_floats()

    rare = replace(CONFIG.prior, every_steps=2)
    assert losses(0, prior=rare)["prior"] == pytest.approx(2 * losses(0)["prior"])
    assert losses(1, prior=rare)["prior"] == 0 < losses(1)["prior"]
    plain, each, there, absent = (losses(step, locality_weight=weight, locality_every=every)["diffusion"]
                                  for step, weight, every in ((0, 0.0, 1), (0, 1.0, 1), (0, 1.0, 2), (1, 1.0, 2)))  # fmt: skip
    assert there - plain == pytest.approx(2 * (each - plain), rel=1e-3) and each > plain
    assert absent == pytest.approx(losses(1, locality_weight=0.0)["diffusion"])
