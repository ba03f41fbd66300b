"""What happens beside the training loop: checkpoints, early stopping, and the attention maps that the report shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..config import AttentionTerms, KeepConfig, LoraPhase
from ..model.base import BaseModel
from .averaging import MeanWeights
from .checkpoints import Checkpoints
from .dataset import InstanceData
from .early_stopping import KeepBest
from .report import snapshot_maps
from .state import PhaseRun, capture, place
from .trainer import Callback, Trainer

#: (base with assets and adapters as they stand, data, tokens, supervised sites) -> {"score": larger is better, ...}
CheckpointJudge = Callable[[BaseModel, InstanceData, Sequence[str], AttentionTerms], dict[str, float]]


class EarlyStopping(Callback):
    """Keeps the best checkpoint of the last phase by a judge's score, and ends the phase when the score stops improving. The
    first candidate is what the phase before has left."""

    def __init__(self, config: KeepConfig, judge: CheckpointJudge):
        self.config, self.judge = config, judge
        self.keeper: KeepBest | None = None
        self._saved: dict[str, Any] | None = None

    def on_phase_start(self, trainer: Trainer, phase: PhaseRun) -> bool:
        self.keeper = None
        if phase.name == "embedding" and trainer.config.lora.train_steps:
            return False
        data, terms = trainer.data, phase.config.attention
        self.keeper = KeepBest(phase.parameters, lambda: self.judge(trainer.base, data, data.tokens, terms),
                               self.config.every_steps, self.config.patience)  # fmt: skip
        if self._saved is not None:
            self.keeper.load_state(self._saved)
        if phase.steps_done == 0:
            self.keeper.after(0, False)
            return False
        return self.keeper.has_stopped_improving()

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        return self.keeper is not None and self.keeper.after(phase.steps_done, phase.is_last_step)

    def on_phase_end(self, trainer: Trainer, phase: PhaseRun) -> None:
        if self.keeper:
            trainer.state.kept = {"phase": phase.name, **self.keeper.restore()}

    def state(self) -> dict[str, Any] | None:
        return self.keeper.state() if self.keeper else None

    def load_state(self, state: dict[str, Any]) -> None:
        self._saved = state


class AverageWeights(Callback):
    """Ends phase 2 with the mean of its last steps' weights, as `LoraPhase.averaged_share` says."""

    def __init__(self) -> None:
        self.mean: MeanWeights | None = None
        self._saved: dict[str, Any] | None = None

    def on_phase_start(self, trainer: Trainer, phase: PhaseRun) -> bool:
        self.mean = MeanWeights(phase.parameters) if isinstance(phase.config, LoraPhase) else None
        if self.mean is not None and self._saved is not None:
            self.mean.load_state(self._saved)
        return False

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        if self.mean is not None and isinstance(phase.config, LoraPhase):
            steps_left = phase.config.train_steps - phase.steps_done
            if steps_left < phase.config.averaged_share * phase.config.train_steps:
                self.mean.add()
        return False

    def on_phase_end(self, trainer: Trainer, phase: PhaseRun) -> None:
        if self.mean is not None:
            self.mean.apply()

    def state(self) -> dict[str, Any] | None:
        return self.mean.state() if self.mean else None

    def load_state(self, state: dict[str, Any]) -> None:
        self._saved = state


class SaveCheckpoints(Callback):
    """Writes the state every so many steps, and at the end of a phase or of an interrupted run. Comes after those that decide on
    weights, whose own states it holds."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        if self.checkpoints.due(phase.steps_done, phase.stop_asked or phase.is_last_step):
            trainer.check_finite({"weight": max(float(p.detach().abs().max()) for p in phase.parameters)}, phase)
            states = {type(callback).__name__: callback.state() for callback in trainer.callbacks}
            kept = {name: state for name, state in states.items() if state is not None}
            saved = capture(trainer.state, phase, trainer.stepper.scaler, kept)
            where = place(phase.name, phase.steps_done, phase.config.train_steps)
            self.checkpoints.save(saved, where)
            trainer.state.last_saved = where
        return False


class Snapshots(Callback):
    """Where the assets' tokens look, at thirds of each phase and at its end."""

    def on_phase_start(self, trainer: Trainer, phase: PhaseRun) -> bool:
        self.shown = snapshot_steps(phase.config.train_steps, first_phase=not trainer.state.snapshots)
        return False

    def on_step_start(self, trainer: Trainer, phase: PhaseRun) -> None:
        if phase.steps_done in self.shown:
            self._keep(trainer, phase)

    def on_phase_end(self, trainer: Trainer, phase: PhaseRun) -> None:
        self._keep(trainer, phase)

    def _keep(self, trainer: Trainer, phase: PhaseRun) -> None:
        maps = snapshot_maps(trainer.base, trainer.data, trainer.data.tokens, phase.config.attention)
        trainer.state.snapshots.append((f"{phase.name} {phase.steps_done}", maps))


def snapshot_steps(train_steps: int, first_phase: bool) -> set[int]:
    """The steps before which attention maps are kept, beside those after the last: thirds of a phase, each once. A later phase
    starts where the one before it ended, which is shown already."""
    steps = {k * train_steps // 3 for k in range(3)}
    return steps if first_phase else steps - {0}
