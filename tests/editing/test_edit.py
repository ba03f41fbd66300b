"""Editing: what lies outside the mask stays, what lies inside blends in, and the order of candidates means something."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mifo.boxes import Box
from mifo.config import EditConfig, GuidanceConfig
from mifo.data.asset_crops import cut_out
from mifo.editing.blending import Blending, clone, feather, paste, paste_around, tune_to_source
from mifo.editing.edit import EditRequest, edit
from mifo.editing.frame import latent_mask, make_frame, shrinking_masks, thickness, within_length
from mifo.editing.hooks import EditHooks
from mifo.editing.ranking import asset_similarity, best_first, prompt_similarity
from mifo.errors import InputError
from mifo.model.prompt_embeds import PromptEmbeds

if TYPE_CHECKING:
    from mifo.model.base import BaseModel


def block(size: tuple[int, int], left: int, top: int, right: int, bottom: int) -> np.ndarray:
    """A bool mask (height, width) with one rectangle; `size` is (width, height)."""
    mask = np.zeros((size[1], size[0]), bool)
    mask[top:bottom, left:right] = True
    return mask


def noise_picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# --- the frame ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "mask", "side"),
    [
        ((1000, 700), (400, 300, 500, 360), 200),  # twice the mask
        ((1000, 700), (980, 690, 1000, 700), 64),  # in a corner; at least the model's resolution
        ((40, 30), (5, 5, 15, 15), 40),  # a picture below the model's resolution
        ((300, 100), (0, 0, 300, 100), 300),  # all of a wide picture
    ],
)
def test_the_crop_holds_the_mask_and_stays_in_the_picture(size, mask, side):
    frame = make_frame(block(size, *mask), 64)
    left, top, right, bottom = frame.crop
    assert frame.side == side
    assert 0 <= left <= mask[0] and mask[2] <= right <= size[0] and 0 <= top <= mask[1] and mask[3] <= bottom <= size[1]
    canvas = frame.to_canvas(noise_picture(*size))
    assert canvas.shape == (64, 64, 3) and frame.from_canvas(canvas).shape == (bottom - top, right - left, 3)
    coverage = frame.coverage(block(size, *mask), 64)
    area = (mask[2] - mask[0]) * (mask[3] - mask[1]) * frame.scale**2
    assert coverage.sum() == pytest.approx(area, rel=0.05)


def test_at_the_models_own_scale_the_canvas_is_the_picture():
    picture = noise_picture(200, 100)
    frame = make_frame(block(picture.size, 90, 40, 110, 60), 64)
    left, top, right, bottom = frame.crop
    there = np.asarray(picture)[top:bottom, left:right]
    assert frame.scale == 1 and np.array_equal(frame.to_canvas(picture), there)
    assert np.array_equal(frame.from_canvas(frame.to_canvas(picture)), there)


def test_a_box_of_the_picture_finds_its_place_on_the_canvas():
    mask = block((400, 200), 150, 50, 250, 150)  # crop: 100..300, all of the height; 200 pixels -> 64
    frame = make_frame(mask, 64)
    assert frame.crop == (100, 0, 300, 200)
    box = frame.box_on_canvas(Box(150 / 400, 50 / 200, 250 / 400, 150 / 200), 400, 200)
    assert box is not None and box.as_tuple() == pytest.approx((0.25, 0.25, 0.75, 0.75))
    assert frame.box_on_canvas(Box(0.0, 0.0, 0.2, 1.0), 400, 200) is None


def test_a_mask_below_a_latent_pixel_says_what_would_work():
    mask = block((400, 400), 200, 200, 203, 203)
    with pytest.raises(InputError, match=r"one latent pixel: it is 3x3 pixels.*steps of 4 pixels; make it at least 8x8"):
        latent_mask(make_frame(mask, 64), mask, 16)
    enough = block((400, 400), 201, 201, 209, 209)
    assert latent_mask(make_frame(enough, 64), enough, 16).any()


def test_a_dilated_mask_shrinks_to_the_true_one():
    thin = block((16, 16), 7, 0, 9, 16)
    assert thickness(thin) == 2 and thickness(block((16, 16), 2, 3, 7, 14)) == 5
    masks = shrinking_masks(thin, 3, 20)
    widths = [int(m[8].sum()) for m in masks]
    assert len(masks) == 20 and widths[0] == 8 and widths == sorted(widths, reverse=True)
    assert all(np.array_equal(m, thin) for m in masks[15:])
    assert all(np.array_equal(m, thin) for m in shrinking_masks(thin, 0, 4))


def test_words_keep_beside_a_thin_mask_and_off_its_ends():
    bar = block((16, 16), 7, 2, 9, 14)
    wide = shrinking_masks(bar, 3, 4)[0]
    assert np.array_equal(within_length(wide, bar), block((16, 16), 4, 2, 12, 14))
    assert np.array_equal(within_length(wide.T, bar.T), block((16, 16), 2, 4, 14, 12))
    square = block((16, 16), 5, 5, 9, 9)
    assert np.array_equal(within_length(shrinking_masks(square, 2, 4)[0], square), block((16, 16), 3, 3, 11, 11))


# --- outside the mask ---------------------------------------------------------------------------


def test_pasting_keeps_every_byte_outside_and_hides_the_seam():
    source = np.asarray(noise_picture(48, 40))
    mask = block((48, 40), 10, 8, 34, 30)
    drawn = source.astype(np.float32) + 60
    flat = np.full_like(source, 100)
    result = paste(source, drawn, mask, 4)
    assert np.array_equal(result[~mask], source[~mask])
    assert np.array_equal(result[16:22, 20:24], drawn[16:22, 20:24].clip(0, 255).astype(np.uint8))  # untouched deep inside
    soft = paste(flat, flat.astype(np.float32) + 60, mask, 4).astype(int)
    assert np.abs(np.diff(soft[..., 0], axis=1)).max() <= 20  # a hard edge would be 60
    thin = block((48, 40), 20, 0, 24, 40)
    assert feather(thin, 50).max() == 1 and feather(thin, 50)[5, 21] > 0.6
    assert feather(np.ones((4, 4), bool), 2).min() == 1


@pytest.mark.parametrize("place", [(10, 8, 34, 30), (0, 0, 20, 17), (31, 20, 48, 40), (5, 0, 24, 40)])
def test_cloning_takes_the_edges_colours(place):
    """A patch that differs by a constant disappears; a picture cloned onto itself stays where it is, also at the border."""
    source = np.asarray(noise_picture(48, 40)) // 2 + 40
    mask = block((48, 40), *place)
    assert np.abs(clone(source, source.astype(np.float32), mask).astype(int) - source).max() <= 2
    shifted = clone(source, source.astype(np.float32) + 50, mask)
    assert np.array_equal(shifted[~mask], source[~mask])
    inner = block((48, 40), place[0] + 3, place[1] + 3, place[2] - 3, place[3] - 3)
    assert np.abs(shifted.astype(int) - source)[inner].mean() < 12


@pytest.mark.parametrize("place", [(10, 8, 34, 30), (0, 0, 20, 17), (31, 20, 48, 40), (5, 0, 24, 40), (0, 9, 48, 20)])
def test_cloning_draws_up_to_the_pictures_border(place):
    """Within the picture the mask's outermost ring keeps the colours around it; at the picture's border nothing is around it."""
    source = np.full((40, 48, 3), 120, np.uint8)
    drawn = np.random.default_rng(0).integers(0, 256, source.shape).astype(np.float32)
    changed = (clone(source, drawn, block((48, 40), *place)) != source).any(-1)
    left, top, right, bottom = place
    expected = (left + (left > 0), top + (top > 0), right - (right < 48), bottom - (bottom < 40))
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == expected


def test_cloning_without_an_outside_takes_what_was_drawn():
    source = np.asarray(noise_picture(24, 24))
    assert np.array_equal(clone(source, source.astype(np.float32)[::-1], np.ones((24, 24), bool)), source[::-1])


def test_around_the_mask_a_photo_moves_by_the_change_alone():
    source = np.asarray(noise_picture(48, 40)) // 2
    mask = block((48, 40), 10, 8, 34, 30)
    change = np.full(source.shape, 3, np.float32)
    result = paste_around(source, np.zeros(source.shape, np.float32), change, mask, 4)
    assert np.array_equal(result[~mask], source[~mask] + 3) and result[18, 20].max() == 0


@pytest.mark.parametrize("tuned", ["weights", "latents"])
def test_tuning_brings_the_outside_back_and_leaves_the_vae_alone(toybox_random_base: BaseModel, tuned: str):
    vae = toybox_random_base.vae
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    latents = torch.randn((1, 12, 16, 16), generator=torch.Generator().manual_seed(0))
    source = torch.from_numpy(np.asarray(noise_picture(128, 128)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    mask = torch.zeros((1, 1, 128, 128))
    mask[..., 20:40, 20:40] = 1
    plain = toybox_random_base.decode(latents)
    result = tune_to_source(vae, latents, source, mask, 12, tuned)

    def outside(pixels: torch.Tensor) -> float:
        return float((((pixels * 2 - 1) - source) * (1 - mask)).pow(2).mean())

    assert result.shape == (1, 3, 128, 128) and outside(result) < 0.97 * outside(plain)
    assert torch.equal(tune_to_source(vae, latents, source, mask, 0, tuned), plain)
    assert all(torch.equal(before[k], v) and not v.requires_grad for k, v in vae.state_dict().items())


# --- ranking ------------------------------------------------------------------------------------


def drawn_thing(color: str, stripes: str | None = None) -> tuple[Image.Image, Image.Image]:
    """A square on grey, and its mask."""
    image = Image.new("RGB", (64, 64), (150, 150, 150))
    pen = ImageDraw.Draw(image)
    pen.rectangle((16, 16, 47, 47), fill=color)
    for x in range(18, 46, 8):
        if stripes:
            pen.rectangle((x, 16, x + 3, 47), fill=stripes)
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 47), fill=255)
    return image, mask


def test_the_assets_own_look_ranks_first():
    looks = {"red striped": ("red", "white"), "blue striped": ("blue", "white"), "red": ("red", None), "green": ("green", None)}
    crops = {name: cut_out(*drawn_thing(*look), 32) for name, look in looks.items()}
    mask = block((64, 64), 10, 10, 54, 54)
    for name, crop in crops.items():
        scores = {other: asset_similarity(np.asarray(drawn_thing(*look)[0]), mask, crop) for other, look in looks.items()}
        assert max(scores, key=lambda k: scores[k]) == name, (name, scores)
        assert all(0 <= score <= 1.01 for score in scores.values())
        nothing = np.asarray(Image.new("RGB", (64, 64), (150, 150, 150)))
        assert asset_similarity(nothing, mask, crop) < 0.3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prompt_that_explains_the_candidate_scores_high(kind: str):
    """A stand-in UNet that answers rightly for one candidate's prompt, and by half for no prompt."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=kind)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    known = latents[:1]

    class Output:
        def __init__(self, sample: torch.Tensor):
            self.sample = sample

    class Oracle:
        conv_in = SimpleNamespace(weight=torch.zeros(1))

        def __call__(self, noisy: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, **conditions: object) -> Output:
            clean = known * float(context[0, 0, 0])
            signal = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
            noise = (noisy - signal.sqrt() * clean) / (1 - signal).sqrt()
            velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean
            return Output({"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind])

    mask = torch.ones((8, 8), dtype=torch.bool)
    scores = prompt_similarity(Oracle(), scheduler, latents, mask, *(PromptEmbeds(torch.full((1, 1, 1), v)) for v in (1.0, 0.5)))
    assert scores[0] == pytest.approx(1, abs=1e-3) and scores[1] < 0.2


def test_best_first_weighs_the_measures_alike():
    scores = [{"asset": 0.2, "prompt": 0.001}, {"asset": 0.9, "prompt": 0.003}, {"asset": 0.8, "prompt": 0.000}]
    assert best_first(scores) == [1, 2, 0] or best_first(scores)[0] == 1
    apart = [{"asset": 0.9, "prompt": 0.000}, {"asset": 0.8, "prompt": 0.003}, {"asset": 0.3, "prompt": 0.001}]
    assert best_first(apart) == [1, 0, 2]  # a nearly equal look does not outweigh a prompt that fits, small as its numbers are
    assert best_first([{"prompt": 0.1}, {"prompt": 0.3}, {"prompt": 0.2}]) == [1, 2, 0]
    assert best_first([{"prompt": 0.1}]) == [0]


# --- the job ------------------------------------------------------------------------------------

QUICK = EditConfig(steps=4, guidance_scale=3.0, guidance=GuidanceConfig(enabled=False))


def test_the_latents_outside_follow_the_source_down_to_no_noise(toybox_random_base: BaseModel):
    from mifo.model.samplers import make_scheduler

    scheduler = make_scheduler("ddim", toybox_random_base.scheduler)
    source, noise = torch.randn((2, 1, 8, 16, 16), generator=torch.Generator().manual_seed(0))
    wide, true = block((16, 16), 3, 3, 12, 12), block((16, 16), 5, 5, 9, 9)
    masks = [wide, wide, true, true]  # three steps are left
    scheduler.set_timesteps(QUICK.steps)
    blending = Blending(scheduler, scheduler.timesteps[1:], source, noise, [torch.from_numpy(m) for m in masks])
    hooks = EditHooks(blending)
    start = hooks.start(from_image=False)
    first = scheduler.add_noise(source, noise, scheduler.timesteps[1:2])
    inside = torch.from_numpy(wide)
    assert torch.equal(start[..., inside], noise[..., inside]) and torch.equal(start[..., ~inside], first[..., ~inside])
    assert torch.equal(hooks.start(from_image=True), first)
    moved = torch.full_like(source, 7.0)
    for step in (0, 1):
        mask = torch.from_numpy(masks[step + 1])
        after = hooks.after_step(step, scheduler.timesteps[1 + step], moved)
        level = scheduler.add_noise(source, noise, scheduler.timesteps[2 + step : 3 + step])
        assert (after[..., mask] == 7).all() and torch.equal(after[..., ~mask], level[..., ~mask])
    last = hooks.after_step(2, scheduler.timesteps[3], moved)
    assert torch.equal(last[..., ~torch.from_numpy(true)], source[..., ~torch.from_numpy(true)])


def test_each_candidate_depends_on_its_own_seed(any_base: BaseModel):
    picture = noise_picture(300, 200)
    mask = block(picture.size, 100, 50, 180, 150)
    both = edit(any_base, EditRequest(picture, mask, "a photo of a red car"), QUICK, seed=3, count=2)
    assert [c.seed for c in sorted(both.candidates, key=lambda c: c.seed)] == [3, 4]
    assert any("enlarged" in note for note in both.notes) == (any_base.resolution < 150)
    alone = edit(any_base, EditRequest(picture, mask, "a photo of a red car"), QUICK, seed=4, count=1)
    index = next(k for k, c in enumerate(both.candidates) if c.seed == 4)
    together, single = np.asarray(both.edited_image(index)).astype(int), np.asarray(alone.edited_image(0)).astype(int)
    assert np.abs(together - single).max() <= 1
    assert both.candidates[index].scores["prompt"] == pytest.approx(alone.candidates[0].scores["prompt"], abs=1e-3)
    before = np.asarray(picture)
    assert single.shape == before.shape and np.array_equal(single[~mask], before[~mask])
    assert (single[mask] != before[mask]).mean() > 0.5


@pytest.mark.parametrize("background", ["poisson", "optimization", "none"])
def test_other_backgrounds_touch_the_crop_alone(toybox_random_base: BaseModel, background: str):
    picture = noise_picture(200, 150)
    mask = block(picture.size, 80, 60, 110, 100)
    config = replace(QUICK, background=background, reconstruction_steps=2)
    result = edit(toybox_random_base, EditRequest(picture, mask, "a photo of a red car"), config)
    after, before = np.asarray(result.edited_image(0)), np.asarray(picture)
    left, top, right, bottom = result.frame.crop
    untouched = np.ones(mask.shape, bool)
    untouched[top:bottom, left:right] = False
    untouched = ~mask if background == "poisson" else untouched
    assert np.array_equal(after[untouched], before[untouched]) and (after[mask] != before[mask]).any()


def test_wrong_choices_are_refused(toybox_random_base: BaseModel):
    picture, mask = noise_picture(80, 80), block((80, 80), 20, 20, 60, 60)
    for changes, message in (({"background": "magic"}, "background"), ({"start": "half"}, "start"),
                             ({"blending_start_percentage": 1.0}, "less than 1")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            edit(toybox_random_base, EditRequest(picture, mask, "a photo of a car"), replace(QUICK, **changes))
    with pytest.raises(InputError, match="<asset0>, but there are no assets"):
        edit(toybox_random_base, EditRequest(picture, mask, "a photo of <asset0>"), QUICK)


def test_the_backgrounds_word_is_hidden_from_the_assets():
    from mifo.attention.bounded import BoundedAttention
    from mifo.attention.sites import Site
    from mifo.boxes import Layout
    from mifo.prompts import TokenizedPrompt

    prompt = TokenizedPrompt(list(range(10)), {"<asset0>": (3,), "<background>": (6,)}, (), 8, 9)
    control = BoundedAttention(prompt, Layout(("<asset0>",), (Box(0, 0, 0.5, 1),)), (4, 4), "cpu")
    visible = control.visible(Site("site", "mid_block", True, 0))
    assert visible is not None
    unconditional, conditional = visible[:, 0].unflatten(1, (4, 4))  # (4, 4, tokens)
    assert unconditional.all()
    assert conditional[:, :2, 3].all() and not conditional[:, 2:, 3].any()
    assert conditional[:, 2:, 6].all() and not conditional[:, :2, 6].any()


def test_apart_from_the_background_a_subject_goes_on_with_nothing():
    from mifo.attention.bounded import BoundedAttention
    from mifo.attention.sites import Site
    from mifo.boxes import Layout
    from mifo.prompts import TokenizedPrompt

    prompt = TokenizedPrompt(list(range(10)), {"<asset0>": (3,)}, (), 8, 9)
    control = BoundedAttention(prompt, Layout(("<asset0>",), (Box(0, 0, 0.5, 1),)), (4, 4), "cpu")
    own = torch.from_numpy(block((4, 4), 0, 0, 2, 4)).flatten()
    site = Site("site", "mid_block", False, 0)
    visible = control.visible(site)
    assert visible is not None and visible[0, 0][own].all()  # a subject sees its box and the background
    control = BoundedAttention(prompt, Layout(("<asset0>",), (Box(0, 0, 0.5, 1),)), (4, 4), "cpu", apart=True)
    control.refine(own.view(1, 1, 4, 4))
    visible = control.visible(site)
    assert visible is not None
    unconditional, conditional = visible[:, 0]
    assert unconditional.all() and conditional[~own].all()
    assert conditional[own][:, own].all() and not conditional[own][:, ~own].any()


def test_a_thin_mask_is_filled_with_what_the_prompt_says():
    """The toybox model itself, whose balloons are shorter than this bar; with free words a quarter of it is green."""
    from mifo.model.load_base import load_base_model
    from mifo.presets import edit_preset
    from mifo.toybox.draw import BACKGROUNDS, COLORS
    from mifo.toybox.world import Scene, draw_scene

    base = load_base_model("toybox")
    picture = draw_scene(Scene((), BACKGROUNDS[507 % len(BACKGROUNDS)], 507), 128).image
    bar = block(picture.size, 16, 72, 112, 88)
    config = replace(edit_preset("toybox"), mask_dilation=4)
    drawn = np.asarray(edit(base, EditRequest(picture, bar, "a photo of a green balloon"), config, 507).edited_image(0))[bar]
    distances = {name: ((drawn - np.array(color, float)) ** 2).sum(1) for name, color in COLORS.items()}
    green = (distances["green"] == np.min(list(distances.values()), axis=0)).mean()
    assert green > 0.6, green
