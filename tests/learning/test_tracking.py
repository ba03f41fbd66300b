"""What a run reports to TensorBoard, read back from its own files; and Weights & Biases offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from _tiny import learn_arguments, mifo, write_instance

from mifo.errors import InputError


def test_tensorboard_has_losses_rates_attention_and_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    mifo(*learn_arguments(write_instance(tmp_path / "cups"), tmp_path / "Model_ours", "--log-with", "tensorboard"))
    (folder,) = (tmp_path / "output" / "logs").glob("cups-*")
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    names = set(read.Tags()["scalars"])
    assert {"embedding/learning_rate_0", "lora/learning_rate_0", "lora/learning_rate_1", "attention/asset0"} <= names
    losses = [name for name in names if name.startswith("embedding/") and "rate" not in name]
    assert losses and [e.step for e in read.Scalars("lora/learning_rate_0")] == [3, 4]  # after phase 1's two steps
    assert all(0 <= e.value <= 1 for e in read.Scalars("attention/asset0"))
    assert read.Tags()["images"] == ["attention"]


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    mifo(*learn_arguments(write_instance(tmp_path / "cups"), tmp_path / "Model_ours", "--log-with", "wandb"))
    assert list((tmp_path / "output" / "logs").rglob("*.wandb"))


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import accelerate.utils

    from mifo.learning.tracking import make_tracker

    monkeypatch.setattr(accelerate.utils, "is_wandb_available", lambda: False)
    with pytest.raises(InputError, match="pip install wandb"):
        make_tracker("wandb", "x", tmp_path)


def test_quiet_shows_no_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = mifo(*learn_arguments(write_instance(tmp_path / "cups"), tmp_path / "Model_ours", "--quiet"))
    assert "phase 1" not in result.stderr and "learned <asset0>" in result.stdout
