"""One asset learned again, or one more, into a bundle whose other assets stay."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import copy_bundle, learn_arguments, load_base, mifo, snapshot, tiny_base_folder, write_instance

import mifo as api
from mifo.bundle.store import attach, load_bundle
from mifo.config import CompositeConfig
from mifo.data.instance import fit_instance, load_instance, with_background
from mifo.errors import InputError
from mifo.learning.composites import Composites
from mifo.learning.dataset import InstanceData
from mifo.learning.prior import PriorData
from mifo.learning.relearn import prior_of_the_others, relearn_config, start_from
from mifo.learning.trainer import Callback, PhaseRun, Trainer
from mifo.presets import learn_preset


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A bundle of two assets, and instance folders of two and of three."""
    copy_bundle(tmp_path / "out", "desk")
    write_instance(tmp_path / "desk")
    write_instance(tmp_path / "wider" / "desk", assets=3)
    return tmp_path


def relearn(place: Path, folder: str, *more: object, exit_code: int = 0) -> str:
    arguments = [*learn_arguments(place / folder, place / "out"), "--lora-rank", 16, "--into", "desk", *more]
    return mifo(*arguments, exit_code=exit_code).output


def test_the_others_embeddings_stay_and_its_own_is_new(place: Path) -> None:
    before = load_bundle(place / "out" / "desk")
    relearn(place, "desk", "--only", "asset1")
    after = load_bundle(place / "out" / "desk")
    assert torch.equal(after.token_embeddings[0], before.token_embeddings[0])
    assert not torch.allclose(after.token_embeddings[1], before.token_embeddings[1])
    # the LoRA goes on from the bundle's: it changed, and is nearer to it than to none
    for name in before.adapters:
        old, new = (torch.cat([b.lora[name].weights[key].float().flatten() for key in before.lora[name].weights])
                    for b in (before, after))  # fmt: skip
        assert 0 < (new - old).norm() < new.norm()
    assert [entry["tokens"] for entry in after.metadata["relearned"]] == [["<asset1>"]]
    assert after.config == before.config
    relearn(place, "desk", "--only", "<asset0>", "--seed", "3")
    twice = load_bundle(place / "out" / "desk")
    assert [entry["tokens"] for entry in twice.metadata["relearned"]] == [["<asset1>"], ["<asset0>"]]
    assert torch.equal(twice.token_embeddings[1], after.token_embeddings[1])


def test_an_asset_is_added(place: Path) -> None:
    before = load_bundle(place / "out" / "desk")
    relearn(place, "wider/desk", "--only", "asset2")
    after = load_bundle(place / "out" / "desk")
    assert after.tokens == ("<asset0>", "<asset1>", "<asset2>")
    assert torch.equal(after.token_embeddings[:2], before.token_embeddings)


def test_under_another_name_the_bundle_stays(place: Path) -> None:
    before = snapshot(place / "out" / "desk")
    relearn(place, "desk", "--only", "asset1", "--name", "desk2")
    assert snapshot(place / "out" / "desk") == before
    first, second = (load_bundle(place / "out" / name) for name in ("desk", "desk2"))
    assert torch.equal(first.token_embeddings[0], second.token_embeddings[0])


def test_an_interrupted_relearning_goes_on_to_the_same_bytes(place: Path) -> None:
    shutil.copytree(place / "out", place / "whole")
    instance, bundle = load_instance(place / "desk"), load_bundle(place / "whole" / "desk")
    config = replace(bundle.config, prior=replace(bundle.config.prior, every_steps=1))  # as few steps as the bundle had
    base = load_base()
    done = api.learn(instance, base, place / "whole" / "desk", config, into=bundle, only=["asset1"])

    class Stop(Callback):
        def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
            if phase.name == "lora" and phase.steps_done == 1:
                raise KeyboardInterrupt
            return False

    bundle = load_bundle(place / "out" / "desk")
    with pytest.raises(KeyboardInterrupt):
        api.learn(instance, base, place / "out" / "desk", config, into=bundle, only=["asset1"], callbacks=[Stop()],
                  checkpoint_every=1)  # fmt: skip
    again = api.learn(instance, base, place / "out" / "desk", config, into=bundle, only=["asset1"], checkpoint_every=1,
                      resume=True)  # fmt: skip
    assert again.digest == done.digest


def test_each_step_is_about_what_is_learned(place: Path) -> None:
    base = load_base()
    data = InstanceData(fit_instance(load_instance(place / "wider" / "desk"), 64), base, about=["<asset2>"])
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    drawn = [data.sample(rng, generator, 1, True, 0.0).assets for _ in range(60)]
    assert all(2 in assets for assets in drawn) and {len(assets) for assets in drawn} == {1, 2, 3}


def test_half_of_the_composites_are_about_any(place: Path) -> None:
    base, composites = load_base(), CompositeConfig(share=1.0, num_backgrounds=1, sampling_steps=1)
    fitted = fit_instance(load_instance(place / "wider" / "desk"), 64)
    data = InstanceData(fitted, base, about=["<asset2>"], composites=Composites(fitted, base, composites, 0), composite_share=1.0)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    drawn = [data.sample(rng, generator, 1, True, 0.0).assets for _ in range(40)]
    # with a subset of uniform size it is in two of three; half of the steps must have it: 5 of 6, 33 of 40, give or take 5
    assert 26 <= sum(2 in assets for assets in drawn) < 40 and {(0,), (1,), (2,)} <= set(drawn)


