"""Attention sites, lent processors, recorded maps, and attention bounded to boxes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from mifo.attention.bounded import BoundedAttention, ForwardPass, bound_attention
from mifo.attention.record import record_attention, token_maps
from mifo.attention.sites import (
    Site,
    attention_probabilities,
    attention_sites,
    choose_sites,
    sdpa,
    use_processors,
)
from mifo.boxes import Box, Layout
from mifo.config import LearnConfig, from_dict, to_dict
from mifo.errors import InputError
from mifo.model.base import BaseModel
from mifo.presets import learn_preset, synthesis_preset
from mifo.prompts import TokenizedPrompt

LENGTH = 9
#: start, a, photo, of, <asset1>, and, <asset0>, end of text, padding
PROMPT = TokenizedPrompt(list(range(LENGTH)), {"<asset0>": (6,), "<asset1>": (4,)}, (1, 3, 5), end_position=7, length=8)
#: on a 4x4 map:  A A . .    <asset0> is A, <asset1> is B
#:                A A . .
#:                . . B B
#:                . . B B
CORNERS = Layout(("<asset0>", "<asset1>"), (Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1)))
CORNER_PIXELS = "AA.. AA.. ..BB ..BB".replace(" ", "")
CROSS, SELF = Site("cross", "mid_block", True, 0), Site("self", "mid_block", False, 0)


def inputs(unet: UNet2DConditionModel, batch: int = 1, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """Random latents, a timestep and random states."""
    generator = torch.Generator().manual_seed(5)
    height, width = size or (unet.config["sample_size"],) * 2
    return {
        "sample": torch.randn(batch, unet.config["in_channels"], height, width, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, LENGTH, unet.config["cross_attention_dim"], generator=generator),
    }


def attention_module(unet: UNet2DConditionModel, site: Site) -> torch.nn.Module:
    return unet.get_submodule(site.name.removesuffix(".processor"))


# --- sites --------------------------------------------------------------------------------------


def kinds_and_sizes(unet: UNet2DConditionModel) -> list[tuple[str, str, int]]:
    native = unet.config["sample_size"]
    return [(s.block, "cross" if s.is_cross else "self", s.map_size(native, native)[0]) for s in attention_sites(unet)]


def in_call_order(*blocks: tuple[str, int, int]) -> list[tuple[str, str, int]]:
    """(block, map size, transformers) -> self- and cross-attention in turn."""
    return [(block, kind, size) for block, size, count in blocks for _ in range(count) for kind in ("self", "cross")]


def test_the_sites_of_the_toybox(toybox_random_base: BaseModel) -> None:
    expected = in_call_order(("down_blocks.1", 8, 1), ("mid_block", 8, 1), ("up_blocks.0", 8, 2), ("up_blocks.1", 16, 2))
    assert kinds_and_sizes(toybox_random_base.unet) == expected


def test_the_sites_of_stable_diffusion_at_64_latents(tiny_sd_base: BaseModel) -> None:
    unet = UNet2DConditionModel.from_config({**tiny_sd_base.unet.config, "sample_size": 64})
    assert kinds_and_sizes(unet) == in_call_order(
        ("down_blocks.0", 64, 2), ("down_blocks.1", 32, 2), ("down_blocks.2", 16, 2), ("mid_block", 8, 1),
        ("up_blocks.1", 16, 3), ("up_blocks.2", 32, 3), ("up_blocks.3", 64, 3),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (13, 15)])
def test_sites_are_listed_as_they_are_called_and_with_the_size_of_their_maps(any_base: BaseModel, size: tuple[int, int]) -> None:
    unet, called, hooks = any_base.unet, [], []
    for site in attention_sites(unet):
        hooks.append(attention_module(unet, site).register_forward_pre_hook(
            lambda _, arguments, site=site: called.append((site.name, arguments[0].shape[1]))
        ))  # fmt: skip
    with torch.no_grad():
        unet(**inputs(unet, size=size))
    for hook in hooks:
        hook.remove()
    assert called == [(s.name, math.prod(s.map_size(*size))) for s in attention_sites(unet)]


def test_sites_are_chosen_by_block_size_and_kind(tiny_sd_base: BaseModel) -> None:
    def chosen(*arguments: Any) -> list[tuple[str, bool]]:
        return [(s.block, s.is_cross) for s in choose_sites(tiny_sd_base.unet, *arguments)]

    assert chosen(("up_blocks",), (2, 4)) == [("up_blocks.1", True)] * 3 + [("up_blocks.2", True)] * 3
    assert chosen(("mid_block", "up_blocks.1"), (8, 4), ("cross", "self")) == (
        [("mid_block", False), ("mid_block", True)] + [("up_blocks.1", False), ("up_blocks.1", True)] * 3
    )
    assert chosen(("down_blocks",), (2,), ("self",)) == [("down_blocks.1", False)] * 2


def test_a_choice_without_any_site_tells_what_there_is(toybox_random_base: BaseModel, tiny_sd_base: BaseModel) -> None:
    there = r"in down_blocks at level 1 .*; it has down_blocks.1 at level 2, .* up_blocks.1 at level 1"
    with pytest.raises(InputError, match=there):
        choose_sites(toybox_random_base.unet, ("down_blocks",), (1,))
    with pytest.raises(InputError, match=r"levels \[16\] do not exist; choose from 1, 2, 4, 8"):
        choose_sites(tiny_sd_base.unet, ("up_blocks",), (16,))


@pytest.mark.parametrize("sample_size", [32, 64, 96, 128])
def test_the_presets_choose_the_same_sites_of_stable_diffusion_at_every_size(tiny_sd_base: BaseModel, sample_size: int) -> None:
    """By name: those of map sizes 16 and 32 (8 and 16 for guidance) at 64x64 latents, as published."""
    unet = UNet2DConditionModel.from_config({**tiny_sd_base.unet.config, "sample_size": sample_size})
    learning, placing = learn_preset("stable-diffusion"), synthesis_preset("stable-diffusion")

    def blocks(terms: Any, *kinds: str) -> dict[str, int]:
        return Counter(s.block for s in choose_sites(unet, terms.blocks, terms.levels, kinds or ("cross",)))

    assert blocks(learning.embedding.attention) == {"up_blocks.1": 3, "up_blocks.2": 3}
    assert blocks(learning.lora.attention) == {"down_blocks.2": 2, "up_blocks.1": 3}
    assert blocks(placing.guidance, "cross", "self") == {"mid_block": 2, "up_blocks.1": 6}
    assert blocks(placing.refinement) == {"up_blocks.1": 3}


def test_the_presets_choose_the_toyboxs_sites_as_before(toybox_random_base: BaseModel) -> None:
    unet, learning, placing = toybox_random_base.unet, learn_preset("toybox"), synthesis_preset("toybox")
    everywhere = ["up_blocks.0"] * 2 + ["up_blocks.1"] * 2
    assert [s.block for s in choose_sites(unet, learning.lora.attention.blocks, learning.lora.attention.levels)] == everywhere
    guided = choose_sites(unet, placing.guidance.blocks, placing.guidance.levels, ("cross",))
    assert [s.block for s in guided] == ["mid_block", *everywhere]
    refining = choose_sites(unet, placing.refinement.blocks, placing.refinement.levels)
    assert [s.block for s in refining] == ["up_blocks.1"] * 2


def test_a_level_coarser_than_the_unet_stands_for_its_coarsest(toybox_random_base: BaseModel) -> None:
    """Smaller UNets, such as those distilled from Stable Diffusion, take its presets."""
    guidance = synthesis_preset("stable-diffusion").guidance
    assert {s.level for s in choose_sites(toybox_random_base.unet, guidance.blocks, guidance.levels)} == {2}


@pytest.mark.parametrize("native, sizes, levels", [(64, [16, 32], (2, 4)), (64, [8, 16], (4, 8)), (16, [8, 16], (1, 2))])
def test_settings_saved_with_map_sizes_are_read_as_levels(native: int, sizes: list[int], levels: tuple[int, ...]) -> None:
    saved = to_dict(learn_preset("stable-diffusion"))
    terms = saved["lora"]["attention"]
    del terms["levels"]
    config = from_dict(LearnConfig, {**saved, "lora": {**saved["lora"], "attention": {**terms, "map_sizes": sizes}}},
                       native_latents=native)  # fmt: skip
    assert config.lora.attention.levels == levels
    assert from_dict(LearnConfig, to_dict(config)) == config
    with pytest.raises(InputError, match=r"config.lora.attention.map_sizes is \['x'\], expected"):
        from_dict(LearnConfig, {**saved, "lora": {**saved["lora"], "attention": {**terms, "map_sizes": ["x"]}}})


# --- borrowing the model ------------------------------------------------------------------------


class Zero:
    """A processor that silences its layer, so that its presence cannot be missed."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def borrow(unet: UNet2DConditionModel, how: str) -> Any:
    if how == "use_processors":
        return use_processors(unet, {s.name: Zero() for s in attention_sites(unet)})
    if how == "record_attention":
        return record_attention(unet, [s for s in attention_sites(unet) if s.is_cross])
    size = (unet.config["sample_size"],) * 2
    return bound_attention(unet, BoundedAttention(PROMPT, CORNERS, size, "cpu"))


