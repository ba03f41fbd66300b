"""Several bundles in one picture: names, errors, and LoRA that acts in its own boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mifo.boxes import Layout
from mifo.bundle.shelf import check_name
from mifo.errors import InputError

if TYPE_CHECKING:
    from mifo.bundle.store import Bundle
    from mifo.model.base import BaseModel

LEFT, RIGHT = [0.05, 0.25, 0.45, 0.75], [0.55, 0.25, 0.95, 0.75]


def make_bundle(base: BaseModel, folder: Path, seed: int, things: int = 2, rank: int = 4, background: bool = False) -> Bundle:
    """Random weights, strong enough to change a picture at once."""
    import torch

    from mifo.bundle.store import save_bundle
    from mifo.config import LearnConfig, LoraPhase
    from mifo.model.lora import add_adapters, remove_adapter
    from mifo.prompts import BACKGROUND_TOKEN, asset_token

    generator = torch.Generator().manual_seed(seed)
    adapters = add_adapters(base, rank, True, seed)
    try:
        for adapter in adapters.values():
            for name, weight in adapter.named_parameters():
                if "lora_B" in name:
                    weight.data = 0.15 * torch.randn(weight.shape, generator=generator)
        tokens = (*(asset_token(k) for k in range(things)), *([BACKGROUND_TOKEN] if background else []))
        rows = torch.randn(len(tokens), base.text_width, generator=generator) * 0.2
        return save_bundle(folder, base, tokens, None, rows, adapters, LearnConfig(lora=LoraPhase(rank=rank)), {})
    finally:
        for adapter in adapters.values():
            remove_adapter(adapter)


@pytest.fixture(scope="module")
def pair(toybox_random_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    place = tmp_path_factory.mktemp("bundles")
    return (make_bundle(toybox_random_base, place / "desk", 1), make_bundle(toybox_random_base, place / "shelf", 2, 3, 8))


def several(bundles: tuple[Bundle, ...], **aliases: str) -> Any:
    from mifo.bundle.several import Several

    return Several(bundles, aliases)


def test_names_within_a_picture_and_back(pair: tuple[Bundle, Bundle]) -> None:
    both = several(pair, cat="shelf.asset2")
    assert both.tokens == tuple(f"<asset{k}>" for k in range(5))
    prompt = "a <cat> and <desk.asset1>, <Shelf.asset0> no"
    with pytest.raises(InputError, match="did you mean 'shelf'"):
        both.within(prompt)
    prompt = "a photo of <cat> and <asset1> beside <shelf.asset0>"
    assert both.within(prompt) == "a photo of <asset4> and <asset1> beside <asset2>"
    assert both.outside(both.within(prompt)) == "a photo of <shelf.asset2> and <desk.asset1> beside <shelf.asset0>"
    assert both.within(both.outside(both.within(prompt))) == both.within(prompt)
    assert both.owners == {"<asset0>": 0, "<asset1>": 0, "<asset2>": 1, "<asset3>": 1, "<asset4>": 1, "<background>": 0}


@pytest.mark.parametrize("name", ["my desk", "v1.2", "desk.asset0", "café №1", "a,b=c", "asset0", "shelf."])
def test_every_name_that_a_bundle_may_have_can_be_said(pair: tuple[Bundle, Bundle], name: str) -> None:
    assert check_name(name) == name
    both = several((pair[0], replace(pair[1], name=name)), cat=f"{name}.asset2")
    prompt = f"a <cat>, < {name}.Asset1 > and <asset0>"
    assert both.within(prompt) == "a <asset4>, <asset3> and <asset0>"
    assert both.within(both.outside(both.within(prompt))) == both.within(prompt)
    assert both.token_of(both.bundles[1], "<asset0>") == "<asset2>"
    layout = both.layout({f"{name}.asset2": [0, 0, 0.5, 1]}, "a photo of <asset4>", by_place=True)
    assert both.layout_outside(layout) == Layout((f"<{name}.asset2>",), layout.boxes)


@pytest.mark.parametrize("name", ["a>b", "<x", " desk", "desk "])
def test_a_name_that_no_prompt_can_say_is_refused(pair: tuple[Bundle, Bundle], name: str) -> None:
    with pytest.raises(InputError, match="cannot name a bundle"):
        check_name(name)
    with pytest.raises(InputError, match="rename its folder"):
        several((pair[0], replace(pair[1], name=name)))
    # by itself no one says its name
    assert several((replace(pair[0], name=name),)).within("a photo of <asset1>") == "a photo of <asset1>"


@pytest.mark.parametrize(("prompt", "said"), [
    ("a <desk.asset2>", "'desk' has <asset0>, <asset1>"), ("a <asset2>", "'desk' has <asset0>, <asset1>"),
    ("a <lamp.asset0>", "bundles are desk, shelf"), ("a <shelf.background>", "one background"),
])  # fmt: skip
def test_an_asset_that_no_bundle_has_is_named(pair: tuple[Bundle, Bundle], prompt: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        several(pair).within(prompt)


def test_bundles_that_cannot_go_together(pair: tuple[Bundle, Bundle]) -> None:
    with pytest.raises(InputError, match="two bundles are called 'desk'"):
        several((pair[0], pair[0]))
    with pytest.raises(InputError, match="same base model"):
        several((pair[0], replace(pair[1], base_fingerprint="another")))
    for word in ("asset7", "background", "2nd", "a b"):
        with pytest.raises(InputError, match="--as gives the word"):
            several(pair, **{word: "desk.asset0"})


def pictures(base: BaseModel, bundles: Any, prompt: str, boxes: Any, **changes: Any) -> np.ndarray:
    from mifo import synthesize
    from mifo.presets import synthesis_preset

    preset = synthesis_preset("toybox")
    config = replace(preset, steps=4, refinement=replace(preset.refinement, enabled=False))
    more = {k: changes.pop(k) for k in ("background_lora", "num_images") if k in changes}
    result = synthesize(base, bundles, prompt, boxes, config=replace(config, **changes), **more)
    return np.stack([np.asarray(image).astype(int) for image in result.images])


def test_over_the_whole_picture_by_place_is_everywhere(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    """One asset whose box is the picture: its LoRA acts on every pixel and every word that is read, as PEFT's does. Guidance
    and classifier-free guidance included; the two sum up in another order, so a pixel may round the other way."""
    prompt, whole = "a photo of <asset0> on the grass", [[0, 0, 1, 1]]
    everywhere = pictures(toybox_random_base, pair[0], prompt, whole)
    in_boxes = pictures(toybox_random_base, pair[0], prompt, whole, lora="boxes")
    without = pictures(toybox_random_base, pair[0], prompt, whole, lora_scale=0.0)
    assert abs(everywhere - in_boxes).max() <= 1
    assert abs(everywhere - without).max() > 10  # the adapter is strong enough for that to say something


def test_lora_changes_its_own_layers_pixels_alone(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    """Each adapted layer by itself, against the obvious: PEFT's own output on the pixels of the box, the plain one elsewhere."""
    import torch

    from mifo.attention.bounded import BoundedAttention, ForwardPass, Owners
    from mifo.boxes import Box, Layout
    from mifo.bundle.several import lend
    from mifo.prompts import tokenize_prompt

    base, both = toybox_random_base, several(pair)
    layout = Layout(("<asset0>", "<asset2>"), (Box(*LEFT), Box(*RIGHT)))
    with lend(base, both, by_place=True):
        prompt = tokenize_prompt(base.tokenizer, "a photo of <asset0> and <asset2>", ["<asset0>", "<asset2>"])
        local = base.local_lora
        control = BoundedAttention(prompt, layout, (16, 16), "cpu", True, sampling=ForwardPass(2, True),
                                   owners=Owners(2, local.owners_of(layout.tokens)))  # fmt: skip
        inside = torch.from_numpy(control.box_masks((16, 16)))
        checked = 0
        for layer in local.layers:
            if layer.module.in_features != layer.module.out_features or "attn1" not in layer.name:
                continue
            x = torch.randn(4, 256, layer.module.in_features, generator=torch.Generator().manual_seed(0))
            plain = layer.module(x)
            with local.bound_to(control):
                changed = layer.module(x)
            for owner, mask in enumerate(inside):
                weights = pair[owner].lora["unet_lora"].weights
                down, up = (weights[f"base_model.model.{layer.name}.lora_{m}.weight"].float() for m in "AB")
                expected = plain + x @ down.T @ up.T
                torch.testing.assert_close(changed[:, mask], expected[:, mask], atol=1e-4, rtol=1e-4)
            outside = ~inside.any(0)
            assert torch.equal(changed[:, outside], plain[:, outside])
            checked += 1
        assert checked > 4
        gates = control.key_gates()
        length = len(prompt.input_ids)
        assert gates.shape == (3 * length, 2)
        assert gates[:length].sum() == 0  # the background's text
        assert (gates[length : 2 * length, 0] == 1).all() and (gates[2 * length :, 1] == 1).all() and gates.sum() == 2 * length


