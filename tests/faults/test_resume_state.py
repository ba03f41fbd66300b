"""Each part of a checkpoint is needed: a resumed run has the random states, counts and best values of one never interrupted."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _short_runs import STEPS, Crash, base, config, learned, run

from mifo.bundle.store import load_bundle
from mifo.config import KeepConfig, LearnConfig, LoraPhase
from mifo.data.instance import Instance
from mifo.io.tensor_file import read_state, write_state
from mifo.learning.optimizer import Stepper
from mifo.learning.state import PhaseRun, TrainerState, capture, restore
from mifo.learning.trainer import Progress

pytestmark = pytest.mark.usefixtures("quick_preview")


# --- the best checkpoint of a phase --------------------------------------------------------------

SCORES = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.4, 4: 2.0}
"""By step of phase 2: the last would be the best, if a run got so far."""


def keeping(patience: int, steps: int) -> LearnConfig:
    settings = config(keep=KeepConfig(enabled=True, every_steps=1, patience=patience))
    return replace(settings, lora=replace(settings.lora, train_steps=steps))


class Scored:
    """A judge that knows the step from the reports, and so says the same of it in every run."""

    def __init__(self, crash: int = -1):
        self.step, self.crash = 0, crash

    def report(self, progress: Progress) -> None:
        self.step = progress.step if progress.phase == "lora" else 0
        if self.step == self.crash:
            raise Crash

    def judge(self, *_: object) -> dict[str, float]:
        return {"score": SCORES[self.step]}


def kept_run(instance: Instance, folder: Path, settings: LearnConfig, crash: int = -1) -> dict[str, Any]:
    scored = Scored(crash)
    run(instance, folder, scored.report, settings=settings, judge=scored.judge)
    return load_bundle(folder).metadata["kept"]


def test_a_resumed_run_keeps_the_best_step_from_before_the_interruption(instance: Instance, tmp_path: Path):
    settings = keeping(patience=9, steps=3)
    expected = kept_run(instance, tmp_path / "whole", settings)
    assert expected["step"] == 1 and [c["step"] for c in expected["checks"]] == [0, 1, 2, 3]
    with pytest.raises(Crash):
        kept_run(instance, tmp_path / "cups", settings, crash=3)
    assert kept_run(instance, tmp_path / "cups", settings) == expected
    assert learned(tmp_path / "cups") == learned(tmp_path / "whole")


def test_a_run_that_had_stopped_improving_does_not_go_on_when_resumed(instance: Instance, tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    """Interrupted between its last step and the bundle."""
    settings = keeping(patience=2, steps=4)
    expected = kept_run(instance, tmp_path / "whole", settings)
    assert expected["step"] == 1 and [c["step"] for c in expected["checks"]] == [0, 1, 2, 3]

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr("mifo.learning.learn.attention_shares", crash)
        kept_run(instance, tmp_path / "cups", settings)
    assert kept_run(instance, tmp_path / "cups", settings) == expected
    assert learned(tmp_path / "cups") == learned(tmp_path / "whole")


# --- random states, counts, time -----------------------------------------------------------------


class Witness:
    """Draws from every library's random numbers at each step, and crashes at one."""

    def __init__(self, on_step: Callable[[], None], crash: tuple[str, int] | None = None):
        self.on_step, self.crash = on_step, crash
        self.seen: dict[tuple[str, int], tuple[float, float, float]] = {}

    def report(self, progress: Progress) -> None:
        if progress.phase == "prior":
            return
        self.seen[progress.phase, progress.step] = random.random(), float(np.random.rand()), float(torch.rand(()))
        self.on_step()
        if (progress.phase, progress.step) == self.crash:
            raise Crash


def test_random_states_skipped_steps_curve_and_seconds_go_on(instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step takes 100 s by a clock that the test turns, and the interruption a day."""
    clock, real = [0.0], time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + clock[0])
    monkeypatch.setattr(Stepper, "step", lambda self, optimizer: optimizer.step() or False)

    def tick() -> None:
        clock[0] += 100

    def attempt(name: str, crash: tuple[str, int] | None = None) -> Witness:
        witness = Witness(tick, crash)
        run(instance, tmp_path / name, witness.report)
        return witness

    base()  # loading it draws random numbers too

    def seed() -> None:
        random.seed(1), np.random.seed(2), torch.manual_seed(3)

    seed()
    expected = attempt("whole").seen
    for crash in (("embedding", 3), ("lora", 3)):
        seed()
        with pytest.raises(Crash):
            attempt("cups", crash)
        clock[0] += 86_400
        random.seed(7), np.random.seed(8), torch.manual_seed(9)
        again = attempt("cups").seen
        assert again == {k: v for k, v in expected.items() if k in again} and crash in again and len(again) < 2 * STEPS
        facts, other = (json.loads((tmp_path / name / "bundle.json").read_text()) for name in ("cups", "whole"))
        assert facts["skipped_steps"] == other["skipped_steps"] == 2 * STEPS
        assert facts["losses"] == other["losses"] and [entry["phase"] for entry in other["losses"]] == ["embedding", "lora"]
        assert 500 <= facts["seconds"] < 900  # the step that was lost does not count, nor does the day


def test_the_scale_of_a_scaler_comes_back(tmp_path: Path):
    """fp16 needs a GPU, but its scaler alone works without."""

    def scaler_at(scale: float) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(1))  # it takes its scale at the first use
        return scaler

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    phase = PhaseRun("lora", LoraPhase(), [weight], optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), steps_done=5)
    state, other, scaler = TrainerState.start(0), TrainerState.start(1), scaler_at(2.0)
    state.skipped_steps = 3
    write_state(tmp_path / "1.safetensors", capture(state, phase, scaler_at(1024.0)), "here", {})
    phase.steps_done = 0
    restore(other, phase, read_state(tmp_path / "1.safetensors"), scaler)
    assert phase.steps_done == 5 and scaler.get_scale() == 1024 and other.skipped_steps == 3
