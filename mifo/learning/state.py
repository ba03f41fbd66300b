"""The whole state of a learning run between two steps, as plain data: what a checkpoint holds.

Knows optimizers, schedules and random states. Knows nothing of losses or files.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..bundle.target import photo_digest
from ..config import LearnConfig, to_dict
from ..data.instance import Instance
from ..model.base import BaseModel

Learner = Any  # learn.Learner; naming it would make the imports a circle
PHASE_NAMES = {"embedding": "phase 1", "lora": "phase 2"}


def identity_of(instance: Instance, base: BaseModel, config: LearnConfig, words: Sequence[str | None] | None) -> dict[str, Any]:
    """Everything that decides what is learned; a run is resumed only where all of it is the same."""
    return {
        "config": to_dict(config),
        "base": {"fingerprint": base.fingerprint, "dtype": str(base.dtype), "device": base.device.type},
        "instance": photo_digest(instance),
        "initializer_tokens": list(words) if words else None,
    }


def place(phase: str, step: int, total: int) -> str:
    """For people: "phase 1, step 350 of 600"."""
    return f"{PHASE_NAMES[phase]}, step {step} of {total}"


def capture(learner: Learner, phase: str, step: int, parameters: Sequence[torch.Tensor], optimizer: Any,
            scheduler: Any) -> dict[str, Any]:  # fmt: skip
    """The state after `step` steps of `phase`."""
    scaler = learner.stepper.scaler
    return {
        "phase": phase,
        "step": step,
        "seconds": learner.seconds(),
        "parameters": [p.detach() for p in parameters],
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "random": _random_states(learner),
        "curve": learner.curve,
        "snapshots": learner.snapshots,
        "skipped_steps": learner.skipped_steps,
        "keeper": learner.keeper.state() if learner.keeper else None,
    }


def restore(learner: Learner, state: dict[str, Any], parameters: Sequence[torch.Tensor], optimizer: Any, scheduler: Any) -> int:
    """Puts everything back as `capture` saw it; returns the number of steps that are done."""
    with torch.no_grad():
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    if state["scaler"] is not None and learner.stepper.scaler is not None:
        learner.stepper.scaler.load_state_dict(state["scaler"])
    learner.curve, learner.snapshots = state["curve"], state["snapshots"]
    learner.skipped_steps = state["skipped_steps"]
    if state["keeper"] is not None and learner.keeper is not None:
        learner.keeper.load_state(state["keeper"])
    learner.started = time.monotonic() - state["seconds"]
    _set_random_states(learner, state["random"])
    return int(state["step"])


def _random_states(learner: Learner) -> dict[str, Any]:
    """Of every library that has one, and the run's own."""
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if learner.base.device.type == "cuda" else [],
        "rng": learner.rng.bit_generator.state,
        "generator": learner.generator.get_state(),
    }


def _set_random_states(learner: Learner, states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    inner = states["numpy"]["state"]
    np.random.set_state({**states["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    learner.rng.bit_generator.state = states["rng"]
    learner.generator.set_state(states["generator"])
