"""What is learned with `averaged_share` is the mean over the last steps, of hand-made numbers and of a real run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from _tiny import load_base, write_instance

from mifo.bundle.store import load_bundle
from mifo.config import KeepConfig, LearnConfig
from mifo.data.instance import load_instance
from mifo.learning.averaging import MeanWeights
from mifo.learning.learn import learn
from mifo.learning.state import PhaseRun
from mifo.learning.trainer import Callback, Trainer
from mifo.presets import learn_preset


class EachStep(Callback):
    """The embeddings after each step of phase 2."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        if phase.name == "lora":
            self.rows.append(trainer.embedding.vectors.detach().clone())
        return False


def config(share: float, **changes: object) -> LearnConfig:
    preset = learn_preset("stable-diffusion")
    return replace(
        preset,
        embedding=replace(preset.embedding, train_steps=1),
        lora=replace(preset.lora, train_steps=5, rank=2, row_learning_rate=0.1, averaged_share=share),
        prior=replace(preset.prior, enabled=False),
        **changes,  # type: ignore[arg-type]
    )


def rows(folder: Path, settings: LearnConfig) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the bundle has, and what there was after each step."""
    seen = EachStep()
    photo = folder.with_name("photo")
    if not photo.exists():
        write_instance(photo)
    judged = (lambda *_: {"score": 0.0}) if settings.keep.enabled else None
    learn(load_instance(photo), load_base(), settings, folder, callbacks=[seen], judge=judged)
    return load_bundle(folder).token_embeddings, seen.rows


def test_the_mean_of_three_of_five_steps_is_learned(tmp_path: Path):
    found, seen = rows(tmp_path / "cups", config(0.6))
    assert len(seen) == 5 and not torch.allclose(seen[4], seen[2], atol=1e-3)
    torch.testing.assert_close(found, torch.stack(seen[2:]).mean(0), atol=1e-6, rtol=0)  # one rounding of fp32


def test_without_a_share_the_last_step_is_learned(tmp_path: Path):
    found, seen = rows(tmp_path / "cups", config(0.0))
    assert torch.equal(found, seen[4])


def test_who_keeps_the_best_checkpoint_gets_that_one(tmp_path: Path):
    found, seen = rows(tmp_path / "cups", config(0.6, keep=KeepConfig(enabled=True, every_steps=1, patience=9)))
    assert not any(torch.allclose(found, row, atol=1e-4) for row in seen)  # a tie goes to the first: before any step


def test_a_mean_goes_on_from_its_state_and_keeps_what_does_not_change():
    weight, still = torch.tensor([1.0, 2.0]), torch.tensor([0.1])
    mean = MeanWeights([weight, still])
    mean.add()
    weight.copy_(torch.tensor([3.0, 5.0]))
    again = MeanWeights([weight, still])
    again.load_state(mean.state())
    again.add()
    weight.copy_(torch.tensor([8.0, 2.0]))
    again.add()
    again.apply()
    assert weight.tolist() == [4.0, 3.0] and torch.equal(still, torch.tensor([0.1]))
