"""Further photos of the same things: img1.png with img1_mask0.png, ..., beside img.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import learn_arguments, load_base, mifo, write_instance
from PIL import Image, ImageDraw

from mifo.bundle.instance_copy import kept_instance
from mifo.bundle.target import photo_digest
from mifo.data.instance import fit_instance, load_instance, with_background
from mifo.data.mask_check import check_masks
from mifo.errors import InputError
from mifo.learning.dataset import InstanceData
from mifo.learning.supervision import sizes_by_name


def add_photo(folder: Path, number: int, boxes: dict[int, tuple[int, int, int, int]], size: tuple[int, int] = (80, 80)) -> None:
    """A white photo with a square at each asset's box."""
    image = Image.new("RGB", size, "white")
    for asset, box in boxes.items():
        ImageDraw.Draw(image).rectangle(box, fill=(200, 60 * asset, 90))
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        mask.save(folder / f"img{number}_mask{asset}.png")
    image.save(folder / f"img{number}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two assets in the first photo, the second alone in photo 1, both in photo 3."""
    made = write_instance(tmp_path / "two")
    add_photo(made, 1, {1: (10, 10, 40, 40)})
    add_photo(made, 3, {0: (5, 5, 30, 30), 1: (40, 40, 70, 70)})
    return made


def test_they_are_read_with_the_assets_that_they_show(folder: Path) -> None:
    instance = load_instance(folder)
    assert instance.count == 2 and instance.image.size == (96, 64)
    assert [(photo.name, photo.shown, photo.image.size) for photo in instance.others] == [
        ("img1", (1,), (80, 80)), ("img3", (0, 1), (80, 80))]  # fmt: skip
    mask = instance.others[0].masks[1]
    assert mask is not None and mask.getbbox() == (10, 10, 41, 41)
    with_rest = with_background(instance)
    assert with_rest.count == 3 and with_rest.others[1].shown == (0, 1)  # the background is the first photo's


def test_a_step_draws_a_photo_first_and_then_of_what_it_shows(folder: Path) -> None:
    base = load_base()
    data = InstanceData(fit_instance(load_instance(folder), 64), base, placements=1)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batches = [data.sample(rng, generator, 1, True, 0.5) for _ in range(300)]
    latents = {len(batch.assets): batch.latents for batch in batches}
    assert set(latents) == {1, 2}
    # of asset 0 alone there are draws from two photos only: a third of half of two thirds
    alone = [batch for batch in batches if batch.assets == (0,)]
    assert 0.08 < len(alone) / 300 < 0.26  # 1/6, three deviations
    for batch in batches:
        of = [photo for photo in data.photos if any(
            torch.equal(batch.asset_masks, view.masks[list(batch.assets)]) for views in photo.views.values() for view in views)]
        assert of and all(set(batch.assets) <= set(photo.shown) for photo in of)


def test_a_bundle_is_learned_from_all_and_keeps_them(folder: Path, tmp_path: Path) -> None:
    mifo(*learn_arguments(folder, tmp_path / "out"))
    bundle = tmp_path / "out" / "two"
    kept = kept_instance(bundle, ("<asset0>", "<asset1>"))
    assert [photo.shown for photo in kept.others] == [(1,), (0, 1)]
    one = write_instance(tmp_path / "one" / "two")
    assert photo_digest(load_instance(one)) != photo_digest(load_instance(folder))
    # without its further photos it is another instance, which does not replace the bundle unasked
    said = mifo(*learn_arguments(one, tmp_path / "out"), exit_code=2)
    assert "another photo" in said.output
    mifo(*learn_arguments(folder, tmp_path / "out"))


def test_their_masks_are_checked_too(folder: Path) -> None:
    add_photo(folder, 4, {0: (0, 0, 9, 9)}, size=(400, 400))
    report = check_masks(load_instance(folder), sizes_by_name("toybox"))
    assert [entry["mask"] for entry in report.facts["further_masks"]] == [
        "img1_mask1.png", "img3_mask0.png", "img3_mask1.png", "img4_mask0.png"]  # fmt: skip
    assert any("img4_mask0.png" in line and "thinner" in line for line in report.warnings)


@pytest.mark.parametrize(("change", "said"), [
    (lambda f: (f / "img1_mask1.png").rename(f / "img1_mask2.png"), "img1_mask2.png but no mask2.png"),
    (lambda f: (f / "img1.png").unlink(), "img1_mask1.png but no img1.jpg"),
    (lambda f: (f / "img1.jpg").write_bytes((f / "img1.png").read_bytes()), "several images of number 1"),
    (lambda f: (f / "img01.png").write_bytes(b""), ""),  # no such number: nobody's photo
    (lambda f: (f / "img1_mask01.png").write_bytes((f / "img1_mask1.png").read_bytes()), "two masks of asset 1"),
    (lambda f: Image.new("L", (80, 80)).save(f / "img3_mask0.png"), "img3_mask0.png is empty"),
    (lambda f: Image.new("L", (81, 80), 255).save(f / "img3_mask0.png"), "img3_mask0.png is 81x80 but img3.png is 80x80"),
    (lambda f: Image.new("RGB", (8, 8)).save(f / "img3.png"), "each side needs at least 16"),
])  # fmt: skip
def test_what_does_not_fit_is_named(folder: Path, change: object, said: str) -> None:
    change(folder)  # type: ignore[operator]
    if said:
        with pytest.raises(InputError, match=said):
            load_instance(folder)
    else:
        assert len(load_instance(folder).others) == 2


def test_a_photo_without_masks_is_left_out_and_said(folder: Path) -> None:
    Image.new("RGB", (80, 80)).save(folder / "img2.png")
    instance = load_instance(folder)
    assert [photo.name for photo in instance.others] == ["img1", "img3"]
    assert any("img2.png is not learned from" in line for line in instance.warnings)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes((folder / "img1.png").read_bytes())
    (folder / "img1.png").unlink()
    (folder / "img1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match="link out of its folder"):
        load_instance(folder)
