"""Optimizers, learning rate schedules, and the step: in fp16 with scaled gradients, else as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_with_hard_restarts_schedule_with_warmup

from ..config import EmbeddingPhase, LearnConfig, LoraPhase
from ..io.console import say
from ..model.quantize import why_no_8bit_adam


class Stepper:
    """The same object for a whole run: a gradient scaler finds its scale over many steps.

    Belongs to one run and leaves nothing in the process, so runs of different precisions may follow one another.
    """

    def __init__(self, device: torch.device, mixed_precision: str = "no", scaler: torch.amp.GradScaler | None = None):
        """`mixed_precision`: 'no', 'fp16' or 'bf16'; only fp16's gradients are too small for their type and need scaling."""
        needed = mixed_precision == "fp16" and device.type in ("cuda", "cpu")
        self.scaler = scaler or (torch.amp.GradScaler(device.type) if needed else None)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of `loss`, scaled if they need it."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self, optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor], max_grad_norm: float) -> torch.Tensor:
        """Clips all gradients together, at their own scale, to `max_grad_norm`. Returns their norm before that, ()."""
        if self.scaler is not None:
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


def make_optimizer(groups: list[dict[str, Any]], config: LearnConfig, use_8bit: bool) -> torch.optim.Optimizer:
    """8-bit AdamW by bitsandbytes where it runs; torch's AdamW otherwise, which learns the same with larger states."""
    options: dict[str, Any] = {"betas": config.adam_betas, "weight_decay": config.weight_decay}
    if not use_8bit:
        return torch.optim.AdamW(groups, **options)
    devices = {p.device.type for group in groups for p in group["params"]}
    reason = why_no_8bit_adam(devices)
    if reason is None:
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
        return optimizer
    message = f"note: no 8-bit Adam: {reason}; using PyTorch's AdamW, whose states take 8 bytes a weight instead of 2"
    say(message)
    return torch.optim.AdamW(groups, **options)


def make_lr_schedule(optimizer: Any, phase: EmbeddingPhase | LoraPhase) -> Any:
    """Phase 1: warm-up and cosine with restarts. Phase 2: constant."""
    if isinstance(phase, EmbeddingPhase) and phase.cosine_restarts:
        return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, phase.warmup_steps, phase.train_steps, 1)
    return get_constant_schedule_with_warmup(optimizer, getattr(phase, "warmup_steps", 0))
