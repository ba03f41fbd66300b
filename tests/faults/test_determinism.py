"""The same seed on the same machine with the same number of threads gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _tiny import learn_arguments, mifo, snapshot, write_instance
from PIL import Image, ImageDraw

BOXES = "[[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]"


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def write_edit(folder: Path) -> list[object]:
    """A photo and a mask of an uneven size, for `edit`."""
    Image.effect_noise((150, 110), 80).convert("RGB").save(folder / "photo.png")
    mask = Image.new("L", (150, 110))
    ImageDraw.Draw(mask).ellipse((40, 20, 110, 90), fill=255)
    mask.save(folder / "mask.png")
    return ["--init-image", folder / "photo.png", "--mask", folder / "mask.png", "--prompt", "a photo of <asset1>"]


def test_learn_synthesize_and_edit_repeat_to_the_byte(tmp_path: Path, threads: int):
    cups, editing, made = write_instance(tmp_path / "cups"), write_edit(tmp_path), []
    for name in ("first", "second"):
        mifo(*learn_arguments(cups, tmp_path / name))
        mifo("synthesize", tmp_path / name / "cups", "--prompt", "a photo of <asset0> and <asset1>", "--boxes", BOXES,
             "--steps", 3, "--seed", 5, "--output-path", tmp_path / name / "pictures")  # fmt: skip
        mifo("edit", tmp_path / name / "cups", *editing, "--background", "optimization", "--reconstruction-steps", 2, "--seed", 5,
             "--steps", 3, "--output-path", tmp_path / name / "edited")  # fmt: skip
        files = {n: c for n, c in snapshot(tmp_path / name).items() if not n.endswith(".json") or "lora" in n}
        made.append(files)
    differ = {name for name in made[0] | made[1] if made[0].get(name) != made[1].get(name)}
    there = {"cups/assets.safetensors", "cups/unet_lora/adapter_model.safetensors", "pictures/000005.png", "edited/edit00.png"}
    assert not differ and there <= set(made[0])
