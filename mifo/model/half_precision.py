"""Adapters in fp32 on a base in half precision, without autocast.

Autocast would run norms in fp32 and keep fp32 copies for the backward pass: nearly twice the activations. Here the frozen
layers run in their own dtype and only an adapter's weight is cast, to its input's dtype; gradients and optimizer states stay
fp32, so that a gradient scaler can unscale them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn


class _FollowingLinear(nn.Linear):
    """(..., in) -> (..., out) in the input's dtype, whatever the weight's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))  # LoRA's matrices have no bias


class _FollowingConv2d(nn.Conv2d):
    """(B, in, h, w) -> (B, out, h', w'), likewise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._conv_forward(input, self.weight.to(input.dtype), None)
        return found


def follow_input_dtype(model: nn.Module) -> None:
    """Every LoRA layer in `model` computes in its input's dtype. On an fp32 base nothing changes, to the bit."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            matrices: list[Any] = [*layer.lora_A.values(), *layer.lora_B.values()]
            for matrix in matrices:
                # the parameters and their names stay as they are
                matrix.__class__ = _FollowingConv2d if isinstance(matrix, nn.Conv2d) else _FollowingLinear
