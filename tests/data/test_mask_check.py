"""The mask linter: hand-made masks with known faults, and masks with none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from _tiny import FAST, load_base, mifo, tiny_base_folder, write_instance
from PIL import Image, ImageDraw

from mifo.data.instance import load_instance
from mifo.data.mask_check import check_masks
from mifo.data.mask_sizes import MaskSizes
from mifo.learning.supervision import sizes_by_name, sizes_of
from mifo.presets import learn_preset

SIZES = MaskSizes(64, 16, (16, 8))


def paint(folder: Path, index: int, *boxes: tuple[int, int, int, int], mode: str = "L", inside: object = 255,
          outside: object = 0) -> None:  # fmt: skip
    """A mask of the image's size with filled boxes."""
    mask = Image.new(mode, Image.open(folder / "img.png").size, outside)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(box, fill=inside)
    mask.save(folder / f"mask{index}.png")


@pytest.fixture
def cups(tmp_path: Path) -> Path:
    """128 x 128, two clean masks of 40 x 40 pixels."""
    folder = write_instance(tmp_path / "cups", size=(128, 128))
    paint(folder, 0, (0, 0, 39, 39))
    paint(folder, 1, (80, 80, 119, 119))
    return folder


def warnings(folder: Path) -> str:
    return "\n".join(check_masks(load_instance(folder), SIZES).warnings)


def test_clean_masks_and_their_areas(cups: Path):
    report = check_masks(load_instance(cups), SIZES)
    assert report.warnings == () and report.facts["overlaps"] == []
    first = report.facts["masks"][0]
    assert first["pixels"] == 20 * 20 and first["share_of_picture"] == pytest.approx(400 / 4096, abs=1e-4)
    assert first["at"]["16"] == {"cells": 25, "largest": 1.0} and first["at"]["8"]["largest"] == 1.0  # 5x5 cells of 4 pixels


@pytest.mark.parametrize("fault, said", [
    (lambda f: paint(f, 1, (64, 64, 69, 69)), r"mask1\.png vanishes at 8x8, where the attention losses look: .* \d+ %"),
    (lambda f: paint(f, 1, (0, 0, 39, 13)), r"mask0\.png and mask1\.png share 100% of the smaller one"),
    (lambda f: paint(f, 1, (30, 30, 69, 69)), r"share 100 pixels, 6 % of the smaller one"),
    (lambda f: paint(f, 0, (50, 50, 80, 80), inside=0, outside=255), r"mask0\.png looks inverted"),
    (lambda f: paint(f, 0, (0, 0, 39, 39), (60, 0, 99, 20), inside=140), r"mask0\.png is \d+ % grey"),
    (lambda f: paint(f, 0, (0, 0, 39, 39), (120, 120, 120, 120)), r"mask0\.png has a tiny island far from its body \(1 pixel at"),
])  # fmt: skip
def test_faults_are_told_with_their_numbers(cups: Path, fault, said: str):
    fault(cups)
    found = warnings(cups)
    assert re.search(said, found), found


def test_the_thing_that_fills_the_picture_is_not_inverted(cups: Path):
    paint(cups, 0, (4, 4, 123, 123))
    assert "inverted" not in warnings(cups)


def test_sizes_without_loading_agree_with_the_loaded_model():
    base = load_base()
    assert sizes_by_name(str(tiny_base_folder())) == sizes_of(base, learn_preset("stable-diffusion"))
    assert sizes_by_name("toybox") == MaskSizes(128, 16, (16, 8))
    assert sizes_by_name("sd2.1") == MaskSizes(512, 64, (32, 16)) and sizes_by_name("sd1.5", 768).maps == (48, 24)


def test_maps_are_supervised_by_the_relative_penalty_alone_too():
    base, preset = load_base(), learn_preset("toybox")

    def maps(**terms: Any) -> tuple[int, ...]:
        phases = {name: replace(getattr(preset, name), attention=replace(getattr(preset, name).attention, **terms))
                  for name in ("embedding", "lora")}  # fmt: skip
        return sizes_of(base, replace(preset, **phases)).maps

    assert maps(loss="none", relative_penalty_weight=0.1) == maps() != ()
    assert maps(loss="none", relative_penalty_weight=0.0) == ()


def test_check_command_and_notes_of_learn(cups: Path, tmp_path: Path):
    paint(cups, 1, (30, 30, 69, 69))
    found = json.loads(mifo("check", cups, "--output-path", tmp_path / "out" / "check.png", "--json").stdout)
    assert found["supervised_map_sizes"] == [16, 8] and len(found["masks"]) == 2
    assert found["overlaps"] == [{"masks": [0, 1], "pixels": 100, "share_of_smaller": 0.0625}]
    assert Image.open(found["sheet"]).width > 300
    assert "warning: mask0.png and mask1.png share 100 pixels" in mifo("check", cups, "--output-path", tmp_path / "c.png").stdout
    result = mifo("learn", cups, "--model-path", tiny_base_folder(), "--output-dir", tmp_path / "bundles", *FAST)
    assert "note: mask0.png and mask1.png share 100 pixels" in result.stderr
    mifo("check", cups, "--model-path", cups, "--output-path", tmp_path / "d.png", exit_code=2)
    assert not (tmp_path / "d.png").exists()
