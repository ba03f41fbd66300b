"""The training loop of both phases. What happens beside it (checkpoints, early stopping, snapshots) is in `callbacks`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..attention.record import record_attention
from ..attention.sites import choose_sites
from ..config import EmbeddingPhase, LearnConfig, LoraPhase
from ..errors import InputError
from ..io.interrupts import Terminated, stop_between_steps
from ..io.threads import cores
from ..model.base import BaseModel
from ..model.embedding import AssetEmbedding
from ..model.finite import broken_weights
from .dataset import InstanceData
from .objective import PARTS, Objective, StepLosses
from .optimizer import Stepper, make_lr_schedule, make_optimizer
from .prior import PriorData
from .processes import Processes
from .state import PhaseRun, TrainerState, restore


@dataclass(frozen=True)
class Progress:
    """What a progress bar needs to know after each step."""

    phase: str
    """'prior', 'embedding', 'lora' or 'previews'"""
    step: int
    total: int
    losses: dict[str, float] = field(default_factory=dict)


Report = Callable[[Progress], None]


class Callback:
    """Hooks of the training loop, called in the order in which the trainer was given them."""

    def on_phase_start(self, trainer: Trainer, phase: PhaseRun) -> bool:
        """Before the first step of a phase, or of what is left of it; `phase.steps_done` says which. True ends it at once."""
        return False

    def on_step_start(self, trainer: Trainer, phase: PhaseRun) -> None:
        """Before a step; `phase.steps_done` are behind."""

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        """After a step. True ends the phase early."""
        return False

    def on_phase_end(self, trainer: Trainer, phase: PhaseRun) -> None:
        """After the last step."""

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint of the phase that runs holds of it, besides weights and `TrainerState`; None for nothing."""
        return None

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave, before `on_phase_start` of the phase that goes on."""


class Trainer:
    """Trains token embeddings (phase 1), then LoRA with them (phase 2), on one instance (MIFO, arXiv 2511.00542, section 3)."""

    def __init__(self, base: BaseModel, data: InstanceData, config: LearnConfig, embedding: AssetEmbedding,
                 prior: PriorData | None = None, callbacks: Sequence[Callback] = (), state: TrainerState | None = None,
                 report: Report = lambda _: None, stepper: Stepper | None = None,
                 checkpoint: dict[str, Any] | None = None, processes: Processes | None = None):  # fmt: skip
        """`stepper`: by default one for `config.mixed_precision`. `checkpoint`: what `state.capture` made of an interrupted run;
        the phases that it has behind it are not run again. `processes`: those that share each step's draws with this one."""
        self.base, self.data, self.config, self.embedding, self.prior = base, data, config, embedding, prior
        self.callbacks, self.report = list(callbacks), report
        self.state = state or TrainerState.start(config.seed)
        self.stepper = stepper or Stepper(base.device, config.mixed_precision)
        self.objective = Objective(base, data, config, self.state.rng, self.state.generator)
        self.checkpoint, self.processes = checkpoint, processes

    def train_embedding(self) -> None:
        """Phase 1: the assets' token embeddings alone."""
        if self.checkpoint is not None and self.checkpoint["phase"] != "embedding":
            return  # the checkpoint holds what this phase has learned
        phase = self.config.embedding
        groups = [{"params": [self.embedding.vectors], "lr": phase.learning_rate}]
        optimizer = torch.optim.AdamW(groups, betas=self.config.adam_betas, weight_decay=self.config.weight_decay)
        self._train("embedding", phase, optimizer, None)

    def train_lora(self, adapters: dict[str, PeftModel]) -> None:
        """Phase 2: the adapters, and the token embeddings with them."""
        phase = self.config.lora
        if not phase.train_steps:
            return
        weights = [p for adapter in adapters.values() for name, p in adapter.named_parameters() if "lora_" in name]
        for weight in weights:  # a bundle's own come frozen
            weight.requires_grad_(True)
        self.embedding.vectors.requires_grad_(True)  # freezing the base for LoRA froze them with it
        groups = [
            {"params": weights, "lr": phase.learning_rate},
            {"params": [self.embedding.vectors], "lr": phase.row_learning_rate},
        ]
        optimizer = make_optimizer(groups, self.config, phase.use_8bit_adam)
        self._train("lora", phase, optimizer, self.prior)

    def _train(self, name: str, config: EmbeddingPhase | LoraPhase, optimizer: torch.optim.Optimizer,
               prior: PriorData | None) -> None:  # fmt: skip
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        phase = PhaseRun(name, config, parameters, optimizer, make_lr_schedule(optimizer, config))
        sites = choose_sites(self.base.unet, config.attention.blocks, config.attention.levels)
        if self.checkpoint is not None:
            restore(self.state, phase, self.checkpoint, self.stepper.scaler)
            for callback in self.callbacks:
                if kept := self.checkpoint["callbacks"].get(type(callback).__name__):
                    callback.load_state(kept)
            self.checkpoint = None
        mine = self.processes.share(config.draws) if self.processes else None
        with stop_between_steps() as stop, record_attention(self.base.unet, sites) as recorder, self._threads(config) as pool:
            ended = self._any(any([callback.on_phase_start(self, phase) for callback in self.callbacks]))
            while not ended and phase.steps_done < config.train_steps:
                for callback in self.callbacks:
                    callback.on_step_start(self, phase)
                if pool is not None:
                    losses = self.objective.gradients(config, phase.steps_done, sites, recorder, prior, parameters, pool,
                                                      mine)  # fmt: skip
                else:
                    losses = self.objective.losses(config, phase.steps_done, sites, recorder, prior, mine)
                if self.processes is None:
                    self.check_losses(losses, phase)
                if pool is None:
                    self.stepper.backward(losses.total)
                if self.processes is not None:
                    losses = self.processes.add_up(parameters, losses)
                    self.check_losses(losses, phase)
                norm = self.stepper.clip(optimizer, parameters, self.config.max_grad_norm)
                if self.stepper.scaler is None:  # a scaler skips such a step by itself, and is counted
                    self.check_finite({"gradient": float(norm)}, phase)
                self.state.skipped_steps += not self.stepper.step(optimizer)
                phase.scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                phase.losses = losses.as_floats()
                if phase.steps_done % 10 == 0:
                    rounded = {k: round(v, 6) for k, v in phase.losses.items()}
                    self.state.loss_history.append({"phase": name, "step": phase.steps_done, **rounded})
                phase.steps_done += 1
                self.report(Progress(name, phase.steps_done, config.train_steps, phase.losses))
                phase.stop_asked = self._any(stop.asked is not None)
                ended = self._any(any([callback.on_step_end(self, phase) for callback in self.callbacks]))
                if phase.stop_asked:  # a stop that was not heard above waits for the next step, whose state is kept by all
                    if stop.asked is None:
                        raise Terminated  # another process was asked
                    stop.take_effect()
        for callback in self.callbacks:
            callback.on_phase_end(self, phase)

    def _any(self, flag: bool) -> bool:
        """Of all processes."""
        return flag if self.processes is None else self.processes.any(flag)

    @contextmanager
    def _threads(self, config: EmbeddingPhase | LoraPhase) -> Iterator[ThreadPoolExecutor | None]:
        """Threads for parts of a step, where the model is small and runs on a CPU; None where a step is taken whole."""
        base = self.base
        if not base.is_small or config.draws < PARTS or self.stepper.scaler is not None:
            yield None
            return
        with ThreadPoolExecutor(min(PARTS, cores())) as pool:
            yield pool

    def check_losses(self, losses: StepLosses, phase: PhaseRun) -> None:
        self.check_finite({f"{k} loss": v for k, v in losses.as_floats().items()}, phase)

    def check_finite(self, values: dict[str, float], phase: PhaseRun) -> None:
        """Raises InputError, which names what is broken and the last good checkpoint, unless all of `values` are finite."""
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            if broken := broken_weights(self.base.parts):
                raise InputError(f"the {' and the '.join(bad)} is not finite: {broken}")
            kept = self.state.last_saved
            raise InputError(
                f"the {' and the '.join(bad)} is not finite at step {phase.steps_done} of the {phase.name} phase; lower the "
                "learning rate or use --mixed-precision no"
                + (f". The last good checkpoint, {kept}, is kept" if kept else "")
            )
