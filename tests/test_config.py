"""Settings check themselves, whoever makes them: a preset's change, a script, or a bundle's JSON."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import pytest

from mifo import config as module
from mifo.checked import Checked
from mifo.config import (
    AttentionTerms,
    CompositeConfig,
    EditConfig,
    GuidanceConfig,
    LearnConfig,
    LoraPhase,
    SynthesisConfig,
    from_dict,
    to_dict,
)
from mifo.errors import InputError
from mifo.presets import edit_preset, learn_preset, synthesis_preset, with_attention_loss

KINDS = [k for k in vars(module).values() if isinstance(k, type) and is_dataclass(k) and k.__module__ == module.__name__]


def test_a_misspelt_choice_names_the_choices():
    with pytest.raises(InputError, match="loss is 'penality', expected one of 'reward-penalty', 'match', 'none'"):
        AttentionTerms(loss="penality")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'ddim'"):
        replace(SynthesisConfig(), scheduler="dimm")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="recipe is 'mifos', expected one of 'mifo', 'break-a-scene'"):
        from_dict(LearnConfig, {"recipe": "mifos"})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (LearnConfig, "seed", "abc"), (LearnConfig, "seed", -1), (LearnConfig, "seed", True), (LearnConfig, "seed", 1.5),
        (LearnConfig, "flip_probability", 1.1), (LearnConfig, "adam_betas", [0.9]), (LearnConfig, "adam_betas", [0.9, 1.0]),
        (LearnConfig, "resolution", 0), (LearnConfig, "lora", None), (LearnConfig, "union_sampling", "yes"),
        (LearnConfig, "mixed_precision", "fp8"), (LearnConfig, "max_grad_norm", float("nan")),
        (LoraPhase, "rank", 0), (LoraPhase, "learning_rate", float("inf")), (LoraPhase, "train_steps", -1),
        (AttentionTerms, "blocks", "up_blocks"), (AttentionTerms, "blocks", [1]), (AttentionTerms, "max_timestep", None),
        (SynthesisConfig, "steps", 1001), (SynthesisConfig, "negative_prompt", None), (SynthesisConfig, "width", "512"),
        (GuidanceConfig, "max_iterations", 2.0), (EditConfig, "blending_start_percentage", 1.0), (EditConfig, "start", "image "),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_built_or_read(kind: type[Any], name: str, value: Any):
    plain = tuple(value) if isinstance(value, list) else value
    with pytest.raises(InputError, match=rf"{kind.__name__}\.{name} is .*, expected "):
        replace(kind(), **{name: plain})
    with pytest.raises(InputError, match=name):
        from_dict(kind, {name: value}, "config")


def test_what_is_wrong_deep_inside_is_found_and_placed():
    with pytest.raises(InputError, match=r"config\.lora\.attention .*loss is 'penality'"):
        from_dict(LearnConfig, {"lora": {"attention": {"loss": "penality"}}})
    with pytest.raises(InputError, match=r"config\.prior is \[1\], expected an object"):
        from_dict(LearnConfig, {"prior": [1]})


def test_every_settings_class_checks_itself():
    assert len(KINDS) > 8 and all(issubclass(kind, Checked) for kind in KINDS)
    for kind in KINDS:
        assert fields(kind)
        with pytest.raises(InputError):
            kind(**{fields(kind)[0].name: object()})


@pytest.mark.parametrize("family", ["toybox", "stable-diffusion"])
def test_presets_survive_json(family: str):
    for recipe in ("mifo", "break-a-scene"):
        preset = learn_preset(family, recipe)
        assert from_dict(LearnConfig, json.loads(json.dumps(to_dict(preset)))) == preset
    for made in (synthesis_preset(family), edit_preset(family)):
        assert from_dict(type(made), json.loads(json.dumps(to_dict(made)))) == made


def test_whole_numbers_pass_for_real_ones():
    """JSON written by other programs has 1 for 1.0, and numpy's numbers are no JSON: what is equal is written alike."""
    read, made = from_dict(SynthesisConfig, {"guidance_scale": 7, "width": 64}), SynthesisConfig(guidance_scale=7.0, width=64)
    assert read == made and json.dumps(to_dict(read)) == json.dumps(to_dict(made))
    from_numpy = SynthesisConfig(guidance_scale=np.float32(7), width=np.int64(64))  # type: ignore[arg-type]
    assert json.dumps(to_dict(from_numpy)) == json.dumps(to_dict(made))
    assert str(to_dict(CompositeConfig(scale=(1, 2)))["scale"]) in ("(1.0, 2.0)", "[1.0, 2.0]")


def test_a_setting_that_was_retired_is_still_read_in_old_bundles() -> None:
    record = to_dict(learn_preset("toybox"))
    record["lora"]["full_unet"] = False
    assert from_dict(LearnConfig, record) == learn_preset("toybox")


def test_a_comparison_on_the_toybox_gives_each_recipe_the_same_steps_rates_and_prior() -> None:
    """A baseline once had fewer steps, rates that nobody had searched, and another loss; its numbers were worth nothing."""
    ours, theirs = (learn_preset("toybox", recipe) for recipe in ("mifo", "break-a-scene"))
    for a, b in ((ours.embedding, theirs.embedding), (ours.lora, theirs.lora)):
        assert (a.train_steps, a.draws, a.learning_rate) == (b.train_steps, b.draws, b.learning_rate)
    assert (ours.lora.row_learning_rate, ours.lora.rank) == (theirs.lora.row_learning_rate, theirs.lora.rank)
    assert ours.prior == replace(theirs.prior, class_prompt=ours.prior.class_prompt)
    published = learn_preset("stable-diffusion", "break-a-scene")
    assert (published.embedding.train_steps, published.lora.train_steps, published.embedding.learning_rate) == (400, 400, 5e-4)


def test_another_attention_loss_leaves_all_else_of_stable_diffusions_preset() -> None:
    preset = learn_preset("stable-diffusion")
    match, none = (with_attention_loss(preset, "stable-diffusion", loss) for loss in ("match", "none"))
    assert (match.lora.attention.penalty_weight, match.lora.attention.average_sites) == (0.01, True)  # as published
    assert none.lora.attention.loss == "none" and none.embedding.learning_rate == preset.embedding.learning_rate
    for changed in (match, none):
        back = replace(changed, embedding=replace(changed.embedding, attention=preset.embedding.attention),
                       lora=replace(changed.lora, attention=preset.lora.attention))  # fmt: skip
        assert back == preset
    with pytest.raises(InputError, match="attention loss 'reward' is not known; choose reward-penalty, match or none"):
        with_attention_loss(preset, "stable-diffusion", "reward")


def test_as_large_a_part_of_other_steps_is_guided() -> None:
    from mifo.config import EditConfig, SynthesisConfig, with_steps

    plain = SynthesisConfig()  # 15 of 50
    assert [with_steps(plain, steps).guidance.steps for steps in (50, 100, 25, 20, 1)] == [15, 30, 8, 6, 1]
    assert with_steps(plain, None) is plain and with_steps(plain, 25).steps == 25
    assert with_steps(EditConfig(), 100).guidance.steps == 30


def test_edits_begin_and_end_where_each_family_was_measured() -> None:
    """Stable Diffusion as published; the embedded model's things were cut off at the mask, and of 20 steps it misses 5."""
    published, embedded = edit_preset("stable-diffusion"), edit_preset("toybox")
    assert (published.blending_start_percentage, published.box_inset) == (0.25, 0.0)
    assert (embedded.blending_start_percentage, embedded.box_inset) == (0.0, 0.1)
