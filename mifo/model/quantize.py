"""What bitsandbytes does here: the UNet's linear layers in 4 bits (NF4, Dettmers et al. 2023), and 8-bit Adam."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import InputError

NF4_BLOCK = 64
"""Weights that share one fp32 scale."""
NF4_BYTES = 0.5 + 4 / NF4_BLOCK
"""Bytes a weight."""


def quantizable(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of attention blocks by name: more than half of Stable Diffusion's weights, and LoRA's place."""
    return {n: m for n, m in model.named_modules() if ".attentions." in n and type(m) is nn.Linear}


def quantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Replaces those layers by NF4 ones in place; they are quantized when the model moves to its device.

    Computes in `dtype`. Raises InputError where bitsandbytes cannot be used.
    """
    bnb = _bitsandbytes()
    if isinstance(bnb, str):
        raise InputError(f"NF4 weights need bitsandbytes, but {bnb}; install it, or raise --vram-gib")
    for name, linear in quantizable(model).items():
        small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype,
                                  compress_statistics=False, quant_type="nf4", device="meta")  # fmt: skip
        small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, compress_statistics=False,
                                         blocksize=NF4_BLOCK, quant_type="nf4", module=small)  # fmt: skip
        small.bias = linear.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, small)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # PEFT asks for it before it wraps a 4-bit layer


@functools.cache
def _bitsandbytes():  # type: ignore[no-untyped-def]
    """The module, or why there is none."""
    try:
        import bitsandbytes

        return bitsandbytes
    except (ImportError, RuntimeError, OSError) as error:
        return f"it does not load here ({(str(error).strip() or type(error).__name__).splitlines()[0][:150]})"


def why_no_8bit_adam(devices: Iterable[str]) -> str | None:
    """None where bitsandbytes' AdamW8bit makes a step on these kinds of device, else the reason in words."""
    kinds = set(devices)
    if len(kinds) > 1:
        return "the text encoder's weights are on the CPU"
    bnb = _bitsandbytes()
    return f"bitsandbytes: {bnb}" if isinstance(bnb, str) else _trial_step(kinds.pop())


@functools.cache
def _trial_step(device: str) -> str | None:
    """One step on a weight large enough to be kept in 8 bits; platforms differ in what they built."""
    weight = nn.Parameter(torch.ones(64, 128, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        _bitsandbytes().optim.AdamW8bit([weight], lr=1e-3).step()
    except Exception as error:  # bitsandbytes raises many kinds for a missing kernel
        return f"bitsandbytes cannot step on this {device} ({(str(error).strip() or type(error).__name__).splitlines()[0][:150]})"
    return None if bool(torch.isfinite(weight).all()) and bool((weight != 1).all()) else "bitsandbytes left the weight as it was"
