"""Self-attention in groups of pixels: the same as under a mask, and no mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import CORNERS, PROMPT, SELF, as_text, control_of, inputs

from mifo.attention.bounded import BoundedAttention, ForwardPass, bound_attention
from mifo.attention.groups import Groups, attention_in_groups, group_pixels
from mifo.attention.sites import Processor, sdpa, use_processors
from mifo.boxes import Box, Layout
from mifo.model.base import BaseModel

OVERLAPPING = Layout(("<asset0>", "<asset1>"), (Box(0, 0, 0.75, 0.5), Box(0.5, 0, 1, 0.5)))


def seen(groups: Groups) -> list[str]:
    """A string of 0 and 1 for each pixel: the keys that it sees."""
    rows = torch.zeros((groups.pixels, groups.pixels), dtype=torch.int)
    for group in groups.groups:
        keys = torch.arange(groups.pixels) if group.keys is None else group.keys
        rows[group.queries[:, None], keys[None]] += 1
    return as_text(rows)


def test_groups_of_a_layout_by_hand() -> None:
    # 1 x 6 pixels: background, first, both, second, second, background
    subjects = np.array([[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0]], dtype=bool)
    groups = group_pixels(subjects)
    assert seen(groups) == ["111111", "111001", "111111", "101111", "101111", "111111"]
    stacked = torch.cat([g.queries for g in groups.groups])
    assert stacked[groups.order].tolist() == list(range(6)), "every pixel once, and back at its place"


@pytest.mark.parametrize("layout", [CORNERS, OVERLAPPING])
@pytest.mark.parametrize("refined", [0, 1, 2])
@pytest.mark.parametrize("guiding", [False, True])
def test_groups_see_what_the_mask_shows(layout: Layout, refined: int, guiding: bool) -> None:
    control = control_of(layout, guiding=guiding, images=2)
    if refined:
        masks = torch.zeros((2, 2, 4, 4), dtype=torch.bool)
        masks[0, 0, 1, 1:3] = masks[0, 1, 1:, 2] = masks[1, 0, 0] = masks[1, 1, 2:] = True
        control.refine(masks[:refined])
    mask, groups = control.visible(SELF), control.groups(SELF, 0)
    assert mask is not None and groups is not None
    assert len(groups) == max(1, refined)
    for k, of_picture in enumerate(groups):
        assert seen(of_picture) == as_text(mask[k, 0])


masks = st.integers(1, 5).flatmap(lambda count: st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=2,
                                                         max_size=20))  # fmt: skip


@given(masks)
@settings(deadline=None, max_examples=60)
def test_groups_equal_the_mask_with_gradients(columns: list[list[bool]]) -> None:
    subjects = torch.tensor(columns).T  # (subjects, pixels)
    background = ~subjects.any(0)
    visible = background[:, None] | background[None]
    for subject in subjects:
        visible = visible | subject[:, None] & subject[None]
    generator = torch.Generator().manual_seed(0)
    results = []
    tensors = [torch.randn((2, 3, len(columns), 4), generator=generator) for _ in range(4)]
    for in_groups in (False, True):
        query, key, value = (t.clone().requires_grad_() for t in tensors[:3])
        if in_groups:
            out = attention_in_groups(query, key, value, [group_pixels(subjects.numpy())], 0.5)
        else:
            out = sdpa(query, key, value, visible, 0.5)
        results.append((out, *torch.autograd.grad((out * tensors[3]).sum(), (query, key, value))))
    for grouped, masked in zip(*reversed(results), strict=True):
        torch.testing.assert_close(grouped, masked, rtol=1e-4, atol=1e-5)  # fp32, another order of summation


def test_groups_are_used_where_they_take_less_memory_than_a_mask() -> None:
    # 100 pixels, two subjects of 20 and 30: their pixels see 70 and 80 keys
    subjects = np.zeros((2, 100), dtype=bool)
    subjects[0, :20] = subjects[1, 20:50] = True
    groups = group_pixels(subjects)
    saves = groups.saves_memory
    # 100 x 100 numbers of a mask against keys and values, queries and outputs
    assert saves(19, with_gradient=True) and not saves(20, with_gradient=True)  # 2 (150 + 100) x 20 = 10,000
    assert saves(27, with_gradient=False) and not saves(28, with_gradient=False)  # 2 (80 + 100) x 28 = 10,080


def test_a_mask_is_needed_where_halves_differ() -> None:
    assert control_of(images=2).groups(SELF, 0) is not None
    assert control_of(images=2, bounded=False).groups(SELF, 0) is None
    assert control_of(images=2, apart=True).groups(SELF, 0) is None


def test_refining_makes_new_groups() -> None:
    control = control_of()
    before = control.groups(SELF, 0)
    assert before is not None and control.groups(SELF, 0) is before
    refined = torch.zeros((1, 2, 4, 4), dtype=torch.bool)
    refined[0, 0, 0, 0] = refined[0, 1, 3, 3] = True
    control.refine(refined)
    after = control.groups(SELF, 0)
    assert after is not None and seen(after[0]) != seen(before[0])


def run(unet: UNet2DConditionModel, refined: torch.Tensor | None, grouped: bool,
        monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Output of both halves of two pictures and its gradient in the latents, bounded, with groups everywhere or nowhere."""
    monkeypatch.setattr(Groups, "saves_memory", lambda *_, **__: grouped)
    control = BoundedAttention(PROMPT, OVERLAPPING, (16, 16), "cpu", sampling=ForwardPass(2))
    if refined is not None:
        control.refine(refined)
    feed = inputs(unet, batch=4, size=(16, 16))
    feed["sample"].requires_grad_()
    with bound_attention(unet, control):
        out = unet(**feed).sample
    return out.detach(), torch.autograd.grad(out.square().sum(), feed["sample"])[0]


@pytest.mark.parametrize("own_masks", [False, True])
def test_a_model_in_groups_equals_the_model_under_masks(any_base: BaseModel, own_masks: bool,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    refined = torch.zeros((2, 2, 16, 16), dtype=torch.bool)  # pictures, subjects, h, w
    refined[0, 0, :8, :4] = refined[0, 1, 2:9, 10:] = refined[1, 0, :3] = refined[1, 1, 6:, 3:7] = True
    under_masks, in_groups = (run(any_base.unet, refined if own_masks else None, grouped, monkeypatch)
                              for grouped in (False, True))  # fmt: skip
    for grouped, masked in zip(in_groups, under_masks, strict=True):
        assert (grouped - masked).norm() < 1e-4 * masked.norm()  # fp32 rounding through the whole UNet


def test_no_mask_of_the_largest_map_is_made_at_stable_diffusions_size(tiny_sd_base: BaseModel) -> None:
    # such a mask is 16 million numbers at each layer, which a 12 GB GPU feels; 64 x 64 latents are a 512-pixel picture
    unet, pixels, sizes = tiny_sd_base.unet, 64 * 64, []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None,
               scale: float) -> torch.Tensor:  # fmt: skip
        sizes.append((query.shape[2], key.shape[2], visible is not None))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)

    control = BoundedAttention(PROMPT, CORNERS, (64, 64), "cpu")
    own = {name: Processor(kernel) for name in unet.attn_processors}
    with torch.no_grad(), use_processors(unet, own), bound_attention(unet, control):
        unet(**inputs(unet, batch=2, size=(64, 64)))
    large = [masked for queries, keys, masked in sizes if min(queries, keys) >= 1024]  # the texts have few keys
    assert large and not any(large)
    assert all(mask.shape[-1] < pixels for mask in control._masks.values())