def test_the_background_has_no_lora_unless_it_is_asked_for(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    prompt, boxes = "a photo of <asset0> and <shelf.asset0>", [LEFT, RIGHT]
    plain = pictures(toybox_random_base, list(pair), prompt, boxes)
    asked = pictures(toybox_random_base, list(pair), prompt, boxes, background_lora="shelf")
    assert abs(plain - asked).mean() > 1
    with pytest.raises(InputError, match="did you mean 'shelf'"):
        pictures(toybox_random_base, list(pair), prompt, boxes, background_lora="shelv")


def test_pictures_of_a_batch_are_those_of_their_seeds(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    from mifo import synthesize
    from mifo.presets import synthesis_preset

    config = replace(synthesis_preset("toybox"), steps=4)  # refined masks differ from picture to picture
    prompt, boxes = "a photo of <asset0> and <shelf.asset0>", [LEFT, RIGHT]
    both = synthesize(toybox_random_base, list(pair), prompt, boxes, config=config, num_images=2).images
    alone = synthesize(toybox_random_base, list(pair), prompt, boxes, config=config, seed=1).images
    assert abs(np.asarray(both[1]).astype(int) - np.asarray(alone[0]).astype(int)).max() <= 2  # sums of another shape


def test_adapters_that_do_not_fit_are_refused(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    """Whatever would be left out in silence is named instead."""
    import torch

    adapter = pair[1].lora["unet_lora"]
    name = next(key for key in adapter.weights if key.endswith("to_q.lora_A.weight"))
    layer = name.removesuffix(".lora_A.weight")
    spoilt = ({name: adapter.weights[name][:, :3]}, {f"{layer}.lora_magnitude_vector": torch.ones(4)},
              {f"base_model.model.nowhere.lora_{m}.weight": torch.ones(2, 2) for m in "AB"})  # fmt: skip
    for changes in spoilt:
        other = replace(pair[1], lora={**pair[1].lora, "unet_lora": replace(adapter, weights={**adapter.weights, **changes})})
        with pytest.raises(InputError, match="does not fit the base model's layers"):
            pictures(toybox_random_base, [pair[0], other], "a photo of <asset0>", {"<asset0>": LEFT})


def test_every_asset_needs_a_box(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    with pytest.raises(InputError, match=r"<desk\.asset0>, <shelf\.asset0> has no box"):
        pictures(toybox_random_base, list(pair), "a photo of <asset0> and <shelf.asset0>", None)
    with pytest.raises(InputError, match="leave bounded attention on"):
        pictures(toybox_random_base, list(pair), "a photo of <asset0>", {"<asset0>": LEFT}, bounded=False)


def test_the_base_is_handed_back_as_it_was(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    base = toybox_random_base
    before = pictures(base, None, "a photo of a car", None)
    pictures(base, list(pair), "a photo of <asset0> and <shelf.asset0>", [LEFT, RIGHT])
    assert base.local_lora is None and not any(m._forward_hooks for m in base.unet.modules())
    assert (pictures(base, None, "a photo of a car", None) == before).all()


def test_records_name_the_bundles_and_recipes_are_read_back(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle],
                                                            tmp_path: Path) -> None:  # fmt: skip
    from mifo import synthesize
    from mifo.presets import synthesis_preset
    from mifo.synthesis.recipe import read_recipe

    config = replace(synthesis_preset("toybox"), steps=2)
    boxes = {"desk.asset0": LEFT, "<cat>": RIGHT}
    result = synthesize(toybox_random_base, list(pair), "a photo of <asset0> and <cat>", boxes, config=config,
                        aliases={"cat": "shelf.asset2"})  # fmt: skip
    (path,) = result.save(tmp_path / "out")
    recipe = read_recipe(path)
    assert recipe.bundles == ("desk", "shelf") and recipe.prompt == "a photo of <desk.asset0> and <shelf.asset2>"
    again = synthesize(toybox_random_base, list(pair), recipe.prompt, recipe.layout, config=recipe.config, seed=recipe.seed)
    assert (np.asarray(again.images[0]) == np.asarray(result.images[0])).all()


def test_an_edit_takes_assets_of_several_bundles(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle]) -> None:
    from PIL import Image

    from mifo import edit
    from mifo.presets import edit_preset

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8))
    mask = np.zeros((128, 128), bool)
    mask[20:108, 10:118] = True
    result = edit(toybox_random_base, list(pair), picture, mask, "a photo of <asset0> and <shelf.asset1>", [LEFT, RIGHT],
                  config=replace(edit_preset("toybox"), steps=3))  # fmt: skip
    edited, before = np.asarray(result.images[0]), np.asarray(picture)
    assert (edited[~mask] == before[~mask]).all() and (edited[mask] != before[mask]).any()
    assert result.facts["bundles"] == ["desk", "shelf"]


def test_a_box_within_a_later_one_is_noted() -> None:
    from mifo.boxes import Box, Layout
    from mifo.bundle.several import hidden_boxes

    small, large = Box(0.2, 0.2, 0.4, 0.4), Box(0.1, 0.1, 0.6, 0.6)
    assert hidden_boxes(Layout(("<asset0>", "<asset1>"), (small, large))) == [("<asset0>", "<asset1>")]
    assert hidden_boxes(Layout(("<asset0>", "<asset1>"), (large, small))) == []


def test_the_first_bundle_s_background_is_the_picture_s(toybox_random_base: BaseModel, pair: tuple[Bundle, Bundle],
                                                        tmp_path: Path) -> None:  # fmt: skip
    """Each word means the row that its own bundle learned; another bundle's background is left out."""
    import torch

    from mifo.bundle.several import lend
    from mifo.prompts import BACKGROUND_TOKEN, tokenize_prompt

    base, desk = toybox_random_base, make_bundle(toybox_random_base, tmp_path / "desk", 3, background=True)
    shelf = make_bundle(base, tmp_path / "shelf", 4, background=True)
    both = several((desk, shelf))
    assert both.tokens == (*(f"<asset{k}>" for k in range(4)), BACKGROUND_TOKEN)
    named = ("<asset1>", "<asset3>", BACKGROUND_TOKEN)
    with lend(base, both, by_place=True):
        found = tokenize_prompt(base.tokenizer, both.within("<shelf.asset1> on <background> by <asset1>"), list(named))
        rows = base.text_encoder.get_input_embeddings()(torch.tensor(found.input_ids))
        number = base.tokenizer.get_added_vocab()
        meant = [rows[found.input_ids.index(number[token])] for token in named]
    for row, learned in zip(meant, (desk.token_embeddings[1], shelf.token_embeddings[1], desk.token_embeddings[2]), strict=True):
        assert torch.equal(row, learned)
    assert several((pair[0], shelf)).tokens == tuple(f"<asset{k}>" for k in range(4))
    with pytest.raises(InputError, match="one background"):
        several((pair[0], shelf)).within("a <shelf.background>")
