"""What a learning step sees: shifted copies, and the loss that keeps a token to its mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _tiny import load_base, write_instance

from mifo.data.instance import fit_instance, load_instance, with_background
from mifo.io.sheets import pixels_to_tensor
from mifo.learning.clean_plate import clean_plate
from mifo.learning.dataset import InstanceData, random_shifts, shift
from mifo.learning.objective import Objective
from mifo.learning.union_sampling import choose_assets
from mifo.model.prompt_embeds import ImageSize
from mifo.presets import learn_preset
from mifo.prompts import tokenize_prompt
from mifo.toybox.examples import EXAMPLES
from mifo.toybox.world import Scene, draw_scene


def test_a_shift_moves_pixels_and_fills_what_comes_in():
    pixels = torch.arange(9.0).view(1, 1, 3, 3)
    assert shift(pixels, 1, -1, fill=-1.0)[0, 0].tolist() == [[-1, 3, 4], [-1, 6, 7], [-1, -1, -1]]
    assert shift(pixels, -2, 0)[0, 0].tolist() == [[2, 4, 4], [5, 4, 4], [8, 4, 4]]  # the mean is 4
    assert torch.equal(shift(pixels, 0, 0), pixels)


def test_shifts_leave_their_asset_inside_and_reach_every_side():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:4, 5:7] = 1
    moved = [shift(mask, dx, dy, fill=0.0) for dx, dy in random_shifts(mask, 200, np.random.default_rng(0))]
    assert all(m.sum() == 4 for m in moved)
    seen = torch.cat(moved).amax(0)[0]
    assert seen.all()  # the mask has been everywhere


def test_a_step_takes_only_views_in_which_its_assets_are_whole(tmp_path: Path):
    fitted = fit_instance(load_instance(write_instance(tmp_path / "cups")), 64)
    base = load_base()
    data, still = InstanceData(fitted, base, placements=6), InstanceData(fitted, base)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    places: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
    for _ in range(60):
        batch = data.sample(rng, generator, 1, True, 0.0)
        for asset, mask in zip(batch.assets, batch.asset_masks, strict=True):
            assert mask.sum() == still.masks[False][asset].sum()
            places[asset].add(tuple(mask[0].nonzero()[0].tolist()))
    assert min(len(found) for found in places.values()) > 3
    fixed = {tuple(still.sample(rng, generator, 1, False, 0.0).asset_masks.amax(0)[0].nonzero()[0].tolist()) for _ in range(5)}
    assert len(fixed) == 1


def test_a_clean_plate_is_the_scene_as_if_nothing_had_stood_there():
    scene = EXAMPLES["twins"]
    drawing, empty = draw_scene(scene, 128), draw_scene(Scene((), scene.background, scene.seed), 128)
    pictures = (clean_plate(drawing.image, drawing.masks), empty.image, drawing.image)
    plate, truth, photo = (np.asarray(i).astype(float) for i in pictures)
    things = np.max([np.asarray(m) for m in drawing.masks], axis=0) > 0
    assert np.abs(photo - truth)[things].mean() > 60
    assert np.abs(plate - truth)[things].mean() < 20  # what is left are blades of grass, a cloud, the horizon's place
    far = np.asarray(drawing.image) == plate
    assert far[~things].mean() > 0.7  # beyond the things' soft edges the photo stays


def test_the_background_alone_is_learned_in_the_whole_picture_on_the_clean_plate(tmp_path: Path):
    instance = with_background(load_instance(write_instance(tmp_path / "cups", size=(96, 64))))  # padded above and below
    fitted, base = fit_instance(instance, 64), load_base()
    data = InstanceData(fitted, base)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    alone = [b for b in (data.sample(rng, generator, 1, True, 0.0) for _ in range(80)) if b.tokens == ("<background>",)]
    whole = [b for b in alone if b.asset_masks.sum() > data.masks[False][2].sum()]
    assert len(whole) > 15 and whole[0].prompt == "a photo of <background>"
    valid = torch.from_numpy(np.asarray(fitted.valid) > 0).float()
    assert torch.equal(whole[0].asset_masks[0, 0], valid)
    assert whole[0].union_mask[0, 0, 0].sum() == 0  # the padding
    assert data.plate is not None
    plate = pixels_to_tensor(clean_plate(fitted.image, fitted.masks[:2]))
    assert torch.equal(data.plate[True].mean, base.encode(plate.flip(-1))[0])  # and not the picture's own latents
    drawn = torch.cat([b.latents() for b in whole]).mean(0) - data.plate[False].mean[0]
    assert (drawn.abs() < 5 * data.plate[False].std[0] / len(whole) ** 0.5).all()  # five standard errors


def test_locality_counts_what_the_tokens_change_outside_the_masks_and_nothing_else():
    base = load_base()
    size = base.resolution // base.vae_factor
    noisy = torch.randn(1, base.unet.config["in_channels"], size, size, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([700])
    ids = tokenize_prompt(base.tokenizer, "a photo", []).input_ids
    with torch.no_grad():
        without = base.unet(noisy, timesteps, base.encode_prompt(torch.tensor([ids])).states).sample
    union = torch.zeros(1, 1, size, size)
    union[..., : size // 2] = 1
    config = replace(learn_preset("toybox"), masked_loss_by_area=True)
    objective = Objective(base, SimpleNamespace(size=ImageSize((64, 64), (64, 64))), config, None, None)  # type: ignore[arg-type]
    batch = SimpleNamespace(union_mask=union, size=None)

    def locality(prediction: torch.Tensor) -> float:
        return float(objective.locality(prediction, noisy, timesteps, batch))  # type: ignore[arg-type]

    assert locality(without) < 1e-9
    assert locality(without + 3 * union) < 1e-9  # inside, a token may do what it likes
    assert abs(locality(without + 2 * (1 - union)) - 4) < 1e-3  # outside, the squared change counts
    for highest, expected in ((701, 4.0), (700, 0.0)):  # of two draws at 700 one has changed
        objective.config = replace(config, locality_max_timestep=highest)
        two = torch.cat([without + 2 * (1 - union), without])
        found = objective.locality(two, noisy.repeat(2, 1, 1, 1), torch.tensor([700, 700]), batch)  # type: ignore[arg-type]
        assert abs(float(found) - expected / 2) < 1e-3


def test_a_share_of_the_pictures_has_one_asset_alone_and_the_others_are_sampled_as_ever() -> None:
    def sizes(alone_share: float, union_sampling: bool = True) -> list[int]:
        rng = np.random.default_rng(0)
        return [len(choose_assets((0, 2, 5), rng, union_sampling, alone_share)) for _ in range(3000)]

    def shares(found: list[int]) -> list[float]:
        return [found.count(size) / len(found) for size in (1, 2, 3)]

    assert shares(sizes(0.0)) == pytest.approx([1 / 3] * 3, abs=0.035)  # four standard errors
    assert shares(sizes(0.4)) == pytest.approx([0.6, 0.2, 0.2], abs=0.035)
    assert set(sizes(1.0)) == {1} and set(sizes(1.0, union_sampling=False)) == {3}
    both = [choose_assets((0, 2, 5), np.random.default_rng(k), True, 1.0, frozenset({5})) for k in range(20)]
    assert both == [(5,)] * 20