@pytest.mark.parametrize(("share", "drawn"), [(1.0, 1), (0.0, 1 + 8)])
def test_pictures_of_the_others_are_drawn_where_no_composites_show_them(place: Path, share: float, drawn: int) -> None:
    """Of the one class prior's picture, and of eight of the asset that stays."""
    base, prior = load_base(), []

    class Look(Callback):
        def on_phase_start(self, trainer: Trainer, phase: PhaseRun) -> bool:
            prior.append(trainer.prior)
            return True

    bundle, instance = load_bundle(place / "out" / "desk"), load_instance(place / "desk")
    config = relearn_config(bundle.config, bundle)
    config = replace(config, composites=CompositeConfig(share=share, num_backgrounds=1, sampling_steps=1))
    api.learn(instance, base, place / "other", config, into=bundle, only=["asset1"], callbacks=[Look()])
    assert len({latents.sum().item() for latents in prior[0].latents}) == drawn


def test_the_background_alone_is_relearned_with_pictures_of_the_things(tmp_path: Path) -> None:
    """It is nothing to cut out, so no composite would show them."""
    write_instance(tmp_path / "desk")
    learned = mifo(*learn_arguments(tmp_path / "desk", tmp_path / "out", "--background-asset"))
    assert learned.exit_code == 0
    base, bundle, asked = load_base(), load_bundle(tmp_path / "out" / "desk"), []

    class Look(Callback):
        def on_phase_start(self, trainer: Trainer, phase: PhaseRun) -> bool:
            asked.append(trainer.prior.prompts)
            return True

    config = replace(relearn_config(bundle.config, bundle), composites=CompositeConfig(share=1.0, num_backgrounds=1))
    instance = with_background(load_instance(tmp_path / "desk"))
    api.learn(instance, base, tmp_path / "other", config, into=bundle, only=["background"], callbacks=[Look()])
    assert {"a photo of <asset0>", "a photo of <asset1>"} < set(asked[0])


def test_the_others_pictures_take_turns_with_the_class_prior(place: Path) -> None:
    base, bundle = load_base(), load_bundle(place / "out" / "desk")
    start = start_from(bundle, ["asset1"], load_instance(place / "desk"))
    latents = torch.zeros(2, base.unet.config["in_channels"], 8, 8)
    with attach(base, bundle):
        prior = prior_of_the_others(base, start, bundle.config, PriorData(("a photo",), latents), (64, 64), lambda k, n: None)
        alone = prior_of_the_others(base, start, bundle.config, None, (64, 64), lambda k, n: None)
    assert prior is not None and alone is not None
    assert prior.prompts[:4] == ("a photo", "a photo of <asset0>") * 2 and set(alone.prompts) == {"a photo of <asset0>"}
    assert torch.equal(prior.latents[1::2], alone.latents) and float(alone.latents.std()) > 0.1


@pytest.mark.parametrize(("folder", "options", "said"), [
    ("desk", ["--only", "asset5"], "has no <asset5>: its assets are <asset0>, <asset1>"),
    ("desk", [], "name one of <asset0>, <asset1>"),
    ("desk", ["--only", "asset0", "--only", "asset1"], "no asset of desk would stay"),
    ("wider/desk", ["--only", "asset1"], "has no <asset2> yet"),
    ("desk", ["--only", "asset1", "--lora-rank", "3"], "LoRA of rank"),
    ("desk", ["--only", "asset1", "--into", "dask"], "no learned bundle 'dask'"),
])  # fmt: skip
def test_what_cannot_be_is_said_and_nothing_is_lost(place: Path, folder: str, options: list[str], said: str) -> None:
    before = snapshot(place / "out")
    assert said in " ".join(relearn(place, folder, *options, exit_code=2).split())
    assert snapshot(place / "out") == before


def test_a_bundle_with_a_file_of_somebodys_is_left_alone(place: Path) -> None:
    (place / "out" / "desk" / "notes.txt").write_text("mine")
    before = snapshot(place / "out" / "desk")
    assert "notes.txt" in relearn(place, "desk", "--only", "asset1", exit_code=2)
    assert snapshot(place / "out" / "desk") == before


def test_fewer_steps_are_fewer_of_each_part(place: Path) -> None:
    preset = learn_preset("toybox")
    fewer = relearn_config(preset, load_bundle(place / "out" / "desk"))
    assert (fewer.embedding.train_steps, fewer.lora.train_steps) == (60, 80)  # of 150 and 200
    assert (fewer.embedding.attention.reward_steps, fewer.embedding.warmup_steps) == (20, 4)  # of 50 and 10
    assert fewer.lora.rank == load_bundle(place / "out" / "desk").config.lora.rank


def test_only_needs_a_bundle(place: Path) -> None:
    arguments = [*learn_arguments(place / "desk", place / "out"), "--only", "asset1"]
    assert "Add --into NAME" in mifo(*arguments, exit_code=2).output
    with pytest.raises(InputError, match="into which bundle"):
        api.learn(load_instance(place / "desk"), load_base(), place / "x", only=["asset1"])
    assert not (place / "x").exists()


def test_another_base_is_refused(place: Path) -> None:
    other = Path(shutil.copytree(tiny_base_folder(1), place / "base"))
    arguments = learn_arguments(place / "desk", place / "out", "--into", "desk", "--only", "asset1",
                                "--lora-rank", 16)  # fmt: skip
    changed = [str(other) if str(a) == str(tiny_base_folder()) else a for a in arguments]
    assert "base model" in mifo(*changed, exit_code=2).output
    assert json.loads((place / "out" / "desk" / "bundle.json").read_text()).get("relearned") is None
