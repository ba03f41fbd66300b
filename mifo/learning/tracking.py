"""What a training run reports to TensorBoard or Weights & Biases, through accelerate's trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import to_dict
from ..data.instance import Instance
from ..errors import InputError
from .report import attention_shares, draw_attention_sheet
from .state import PhaseRun
from .trainer import Callback, Trainer

TRACKERS = ("tensorboard", "wandb")


class Tracker(Callback):
    """Each step's losses and learning rates; at the end of each phase every asset's share of attention inside its mask, and the
    attention sheet. Steps count on from phase to phase."""

    def __init__(self, kind: str, name: str, folder: Path, instance: Instance):
        """`name`: of the run; `folder`: where its files go. Raises InputError where the tracker is not installed."""
        if kind not in TRACKERS:
            raise InputError(f"--log-with is {kind[:50]!r}; choose {' or '.join(TRACKERS)}")
        self.kind, self.name, self.folder, self.instance = kind, name, folder, instance
        self._tracker = make_tracker(kind, name, folder)
        self._before = 0
        self._told = False

    def on_phase_start(self, trainer: Trainer, phase: PhaseRun) -> bool:
        if not self._told:
            self._tracker.store_init_configuration(flat(to_dict(trainer.config)))
            self._told = True
        self._before = trainer.config.embedding.train_steps if phase.name == "lora" else 0
        return False

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        rates = {f"{phase.name}/learning_rate_{k}": rate for k, rate in enumerate(phase.scheduler.get_last_lr())}
        losses = {f"{phase.name}/{name}": value for name, value in phase.losses.items()}
        self._tracker.log({**losses, **rates}, step=self._before + phase.steps_done)
        return False

    def on_phase_end(self, trainer: Trainer, phase: PhaseRun) -> None:
        step, tokens = self._before + phase.steps_done, trainer.data.tokens
        shares = attention_shares(trainer.base, trainer.data, tokens, phase.config.attention)
        self._tracker.log({f"attention/{t.strip('<>')}": share for t, share in zip(tokens, shares, strict=True)}, step=step)
        if trainer.state.snapshots:
            self.log_image("attention", draw_attention_sheet(trainer.state.snapshots, self.instance, tokens), step)

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        if self.kind == "wandb":
            self._tracker.log_images({name: [image]}, step=step)
        else:
            self._tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")

    def finish(self) -> None:
        self._tracker.finish()


def make_tracker(kind: str, name: str, folder: Path) -> Any:
    """One of accelerate's. Raises InputError where what it writes with is not installed."""
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    if not (is_tensorboard_available() if kind == "tensorboard" else is_wandb_available()):
        raise InputError(f"--log-with {kind} needs {kind}; pip install {kind} adds it")
    PartialState()  # accelerate's trackers ask it which process they are in
    if kind == "tensorboard":
        made = TensorBoardTracker(name, logging_dir=folder)
    else:
        made = WandBTracker("mifo", name=name, dir=str(folder))
    if hasattr(made, "start"):
        made.start()
    return made


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings as TensorBoard takes them: "lora.rank" and so on, numbers and text."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return found
