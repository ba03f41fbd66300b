"""The state of a training run between two steps: what changes as it goes on, and as plain data for a checkpoint."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..bundle.target import photo_digest
from ..config import EmbeddingPhase, LearnConfig, LoraPhase, to_dict
from ..data.instance import Instance
from ..model.base import BaseModel

PHASE_NAMES = {"embedding": "phase 1", "lora": "phase 2"}


@dataclass
class TrainerState:
    """What changes as a run goes on, besides weights and optimizer; a checkpoint holds it (`state.capture`)."""

    rng: np.random.Generator
    generator: torch.Generator
    started: float
    """On `time.monotonic`'s clock; of a resumed run, moved so that the interruption does not count."""
    loss_history: list[dict[str, float | str]] = field(default_factory=list)
    """Every tenth step: phase, step, and the weighted losses"""
    snapshots: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """(label, attention maps (N, h, w))"""
    skipped_steps: int = 0
    last_saved: str | None = None
    """Of the last checkpoint, for people: "phase 1, step 350 of 600"."""
    kept: dict[str, Any] | None = None
    """Which checkpoint early stopping kept, and all scores."""

    @classmethod
    def start(cls, seed: int, started: float | None = None) -> TrainerState:
        now = time.monotonic() if started is None else started
        return cls(np.random.default_rng(seed), torch.Generator().manual_seed(seed), now)

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between an interruption and the resumption."""
        return time.monotonic() - self.started


@dataclass
class PhaseRun:
    """One phase under way."""

    name: str
    """'embedding' or 'lora'"""
    config: EmbeddingPhase | LoraPhase
    parameters: list[torch.Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    steps_done: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """The parts of the last step's, weighted."""
    stop_asked: bool = False
    """A signal came; the run ends after the callbacks of this step."""

    @property
    def is_last_step(self) -> bool:
        return self.steps_done == self.config.train_steps


def identity_of(instance: Instance, base: BaseModel, config: LearnConfig, words: Sequence[str | None] | None,
                start: tuple[str, Sequence[str]] | None = None) -> dict[str, Any]:  # fmt: skip
    """Everything that decides what is learned; a run is resumed only where all of it is the same.

    `start`: the digest of the bundle that it goes on from, and the tokens that are learned.
    """
    return {
        "config": to_dict(config),
        "base": {"fingerprint": base.fingerprint, "dtype": str(base.dtype), "device": base.device.type},
        "instance": photo_digest(instance),
        "initializer_tokens": list(words) if words else None,
        **({"start": {"bundle": start[0], "only": list(start[1])}} if start else {}),
    }


def place(phase: str, step: int, total: int) -> str:
    """For people: "phase 1, step 350 of 600"."""
    return f"{PHASE_NAMES[phase]}, step {step} of {total}"


def capture(state: TrainerState, phase: PhaseRun, scaler: Any = None,
            callbacks: Mapping[str, Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """The whole state between two steps. `scaler`: the gradient scaler; `callbacks`: their own states, by class."""
    return {
        "phase": phase.name,
        "step": phase.steps_done,
        "seconds": state.seconds,
        "parameters": [p.detach() for p in phase.parameters],
        "optimizer": phase.optimizer.state_dict(),
        "scheduler": phase.scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": _random_states(state, on_gpu=phase.parameters[0].is_cuda),
        "curve": state.loss_history,
        "snapshots": state.snapshots,
        "skipped_steps": state.skipped_steps,
        "callbacks": dict(callbacks or {}),
    }


def restore(state: TrainerState, phase: PhaseRun, saved: dict[str, Any], scaler: Any = None) -> None:
    """Puts everything back as `capture` saw it; `saved["callbacks"]` is theirs to load."""
    with torch.no_grad():
        for parameter, value in zip(phase.parameters, saved["parameters"], strict=True):
            parameter.copy_(value)
    phase.optimizer.load_state_dict(saved["optimizer"])
    phase.scheduler.load_state_dict(saved["scheduler"])
    if saved["scaler"] is not None and scaler is not None:
        scaler.load_state_dict(saved["scaler"])
    state.loss_history, state.snapshots = saved["curve"], saved["snapshots"]
    state.skipped_steps = saved["skipped_steps"]
    state.started = time.monotonic() - saved["seconds"]
    _set_random_states(state, saved["random"])
    phase.steps_done = int(saved["step"])


def _random_states(state: TrainerState, on_gpu: bool) -> dict[str, Any]:
    """Of every library that has one, and the run's own; of GPUs only where the run is on one: asking would start CUDA."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_gpu else [],
        "rng": state.rng.bit_generator.state,
        "generator": state.generator.get_state(),
    }


def _set_random_states(state: TrainerState, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    inner = states["numpy"]["state"]
    np.random.set_state({**states["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    state.rng.bit_generator.state = states["rng"]
    state.generator.set_state(states["generator"])