@pytest.mark.parametrize("how", ["use_processors", "record_attention", "bound_attention"])
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_given_back_as_it_was(toybox_random_base: BaseModel, how: str, failing: bool) -> None:
    unet = toybox_random_base.unet
    given, processors = inputs(unet, batch=2), dict(unet.attn_processors)
    with torch.no_grad():
        before = unet(**given).sample
        try:
            with borrow(unet, how):
                assert any(unet.attn_processors[name] is not processor for name, processor in processors.items())
                inside = unet(**given).sample
                if failing:
                    raise InterruptedError("a user's Ctrl-C, say")
        except InterruptedError:
            pass
        after = unet(**given).sample
    assert (inside - before).abs().max() > 1e-7 or how == "record_attention"  # recording alone changes rounding at most
    assert torch.equal(after, before)
    assert list(unet.attn_processors) == list(processors)
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())


# --- recording ----------------------------------------------------------------------------------


def obvious_map(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, H*W, C) and (B, L, C) as the projections gave them -> (B, H*W, L), one head after the other."""
    width = query.shape[-1] // heads
    found = torch.zeros(query.shape[0], query.shape[1], key.shape[1])
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for row in range(len(query)):
            found[row] += torch.softmax(query[row, :, part] @ key[row, :, part].T / math.sqrt(width), dim=1)
    return found / heads


def test_recorded_maps_are_the_softmax_of_queries_and_keys(any_base: BaseModel) -> None:
    unet = any_base.unet
    sites = choose_sites(unet, ("down_blocks", "mid_block", "up_blocks"), (1, 2, 4))
    projected: dict[tuple[str, str], torch.Tensor] = {}
    hooks = [
        attention_module(unet, site).get_submodule(name).register_forward_hook(
            lambda _, __, output, key=(site.name, name): projected.update({key: output})
        )
        for site in sites for name in ("to_q", "to_k")
    ]  # fmt: skip
    with torch.no_grad(), record_attention(unet, sites) as recorder:
        recorder.open()
        unet(**inputs(unet, batch=2, size=(16, 24)))
        maps = recorder.take()
    for hook in hooks:
        hook.remove()
    assert set(maps) == {s.name for s in sites}
    for site in sites:
        found, heads = maps[site.name], attention_module(unet, site).heads
        assert found.shape == (2, math.prod(site.map_size(16, 24)), LENGTH)
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:2]))
        torch.testing.assert_close(found, obvious_map(projected[site.name, "to_q"], projected[site.name, "to_k"], heads))
    assert max(float(m.std(1).max()) for m in maps.values()) > 0.01, "flat maps would make this comparison empty"


def test_only_the_chosen_sites_leave_fused_attention(toybox_random_base: BaseModel) -> None:
    unet = toybox_random_base.unet
    sites, before = choose_sites(unet, ("up_blocks",), (1,)), dict(unet.attn_processors)
    with record_attention(unet, sites):
        changed = {name for name, processor in unet.attn_processors.items() if processor is not before[name]}
    assert changed == {s.name for s in sites}


def test_nothing_is_recorded_before_open_or_after_take(toybox_random_base: BaseModel) -> None:
    unet = toybox_random_base.unet
    sites = choose_sites(unet, ("mid_block",), (2,))
    with torch.no_grad(), record_attention(unet, sites) as recorder:
        unet(**inputs(unet))
        assert recorder.take() == {}
        recorder.open()
        unet(**inputs(unet))
        assert len(recorder.take()) == 1
        unet(**inputs(unet))
        assert recorder.take() == {}


def test_large_scores_survive_half_precision() -> None:
    # 64 channels of 40 x 40 make a score of 102400, above fp16's 65504; scaled by 1/8 it is 12800
    query, key = torch.full((1, 1, 1, 64), 40.0), torch.full((1, 1, 2, 64), 40.0)
    key[..., 1, :] = 39.0
    found = attention_probabilities(query.half(), key.half(), scale=1 / 8)
    torch.testing.assert_close(found, torch.tensor([[[[1.0, 0.0]]]]))


@pytest.fixture
def training_unet(any_base: BaseModel) -> Iterator[UNet2DConditionModel]:
    any_base.unet.train()
    yield any_base.unet
    any_base.unet.disable_gradient_checkpointing()
    any_base.unet.eval()


def test_checkpointing_changes_neither_the_maps_nor_their_gradients(training_unet: UNet2DConditionModel) -> None:
    unet = training_unet
    sites = choose_sites(unet, ("down_blocks", "mid_block", "up_blocks"), (1, 2, 4))
    found, runs = {}, {}
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        given = inputs(unet, size=(16, 16))
        states = given["encoder_hidden_states"].requires_grad_(True)
        calls: list[int] = []
        hooks = [
            attention_module(unet, s).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1)) for s in sites
        ]  # fmt: skip
        with record_attention(unet, sites) as recorder:
            recorder.open()
            prediction = unet(**given).sample
            maps = recorder.take()
            assert all(m.requires_grad for m in maps.values())  # the reentrant kind of checkpointing cuts them off
            kept = {name: m.detach().clone() for name, m in maps.items()}
            loss = sum(m[..., 4].pow(2).mean() for m in maps.values()) + 1e-3 * prediction.pow(2).mean()
            loss.backward()
            assert recorder.take() == {}, "the recomputation in backward was recorded"
        for hook in hooks:
            hook.remove()
        assert all(torch.equal(maps[name], m) for name, m in kept.items()), "backward overwrote a map"
        found[checkpointing], runs[checkpointing] = (kept, states.grad), len(calls)
    assert runs[False] == len(sites)
    assert runs[True] > runs[False], "checkpointing never ran a supervised layer again, so this test shows nothing"
    (plain_maps, plain), (checkpointed_maps, checkpointed) = found[False], found[True]
    assert plain_maps.keys() == checkpointed_maps.keys()
    for name in plain_maps:
        torch.testing.assert_close(checkpointed_maps[name], plain_maps[name])
    assert plain.abs().max() > 0
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_token_maps_picks_columns_and_keeps_rows_in_order() -> None:
    # latents of 4x6 pixels, halved once: maps of 2x3. The value says where it stands: row.pixel token
    site, other = Site("a", "mid_block", True, 1), Site("b", "up_blocks.1", True, 0)
    numbered = [[[100 * row + 10 * pixel + token for token in range(4)] for pixel in range(6)] for row in range(2)]
    maps = {"a": torch.tensor(numbered).float(), "b": torch.zeros(2, 24, 4)}
    first, second = token_maps(maps, [site, other], positions=[2], row=1, latent_size=(4, 6))
    assert first.tolist() == [[102, 112, 122], [132, 142, 152]]
    assert second.shape == (4, 6)
    (both,) = token_maps(maps, [site], positions=(1, 3), row=0, latent_size=(4, 6))  # a token that stands twice: the mean
    assert both.tolist() == [[2, 12, 22], [32, 42, 52]]


# --- what may see what --------------------------------------------------------------------------


def control_of(layout: Layout = CORNERS, guiding: bool = False, images: int = 1, unconditional: bool = True,
               **settings: Any) -> BoundedAttention:  # fmt: skip
    """In a sampling pass, or in a guidance pass, which has no unconditional rows."""
    sampling = ForwardPass(images, unconditional)
    control = BoundedAttention(PROMPT, layout, (4, 4), "cpu", sampling=sampling, **settings)
    if guiding:
        control.begin(ForwardPass(images, unconditional=False, guiding=True))
    return control


def as_text(mask: torch.Tensor) -> list[str]:
    """(queries, keys) -> a string of 0 and 1 for each query."""
    return ["".join(str(int(v)) for v in row) for row in mask.tolist()]


def test_cross_attention_of_a_sampling_pass() -> None:
    #                start a photo of <asset1> and <asset0> end padding
    rows = {"A": "1" "0" "1" "0" "0" "0" "1" "1" "1",
            "B": "1" "0" "1" "0" "1" "0" "0" "1" "1",
            ".": "1" "0" "1" "0" "0" "0" "0" "0" "1"}  # fmt: skip
    mask = control_of().visible(CROSS)
    assert mask is not None and mask.shape == (2, 1, 16, LENGTH)
    assert mask[0].all(), "the unconditional half sees everything"
    assert as_text(mask[1, 0]) == [rows[pixel] for pixel in CORNER_PIXELS]


def test_cross_attention_of_a_guidance_pass() -> None:
    # the background sees the assets and the end of the text, so that the loss has something to push away
    rows = {"A": "101000111", "B": "101010011", ".": "101010111"}
    mask = control_of(guiding=True).visible(CROSS)
    assert mask is not None and mask.shape == (1, 1, 16, LENGTH), "the conditional half alone"
    assert as_text(mask[0, 0]) == [rows[pixel] for pixel in CORNER_PIXELS]


def test_without_classifier_free_guidance_there_is_no_unconditional_half() -> None:
    whole, half = control_of(images=3).visible(CROSS), control_of(images=3, unconditional=False).visible(CROSS)
    assert whole is not None and half is not None
    assert whole.shape == (6, 1, 16, LENGTH)
    assert whole[:3].all() and torch.equal(whole[3:], half)


def test_overlapping_boxes_share_their_overlap() -> None:
    # A A b B    b lies in both boxes; two rows of it, and two of background
    layout = Layout(("<asset0>", "<asset1>"), (Box(0, 0, 0.75, 0.5), Box(0.5, 0, 1, 0.5)))
    pixels = "AAbB" * 2 + "...." * 2
    control = control_of(layout)
    cross, own = control.visible(CROSS), control.visible(SELF)
    assert cross is not None and own is not None
    rows = {"A": "101000111", "B": "101010011", "b": "101010111", ".": "101000001"}
    assert as_text(cross[1, 0]) == [rows[p] for p in pixels]
    sees = {"A": "11101110" "11111111", "B": "00110011" "11111111", "b": "1" * 16, ".": "1" * 16}  # fmt: skip
    assert as_text(own[0, 0]) == [sees[p] for p in pixels]


def test_self_attention_keeps_to_the_own_box_and_the_background() -> None:
    mask = control_of().visible(SELF)
    assert mask is not None
    hidden = {"A": "B", "B": "A", ".": ""}
    expected = ["".join(str(int(key not in hidden[query] or key == ".")) for key in CORNER_PIXELS) for query in CORNER_PIXELS]
    assert as_text(mask[0, 0]) == expected
    assert expected[0] == "1111" "1111" "1100" "1100"  # fmt: skip
    assert len(mask) == 1 or torch.equal(mask[0], mask[1]), "both halves alike"


def test_an_asset_that_stands_twice_shows_twice() -> None:
    twice = TokenizedPrompt(list(range(LENGTH)), {"<asset0>": (2, 6), "<asset1>": (4,)}, (), end_position=7, length=8)
    mask = BoundedAttention(twice, CORNERS, (4, 4), "cpu").visible(CROSS)
    assert mask is not None
    rows = as_text(mask[1, 0])
    assert (rows[0], rows[3], rows[15]) == ("111101111", "110101001", "110111011")


def own_text_control(guiding: bool = False) -> BoundedAttention:
    return control_of(guiding=guiding, own_text=True)


def test_with_a_text_of_its_own_an_asset_reads_nothing_of_the_others() -> None:
    control = own_text_control()
    assert control.texts == [list(range(LENGTH)), [0, 1, 2, 3, 6, 5, 6, 7, 8], [0, 1, 2, 3, 4, 5, 4, 7, 8]]
    #            start a photo of <asset> and <asset> end padding
    own, nothing = "101010111", "0" * LENGTH
    rows = {"A": nothing + own + nothing, "B": nothing + nothing + own, ".": "101000001" + nothing + nothing}
    mask = control.visible(CROSS)
    assert mask is not None and mask[0].all()
    assert as_text(mask[1, 0]) == [rows[pixel] for pixel in CORNER_PIXELS]
    assert [sorted(control.subject_keys(k)) for k in range(2)] == [[13, 15], [22, 24]]
    guided, shared = own_text_control(guiding=True), control_of(guiding=True)  # guidance reads the prompt alone
    assert guided.subject_keys(0) == shared.subject_keys(0) == [6]
    assert torch.equal(guided.visible(CROSS), shared.visible(CROSS))  # type: ignore[arg-type]
    alone = BoundedAttention(PROMPT, Layout(("<asset0>",), (Box(0, 0, 0.5, 0.5),)), (4, 4), "cpu", own_text=True)
    assert alone.texts == [PROMPT.input_ids] and alone.subject_keys(0) == [6]


def test_own_texts_are_read_as_they_would_be_one_by_one_and_change_nothing_without_a_condition() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((2, 1, 16, 8), generator=generator)
    texts, negative = (torch.randn((n, LENGTH, 8), generator=generator) for n in (3, 1))
    keys = torch.stack([negative.repeat(3, 1, 1).flatten(0, 1), texts.flatten(0, 1)])[:, None]  # (2, 1, 27, 8)
    control = own_text_control()
    mixed = sdpa(query, keys, keys, control.visible(CROSS), 0.3)
    plain = sdpa(query[:1], negative[None], negative[None], None, 0.3)
    torch.testing.assert_close(mixed[:1], plain)
    for pixel, text, words in ((0, 1, [0, 2, 4, 6, 7, 8]), (15, 2, [0, 2, 4, 6, 7, 8]), (2, 0, [0, 2, 8])):
        seen = texts[None, None, text, words]
        alone = sdpa(query[1:, :, pixel : pixel + 1], seen, seen, None, 0.3)
        torch.testing.assert_close(mixed[1:, :, pixel], alone[:, :, 0])


def every_control() -> Iterator[BoundedAttention]:
    full = Layout(("<asset0>", "<asset1>"), (Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)))  # leaves no background
    sliver = Layout(("<asset0>", "<asset1>"), (Box(0, 0, 0.1, 0.1), Box(0.5, 0.5, 1, 1)))  # no pixel on a small map
    for layout in (CORNERS, full, sliver):
        for guiding in (False, True):
            for unconditional in (False, True):
                for refined in (None, torch.zeros(2, 2, 4, 4, dtype=torch.bool), torch.ones(2, 2, 4, 4, dtype=torch.bool)):
                    control = control_of(layout, guiding=guiding, unconditional=unconditional, images=2)
                    if refined is not None:
                        control.refine(refined)
                    yield control


def test_every_query_sees_something() -> None:
    # a row without any True would be a softmax over nothing: NaN, and then a black picture
    for control in every_control():
        for halvings in (0, 1, 2):
            for kind, is_cross in (("cross", True), ("self", False)):
                mask = control.visible(Site(kind, "mid_block", is_cross, halvings))
                assert mask is not None and mask.any(-1).all()
                if is_cross:
                    assert mask[..., 0].all(), "the start token is everybody's"
                batch = control._pass.images * (2 if control._pass.unconditional else 1)
                assert len(mask) in (1, batch)


def test_masks_are_built_once_and_again_after_refining() -> None:
    control = control_of(images=2)
    before = {site: control.visible(site) for site in (CROSS, SELF)}
    assert all(control.visible(site) is mask for site, mask in before.items())
    assert control.visible(Site("another", "up_blocks.1", True, 0)) is before[CROSS], "one mask for all layers of a size"
    # picture 0: <asset0> in the top left pixel alone; picture 1: in the top row; <asset1> in the bottom row in both
    refined = torch.zeros(2, 2, 4, 4, dtype=torch.bool)
    refined[0, 0, 0, 0] = refined[1, 0, 0, :] = refined[:, 1, 3, :] = True
    control.refine(refined)
    cross, own = control.visible(CROSS), control.visible(SELF)
    assert cross is not None and own is not None
    assert cross is not before[CROSS] and control.visible(CROSS) is cross
    assert cross.shape == (4, 1, 16, LENGTH) and own.shape == (4, 1, 16, 16)
    assert cross[:2].all()
    token = PROMPT.asset_positions["<asset0>"][0]
    assert as_text(cross[2:, 0, :, token]) == ["1000" "0000" "0000" "0000", "1111" "0000" "0000" "0000"]  # fmt: skip
    for half in (own[:2], own[2:]):
        assert as_text(half[:, 0, 0]) == ["1111" "1111" "1111" "0000"] * 2  # fmt: skip
        assert as_text(half[:, 0, 3]) == ["1" * 16, "1111" "1111" "1111" "0000"]  # fmt: skip


def test_a_refined_mask_too_thin_for_a_small_map_keeps_its_box_there() -> None:
    # one pixel of 4x4 is a quarter of a pixel of 2x2, below the half that counts
    control = control_of()
    refined = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    refined[0, 0, 1, 1] = refined[0, 1, 2:, 2:] = True
    control.refine(refined)
    assert as_text(control.subject_masks((4, 4))[0]) == ["0000" "0100" "0000" "0000", "0000" "0000" "0011" "0011"]  # fmt: skip
    assert as_text(control.subject_masks((2, 2))[0]) == ["1000", "0001"]


def test_unbounded_control_masks_nothing(toybox_random_base: BaseModel) -> None:
    unet = toybox_random_base.unet
    control = BoundedAttention(PROMPT, CORNERS, (16, 16), "cpu", bounded=False)
    given = inputs(unet, batch=2)
    with torch.no_grad():
        plain = unet(**given).sample
        with bound_attention(unet, control):
            torch.testing.assert_close(unet(**given).sample, plain)


class Dense:
    """Textbook attention under a mask: the whole map of every head, nothing fused."""

    def __init__(self, mask: torch.Tensor):
        self.mask = mask

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: None = None) -> torch.Tensor:  # fmt: skip
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        width, out = query.shape[-1] // attn.heads, []
        for part in (slice(head * width, (head + 1) * width) for head in range(attn.heads)):
            scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
            out.append((scores - 1e9 * (~self.mask[:, 0])).softmax(-1) @ value[..., part])
        return attn.to_out[0](torch.cat(out, -1))


@pytest.mark.parametrize("guiding", [False, True])
def test_bounded_attention_equals_dense_attention_under_the_same_masks(any_base: BaseModel, guiding: bool) -> None:
    unet, size = any_base.unet, (16, 16)
    control = BoundedAttention(PROMPT, CORNERS, size, "cpu")
    forward_pass = ForwardPass(2, unconditional=False, guiding=True) if guiding else ForwardPass()
    control.begin(forward_pass)
    given, sites = inputs(unet, batch=2, size=size), attention_sites(unet)
    masks = {s.name: control.visible(s) for s in sites}
    with torch.no_grad():
        plain = unet(**given).sample
        with use_processors(unet, {s.name: Dense(masks[s.name]) for s in sites}):
            dense = unet(**given).sample
        with bound_attention(unet, control):
            fused = unet(**given).sample
            control.begin(replace(forward_pass, recorded=tuple(sites)))
            materialised = unet(**given).sample
            maps = control.end()
    # fp32 rounding of different orders of summation through the whole UNet; the masks' own effect is far above it
    torch.testing.assert_close(fused, dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(materialised, dense, rtol=1e-4, atol=1e-5)
    assert (dense - plain).abs().max() > 1e-2
    for site in sites:
        found, mask = maps[site.name], masks[site.name]
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
        if not guiding:  # of a pass that draws, the conditional half's mean over heads is kept
            assert found.ndim == 3 and len(found) == 1
            mask = mask[-1:, 0]
        assert (found * ~mask).max() == 0, "attention where nothing may be seen"
