"""Backward pass, clipping and the optimizer's step: in fp16 with scaled gradients, else as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Stepper:
    """The same object for a whole run: a gradient scaler finds its scale over many steps.

    Belongs to one run and leaves nothing in the process, so runs of different precisions may follow one another.
    """

    def __init__(self, device: torch.device, mixed_precision: str = "no", scaler: torch.amp.GradScaler | None = None):
        """`mixed_precision`: 'no', 'fp16' or 'bf16'; only fp16's gradients are too small for their type and need scaling."""
        needed = mixed_precision == "fp16" and device.type in ("cuda", "cpu")
        self.scaler = scaler or (torch.amp.GradScaler(device.type) if needed else None)

    def backward(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor],
                 max_grad_norm: float) -> torch.Tensor:  # fmt: skip
        """Gradients of `loss`, clipped together to `max_grad_norm`. Returns their norm before that, ()."""
        if self.scaler is None:
            loss.backward()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """The optimizer's step. False where a gradient had overflowed: the scaler then leaves the weights as they are, and makes
        its scale smaller."""
        if self.scaler is None:
            optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before
