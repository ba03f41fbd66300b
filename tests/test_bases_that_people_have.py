"""Stable Diffusion folders and files as people have them: 768 pixels, inpainting, half-precision names, a single file, old
configurations. Each works, or is refused with what to use instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import FAST, edit_json, mifo, write_instance
from PIL import Image

SD2_AT_768 = {
    "sample_size": 96, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "cross_attention_dim": 48, "attention_head_dim": (2, 2, 2, 2), "norm_num_groups": 4, "use_linear_projection": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def folder_at_768(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.x at 768 pixels, narrow: 96x96 latents, predicts velocity. The finest level has no attention, which
    would take most of a test's time there."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("sd2") / "sd2_at_768"))
    UNet2DConditionModel(**SD2_AT_768).save_pretrained(folder / "unet")
    edit_json(folder / "vae" / "config.json", sample_size=768)
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    return folder


def test_stable_diffusion_2_at_768_checks_learns_draws_and_edits(folder_at_768: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Before, sites were those with maps of 16 and 32, which latents of 96 do not have."""
    monkeypatch.setattr("mifo.learn.write_preview", lambda path, *_: Image.new("RGB", (8, 8)).save(path))
    instance = write_instance(tmp_path / "instances" / "pair", size=(128, 128))
    checked = mifo("check", instance, "--model-path", folder_at_768, "--output-path", tmp_path / "check.png", "--json")
    assert json.loads(checked.stdout)["supervised_map_sizes"] == [48, 24]
    mifo("learn", instance, "--model-path", folder_at_768, "--output-dir", tmp_path, *FAST, "--resolution", 128)
    boxes = json.dumps([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    common = ("--output-dir", tmp_path, "--steps", 2)
    mifo("synthesize", "pair", "--prompt", "a photo of <asset0> and <asset1>", "--boxes", boxes, "--width", 128, "--height", 128,
         "--output-path", tmp_path / "drawn", *common)  # fmt: skip
    assert Image.open(next((tmp_path / "drawn").rglob("*000000.png"))).size == (128, 128)
    mifo("edit", "pair", "--init-image", instance / "img.png", "--mask", instance / "mask0.png", "--prompt",
         "a photo of <asset1>", "--output-path", tmp_path / "edited", *common)  # fmt: skip
    assert list((tmp_path / "edited").rglob("*.png"))


@pytest.mark.parametrize("job", ["learn", "synthesize", "edit"])
def test_stable_diffusion_2_at_768_is_planned_for(folder_at_768: Path, job: str) -> None:
    found = json.loads(mifo("plan", "--model-path", folder_at_768, "--job", job, "--vram-gib", 64, "--json").stdout)
    assert found["resolution"] == 768 and found["peak_gib"] > 0
