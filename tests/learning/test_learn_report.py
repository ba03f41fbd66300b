"""What `learn` shows of itself: snapshots of attention, previews, and the seconds that all of it took."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import load_base, write_instance
from PIL import Image

from mifo.config import LearnConfig
from mifo.data.instance import load_instance
from mifo.learning import report
from mifo.learning.callbacks import snapshot_steps
from mifo.learning.learn import learn
from mifo.learning.trainer import Progress
from mifo.presets import learn_preset
from mifo.sampling import sample


def short(steps: int) -> LearnConfig:
    config = learn_preset("stable-diffusion")
    return replace(config, embedding=replace(config.embedding, train_steps=steps), prior=replace(config.prior, enabled=False),
                   lora=replace(config.lora, train_steps=steps, rank=2, learning_rate=1e-2), resolution=32)  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 100, 400, 601])
def test_a_phase_is_shown_at_its_thirds_and_no_step_twice(steps: int):
    shown = sorted(snapshot_steps(steps, first_phase=True))
    assert shown[0] == 0 and len(shown) == min(steps, 3)
    assert steps < 6 or all(abs((b - a) - steps / 3) <= 1 for a, b in pairwise([*shown, steps]))


def test_no_column_of_the_attention_sheet_is_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nor the first of phase 2, which is the last of phase 1."""
    sheets: list[Any] = []
    monkeypatch.setattr("mifo.learning.learn.draw_preview", lambda *_: Image.new("RGB", (8, 8)))
    monkeypatch.setattr("mifo.learning.learn.draw_attention_sheet",
                        lambda snapshots, *_: sheets.append(snapshots) or Image.new("RGB", (8, 8)))  # fmt: skip
    learn(load_instance(write_instance(tmp_path / "cups")), load_base(), short(4), tmp_path / "out")
    labels = [label for label, _ in sheets[0]]
    assert labels == ["embedding 0", "embedding 1", "embedding 2", "embedding 4", "lora 1", "lora 2", "lora 4"]


def test_what_goes_wrong_while_previews_are_drawn_is_not_said_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They were drawn while the folder was written, so that a font that cannot be read was "cannot be written"."""

    def broken(*_: Any) -> None:
        raise OSError("no font")

    monkeypatch.setattr("mifo.learning.learn.draw_preview", broken)
    with pytest.raises(OSError, match="no font"):
        learn(load_instance(write_instance(tmp_path / "cups")), load_base(), short(1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_previews_have_the_learned_resolution_a_bar_and_their_share_of_the_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, base, sizes = sample.denoise, load_base(), []
    instance, started = load_instance(write_instance(tmp_path / "cups")), time.monotonic()

    def slow(unet: Any, sampler: Any, latents: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        sizes.append((tuple(latents.shape[2:]), time.monotonic() - started))
        time.sleep(2)
        return real(unet, sampler, latents, *given, **more)

    monkeypatch.setattr(sample, "denoise", slow)
    seen: list[Progress] = []
    bundle = learn(instance, base, short(1), tmp_path / "out", seen.append)
    side = 32 // base.vae_factor
    assert [size for size, _ in sizes] == [(side, side)] and base.native_latents != side
    previews = [(p.step, p.total) for p in seen if p.phase == "previews"]
    assert previews == [(k, sample.PREVIEW_STEPS) for k in range(1, sample.PREVIEW_STEPS + 1)]
    assert bundle.metadata["seconds"] > sizes[0][1] + 1
    images = sample.sample_prompts(base, ["a photo"] * 3, [], 0, steps=1, resolution=32)
    assert [image.size for image in images] == [(32, 32)] * 3 and isinstance(images[0], Image.Image)


def test_the_film_shows_each_snapshot_once_and_keeps_a_wide_maps_shape(tmp_path: Path) -> None:
    instance = load_instance(write_instance(tmp_path / "cups"))
    maps = torch.zeros(2, 6, 12)
    maps[0, :, :6] = maps[1, :, 6:] = 1.0
    snapshots = [("start", torch.ones(2, 6, 12)), ("step 10", maps)]
    report.save_attention_film(tmp_path / "film.webp", snapshots, instance, instance.tokens)
    with Image.open(tmp_path / "film.webp") as film:
        assert film.n_frames == 2
        first = np.asarray(film.convert("RGB"), int)
        film.seek(1)
        second = np.asarray(film.convert("RGB"), int)
    assert np.abs(first - second).max() > 100
    heat = np.asarray(report._heat(maps[0], 64), int)
    assert (heat[:16] == 255).all() and (heat[-16:] == 255).all(), "paper above and below"
    assert heat[32, 8, 0] > 200 > heat[32, 56, 0]
