"""The mean of the weights over the last steps of a phase, in place of those after the last one alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn


class MeanWeights:
    """Stochastic weight averaging (Izmailov et al., arXiv 1803.05407, section 3), with steps in place of epochs. The mean is held
    in the CPU's memory. PyTorch's own `AveragedModel` wants a module, not parameters of several."""

    def __init__(self, parameters: Sequence[torch.Tensor]):
        self.parameters = list(parameters)
        self.steps = 0
        self._means: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        """Takes in the parameters as they are."""
        now = [p.detach().to("cpu", torch.float32) for p in self.parameters]
        if not self.steps:
            self._means = [value.clone() for value in now]
        else:  # m + (x - m) / n: what does not change stays the same to the bit
            get_swa_multi_avg_fn()(self._means, now, self.steps)
        self.steps += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Gives the parameters their means, if anything was taken in."""
        if self.steps:
            for parameter, mean in zip(self.parameters, self._means, strict=True):
                parameter.copy_(mean)

    def state(self) -> dict[str, Any]:
        """What a run that is resumed needs to go on as if nothing had happened."""
        return {"steps": self.steps, "means": self._means}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps, self._means = int(state["steps"]), list(state["means"])
