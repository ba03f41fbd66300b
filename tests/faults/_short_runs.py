"""Runs of `learn` of a few steps on a tiny random model, to be crashed and resumed. The fixtures are in conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from _tiny import load_base, snapshot

from mifo.config import LearnConfig
from mifo.data.instance import Instance
from mifo.learning.callbacks import CheckpointJudge
from mifo.learning.checkpoints import Checkpointing
from mifo.learning.learn import learn
from mifo.learning.trainer import Progress
from mifo.model.base import BaseModel
from mifo.presets import learn_preset

STEPS = 3  # of each phase


class Crash(Exception):
    """Stands for whatever ends a process."""


@cache
def base() -> BaseModel:
    return load_base()


def config(**changes: Any) -> LearnConfig:
    preset = learn_preset("stable-diffusion")
    return replace(
        preset,
        embedding=replace(preset.embedding, train_steps=STEPS, warmup_steps=1),
        lora=replace(preset.lora, train_steps=STEPS, rank=2, averaged_share=0.6),  # two of three
        prior=replace(preset.prior, num_class_images=1, sampling_steps=1),
        **changes,
    )


def learned(folder: Path) -> dict[str, bytes | None]:
    """Everything in a bundle but the record, which has the seconds, and the manifest with its digest."""
    return {name: content for name, content in snapshot(folder).items() if name not in ("bundle.json", "manifest.json")}


def crash_at(phase: str, step: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if (progress.phase, progress.step) == (phase, step):
            raise Crash

    return report


def run(instance: Instance, folder: Path, report: Any = lambda _: None, every: int = 1, resume: bool | None = True,
        settings: LearnConfig | None = None, judge: CheckpointJudge | None = None) -> Path:  # fmt: skip
    checkpointing = Checkpointing(every, resume=resume)
    return learn(instance, base(), settings or config(), folder, report, None, checkpointing, judge).folder
