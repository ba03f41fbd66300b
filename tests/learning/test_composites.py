"""Pictures made of the things' cut-outs on backgrounds that the base model drew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import learn_arguments, load_base, mifo, write_instance
from PIL import Image, ImageDraw

from mifo.bundle.store import load_bundle
from mifo.config import CompositeConfig
from mifo.data.instance import FittedInstance, fit_instance, load_instance, with_background
from mifo.learning.composites import (
    Composite,
    Composites,
    cut_anywhere,
    cut_out_things,
    paste,
    photo_without_things,
    without_things,
)
from mifo.learning.dataset import InstanceData
from mifo.presets import learn_preset

CONFIG = CompositeConfig(share=1.0, outside_weight=0.25, backgrounds="a photo in the snow|a photo at night",
                         num_backgrounds=2, sampling_steps=2)  # fmt: skip


@pytest.fixture
def fitted(tmp_path: Path) -> FittedInstance:
    return fit_instance(load_instance(write_instance(tmp_path / "desk", assets=3)), 128)


def test_what_is_pasted_is_known_to_the_pixel(fitted: FittedInstance) -> None:
    background = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    cutouts = [found[0] for found in cut_out_things(fitted).values()]
    for seed in range(20):
        picture, masks = paste(cutouts, background, (1.0, 1.0), 0.5, np.random.default_rng(seed))
        assert masks.shape == (3, 1, 128, 128) and int(masks.sum(0).max()) == 1  # no pixel is two things'
        changed = (np.asarray(picture) != np.asarray(background)).any(-1)
        assert not (changed & ~masks.any(0)[0].numpy()).any()  # squares have no soft rim: outside nothing changed
        for cutout, mask in zip(cutouts, masks[:, 0].numpy(), strict=True):
            inside = np.asarray(picture)[mask].astype(int)
            colour = np.asarray(cutout.image.resize((1, 1), Image.Resampling.BOX)).astype(int)[0, 0]
            assert abs(np.median(inside, axis=0) - colour).max() <= 12  # each mask is on its own thing


def test_a_later_thing_covers_an_earlier_one_and_large_ones_are_made_to_fit(fitted: FittedInstance) -> None:
    cutouts = [found[0] for found in cut_out_things(fitted).values()]
    picture, masks = paste(cutouts, Image.new("RGB", (128, 128)), (4.0, 4.0), 0.5, np.random.default_rng(0))
    assert picture.size == (128, 128) and int(masks.sum(0).max()) == 1 and masks[-1].any()


def drawn(composites: Composites, union_sampling: bool = True, about: frozenset[int] = frozenset()) -> list[Composite]:
    rng = np.random.default_rng(3)
    return [composites.draw(rng, union_sampling, 0.5, about=about) for _ in range(12)]


def test_composites_say_what_is_in_them_and_where(fitted: FittedInstance) -> None:
    base = load_base()
    composites = Composites(fitted, base, CONFIG, seed=3)
    made = drawn(composites)
    assert {len(each.assets) for each in made} == {1, 2, 3}
    assert {each.prompt.split(">")[-1].strip() for each in made} == {"in the snow", "at night"}
    for each in made:
        assert [fitted.tokens[i] in each.prompt for i in range(3)] == [i in each.assets for i in range(3)]
        assert each.masks.shape[0] == len(each.assets)
        assert {round(float(v), 3) for v in each.weights.unique()} == {0.25, 1.0}
        assert each.encode()[0].shape == (1, base.unet.config["in_channels"], 16, 16)
    again = drawn(Composites(fitted, base, CONFIG, seed=3))
    assert all(torch.equal(a.encode()[0], b.encode()[0]) and a.prompt == b.prompt for a, b in zip(made, again, strict=True))
    assert all(2 in each.assets for each in drawn(composites, about=frozenset({2})))
    assert all(len(each.assets) == 3 for each in drawn(composites, union_sampling=False))
    data = InstanceData(fitted, base, composites=composites, composite_share=1.0)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    assert {data.sample(rng, generator, 1, True, 0.5, 1.0).asset_masks.shape[0] for _ in range(12)} == {1}  # each alone


def test_a_step_takes_a_composite_as_it_is(fitted: FittedInstance) -> None:
    base = load_base()
    composites = Composites(fitted, base, CONFIG, seed=0)
    data = InstanceData(fitted, base, composites=composites, composite_share=1.0)
    batch = data.sample(np.random.default_rng(0), torch.Generator().manual_seed(0), 2, True, 0.5)
    rng = np.random.default_rng(0)
    rng.random()  # by which the step chooses a composite
    taken = composites.draw(rng, True, 0.5)
    assert batch.prompt == taken.prompt and batch.assets == taken.assets and torch.equal(batch.union_mask, taken.weights)
    assert batch.tokens == tuple(fitted.tokens[i] for i in taken.assets) and torch.equal(batch.asset_masks, taken.masks)
    (mean, std), latents = taken.encode(), batch.latents()
    assert latents.shape[0] == 2 and torch.allclose(latents, mean, atol=6 * float(std.max()))
    half = InstanceData(fitted, base, composites=composites, composite_share=0.5)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    of_the_photo = sum(half.sample(rng, generator, 1, True, 0.5).union_mask.min() == 0 for _ in range(200))
    assert 70 < of_the_photo < 130  # half of 200, four deviations


def test_things_of_all_photos_are_cut_out_and_the_background_is_none(tmp_path: Path) -> None:
    folder = write_instance(tmp_path / "desk")
    image, mask = Image.new("RGB", (60, 60), "white"), Image.new("L", (60, 60))
    ImageDraw.Draw(image).ellipse((10, 10, 50, 50), fill="red")
    ImageDraw.Draw(mask).ellipse((10, 10, 50, 50), fill=255)
    image.save(folder / "img1.png")
    mask.save(folder / "img1_mask1.png")
    found = cut_out_things(fit_instance(with_background(load_instance(folder)), 128))
    assert {asset: len(cutouts) for asset, cutouts in found.items()} == {0: 1, 1: 2}


def test_the_photos_own_background_has_a_part_of_the_composites_and_is_named_there(tmp_path: Path) -> None:
    """`<background>` is learned beside the things, not in their place: their steps stay composites."""
    instance = with_background(load_instance(write_instance(tmp_path / "desk", assets=3, size=(96, 64))))  # padded at 128
    fitted, base = fit_instance(instance, 128), load_base()
    composites = Composites(fitted, base, CONFIG, seed=0)
    rng = np.random.default_rng(0)
    made = [composites.draw(rng, True, 0.5) for _ in range(64)]
    on_it = [each for each in made if 3 in each.assets]
    assert 1 < len(on_it) < 19  # 15 %, of which three deviations are 9
    assert all(1 <= len(each.assets) <= 4 and (each.assets[-1] == 3) == (3 in each.assets) for each in made)
    for each in made:
        assert ("<background>" in each.prompt) == (3 in each.assets) == (not any(p in each.prompt for p in ("snow", "night")))
    for each in on_it:
        assert torch.equal(each.masks.sum(0), torch.ones(1, 128, 128))  # each pixel a thing's or the background's
        assert float(each.weights.min()) == 1.0  # what is learned there counts as the things do
    data = InstanceData(fitted, base, composites=composites, composite_share=1.0)
    generator = torch.Generator().manual_seed(0)
    steps = [data.sample(rng, generator, 1, True, 0.0) for _ in range(80)]
    alone = [each for each in steps if each.tokens == ("<background>",)]
    assert 8 < len(alone) < 32  # a quarter, of which three deviations are 12
    assert data.plate is not None and torch.equal(alone[0].asset_masks, data.plate[False].masks[[3]])
    assert all(each.prompt == "a photo of <background>" for each in alone)


def test_the_background_under_composites_is_the_photos_without_its_things_and_its_padding(tmp_path: Path) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    photo, mask = Image.new("RGB", (128, 64), (20, 160, 40)), Image.new("L", (128, 64))
    photo.paste((200, 30, 30), (16, 16, 48, 48))
    mask.paste(255, (16, 16, 48, 48))
    photo.save(folder / "img.png")
    mask.save(folder / "mask0.png")
    plate = cut_anywhere(photo_without_things(fit_instance(with_background(load_instance(folder)), 128)), (128, 128),
                         np.random.default_rng(0))  # fmt: skip
    drawn = np.asarray(plate.image).astype(int)
    assert drawn.shape == (128, 128, 3) and abs(drawn - (20, 160, 40)).max() < 12  # nothing red, and no bar above or below


def test_things_on_a_drawn_background_are_painted_over() -> None:
    picture = Image.new("RGB", (128, 128), (120, 180, 220))
    ImageDraw.Draw(picture).ellipse((40, 50, 80, 90), fill=(200, 30, 30), outline=(0, 0, 0), width=3)
    cleaned = np.asarray(without_things(picture)).astype(int)
    assert abs(cleaned - (120, 180, 220)).max() < 40  # nothing red or black is left
    plain = Image.new("RGB", (128, 128), (120, 180, 220))
    assert np.array_equal(np.asarray(without_things(plain)), np.asarray(plain))


def test_the_embedded_models_preset_has_them_and_the_published_ones_do_not() -> None:
    assert learn_preset("toybox").composites.share == 1.0
    for family, recipe in (("stable-diffusion", "mifo"), ("sdxl", "mifo"), ("toybox", "break-a-scene")):
        assert learn_preset(family, recipe).composites.share == 0.0


def test_the_command_turns_them_on(tmp_path: Path) -> None:
    folder = write_instance(tmp_path / "desk")
    mifo(*learn_arguments(folder, tmp_path / "out", "--composites"))
    assert load_bundle(tmp_path / "out" / "desk").config.composites.share == 1.0
    mifo(*learn_arguments(folder, tmp_path / "out"))
    assert load_bundle(tmp_path / "out" / "desk").config.composites.share == 0.0
