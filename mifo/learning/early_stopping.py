"""Keeping the best checkpoint of a learning phase, and stopping it early, by a score that the caller measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

#: -> {"score": larger is better, and whatever else shall be kept beside it}
Judge = Callable[[], dict[str, float]]


class KeepBest:
    """Judges the parameters every so many steps; `restore` puts the best back. A tie goes to the earlier checkpoint."""

    def __init__(self, parameters: Sequence[torch.Tensor], judge: Judge, every_steps: int, patience: int):
        self.parameters, self.judge = list(parameters), judge
        self.every_steps, self.patience = max(1, every_steps), patience
        self.checks: list[dict[str, Any]] = []
        self._best: list[torch.Tensor] = []
        self._best_check = -1

    def after(self, steps_done: int, is_last: bool) -> bool:
        """Call with 0 before the first step and after every step. True: the scores have stopped improving, so stop."""
        if steps_done % self.every_steps and not is_last:
            return False
        found = self.judge()
        self.checks.append({"step": steps_done, **{k: round(v, 4) for k, v in found.items()}})
        if self._best_check < 0 or self.checks[-1]["score"] > self.checks[self._best_check]["score"]:
            self._best_check = len(self.checks) - 1
            self._best = [p.detach().clone() for p in self.parameters]
        return self.has_stopped_improving()

    def has_stopped_improving(self) -> bool:
        """True when `patience` checks in a row have brought nothing better; also of a state that was loaded."""
        return bool(self.checks) and len(self.checks) - 1 - self._best_check >= self.patience

    def state(self) -> dict[str, Any]:
        """What a run that is resumed needs to go on as if nothing had happened."""
        return {"checks": self.checks, "best": self._best, "best_check": self._best_check}

    def load_state(self, state: dict[str, Any]) -> None:
        self.checks, self._best, self._best_check = list(state["checks"]), list(state["best"]), state["best_check"]

    @torch.no_grad()
    def restore(self) -> dict[str, Any]:
        """Puts the best checkpoint's values back; returns which it was and all scores."""
        for parameter, best in zip(self.parameters, self._best, strict=True):
            parameter.copy_(best)
        self._best = []
        return {"step": self.checks[self._best_check]["step"], "checks": self.checks}
