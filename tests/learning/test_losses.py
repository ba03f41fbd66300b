"""The losses on 4x4 maps, with answers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mifo.learning.losses import (
    masked_diffusion_loss,
    match_loss,
    penalty_loss,
    relative_penalty_loss,
    reward_loss,
    separation_loss,
)
from mifo.sampling.guidance import alpha_schedule, box_guidance_loss

#: the left half of the picture
LEFT = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 4)
#: 0.4 in the left half, 0.2 in the right half
LEANING = torch.tensor([[0.4, 0.4, 0.2, 0.2]] * 4)


def test_diffusion_loss_counts_only_the_mask() -> None:
    # two channels of 4x4, off by 3 at every pixel: a squared error of 9 in the 8 pixels of the mask, 0 in the other 8
    prediction, target = torch.full((1, 2, 4, 4), 5.0), torch.full((1, 2, 4, 4), 2.0)
    mask = LEFT[None, None]
    assert masked_diffusion_loss(prediction, target, mask).item() == pytest.approx(9 * 8 / 16)
    assert masked_diffusion_loss(prediction, target, mask, by_area=True).item() == pytest.approx(9)


def test_diffusion_loss_by_area_weighs_small_and_large_instances_alike() -> None:
    # an error of 2 (squared: 4) inside a mask of 1 pixel, and inside one of 8
    error = torch.full((2, 3, 4, 4), 2.0)
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, 0, 1, 2] = 1
    masks[1, 0] = LEFT
    whole = masked_diffusion_loss(error, torch.zeros_like(error), masks)
    assert whole.item() == pytest.approx((4 * 1 / 16 + 4 * 8 / 16) / 2)
    assert masked_diffusion_loss(error, torch.zeros_like(error), masks, by_area=True).item() == pytest.approx(4)


def test_diffusion_loss_of_an_empty_mask_is_zero() -> None:
    error, mask = torch.ones(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
    for by_area in (False, True):
        assert masked_diffusion_loss(error, torch.zeros_like(error), mask, by_area).item() == 0


def test_diffusion_loss_is_computed_in_fp32() -> None:
    # 300^2 = 90000 does not fit into half precision
    half = torch.full((1, 1, 4, 4), 300.0, dtype=torch.float16)
    loss = masked_diffusion_loss(half, torch.zeros_like(half), LEFT[None, None].half())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(90000 / 2)


def test_reward_wants_half_of_the_mask() -> None:
    assert reward_loss(0.5 * LEFT, LEFT).item() == 0
    # inside |0.4 - 0.5| = 0.1, outside |0.2 - 0| = 0.2: the mean of 0.01 and 0.04
    assert reward_loss(LEANING, LEFT).item() == pytest.approx(0.025)
    assert reward_loss(LEFT, LEFT).item() == pytest.approx(0.25 / 2)  # too much attention inside costs too


def test_penalty_counts_only_what_lies_outside() -> None:
    assert penalty_loss(LEFT, LEFT).item() == 0
    assert penalty_loss(0.3 * LEFT, LEFT).item() == 0
    assert penalty_loss(LEANING, LEFT).item() == pytest.approx(0.2**2 / 2)  # half of the pixels at 0.2


def test_penalty_leaves_the_inside_free() -> None:
    attention = LEANING.clone().requires_grad_(True)
    penalty_loss(attention, LEFT).backward()
    assert attention.grad is not None
    # d/dA of A^2 / 16 is A / 8 outside: 0.2 / 8
    torch.testing.assert_close(attention.grad, 0.025 * (1 - LEFT))


def test_a_soft_mask_punishes_its_edge_in_part() -> None:
    # the edge is half inside: (0.4 * 0.5)^2 in 4 of 16 pixels
    edge = torch.tensor([[1.0, 0.5, 1.0, 1.0]] * 4)
    assert penalty_loss(torch.full((4, 4), 0.4), edge).item() == pytest.approx(0.04 / 4)


def test_the_relative_penalty_is_the_penalty_of_a_map_scaled_to_one() -> None:
    assert relative_penalty_loss(0.3 * LEFT, LEFT).item() == 0  # the inside is free
    # 0.4 -> 1 and 0.2 -> 0.5: the half of the pixels that is outside at 0.5
    assert relative_penalty_loss(LEANING, LEFT).item() == pytest.approx(0.5**2 / 2)
    assert relative_penalty_loss(torch.zeros(4, 4), LEFT).item() == 0


def test_the_relative_penalty_is_not_paid_by_looking_less_everywhere() -> None:
    strength = torch.tensor(0.01, requires_grad=True)
    relative_penalty_loss(strength * LEANING, LEFT).backward()
    assert strength.grad is not None and strength.grad.item() == pytest.approx(0, abs=1e-6)
    assert relative_penalty_loss(0.01 * LEANING, LEFT).item() == pytest.approx(relative_penalty_loss(LEANING, LEFT).item())


def test_match_compares_with_the_whole_mask_after_scaling_to_one() -> None:
    assert match_loss(0.07 * LEFT, LEFT).item() == pytest.approx(0, abs=1e-12)
    # 0.4 -> 1 and 0.2 -> 0.5: an error of 0.5 in half of the pixels
    assert match_loss(LEANING, LEFT).item() == pytest.approx(0.125)


def test_match_of_a_dark_map_is_finite() -> None:
    assert match_loss(torch.zeros(4, 4), LEFT).item() == pytest.approx(0.5)


def test_separation_is_zero_for_disjoint_maps_and_one_for_equal_ones() -> None:
    right = 1 - LEFT
    assert separation_loss([LEFT, right]).item() == pytest.approx(0, abs=1e-7)
    assert separation_loss([LEFT, LEFT]).item() == pytest.approx(1)
    assert separation_loss([LEFT, 0.01 * LEFT]).item() == pytest.approx(1)  # direction counts, not strength


def test_separation_is_the_mean_over_pairs() -> None:
    # LEFT and its complement: 0; LEFT and everything: 8 / (sqrt(8) sqrt(16)) = sqrt(1/2), and so for the complement
    everything = torch.ones(4, 4)
    loss = separation_loss([LEFT, 1 - LEFT, everything])
    assert loss.item() == pytest.approx((0 + 2 * math.sqrt(0.5)) / 3)


def test_a_single_map_needs_no_separation() -> None:
    assert separation_loss([LEFT]).item() == 0
    assert separation_loss([]).item() == 0


@pytest.mark.parametrize(
    ("step", "alpha"),
    [
        (0, 0.55),
        (1, 0.4),
        (2, 0.25),
        (3, 0.1),
        (9, 0.055),  # half of the half cosine: (0.1 + 0.01) / 2
        (15, 0.01),
        (40, 0.01),
    ],
)
def test_alpha_falls_in_a_line_and_then_by_a_half_cosine(step: int, alpha: float) -> None:
    assert alpha_schedule(step, guidance_steps=15) == pytest.approx(alpha)


def test_alpha_reaches_its_end_with_the_last_guided_step() -> None:
    falling = [alpha_schedule(step, guidance_steps=9) for step in range(10)]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == pytest.approx(0.55)
    assert falling[9] == pytest.approx(0.01)


def test_box_guidance_is_zero_when_all_attention_lies_inside() -> None:
    assert box_guidance_loss(torch.tensor([3.0, 1.0]), torch.zeros(2), alpha=0.4).item() == pytest.approx(0)


def test_box_guidance_of_known_masses() -> None:
    # first subject: 3 inside, 1 outside: (1 - 3/4)^2 + 0.4 log 2; second: 0 inside, 4 outside: 1 + 0.4 log 5
    foreground, background = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 4.0])
    expected = 0.0625 + 0.4 * math.log(2) + 1 + 0.4 * math.log(5)
    assert box_guidance_loss(foreground, background, alpha=0.4).item() == pytest.approx(expected)


def test_box_guidance_keeps_the_pictures_apart() -> None:
    foreground, background = torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    # picture 0: (1 - 1/2)^2 + 0; picture 1: 0 + 1; alpha 0 leaves the share alone
    torch.testing.assert_close(box_guidance_loss(foreground, background, alpha=0.0), torch.tensor([0.25, 1.0]))


def test_box_guidance_of_no_attention_at_all_is_finite() -> None:
    foreground, background = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    loss = box_guidance_loss(foreground, background, alpha=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(2)  # nothing inside: each subject pays the whole 1
    assert foreground.grad is not None and foreground.grad.isfinite().all()
