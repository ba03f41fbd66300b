"""Pictures that are none: values that are not finite, or far beyond what a model draws, and who is to blame.

A black or grey picture says nothing; so every job looks at its latents and pixels before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..errors import InputError, NotFinite

LIMIT = 1e4
"""Latents and pixels are of unit scale, and weights below 100. Beyond this, layers normalize all but the largest value away."""
LEARNED = ("lora_", "vectors")  # in the names of what a bundle adds to the modules

Parts = Mapping[str, nn.Module]


def check_latents(latents: torch.Tensor, parts: Parts) -> None:
    """Raises InputError where the base model or what was learned is at fault, else NotFinite, unless `latents` may be a
    picture's."""
    if not _is_sane(latents):
        raise blame("the drawn latents", latents.detach(), parts)


def check_pixels(pixels: torch.Tensor, parts: Parts) -> None:
    """The same for what the decoder returns, before it is cut to what a picture can show."""
    if not _is_sane(pixels):
        raise blame("the drawn pixels", pixels.detach(), parts)


def blame(what: str, values: torch.Tensor, parts: Parts) -> Exception:
    """The error for `values` that are not finite: what is wrong, and what to do.

    parts: name -> module of the base model, with whatever a bundle adds to it.
    """
    largest = float(values.abs().max()) if bool(torch.isfinite(values).all()) else None
    seen = f"{what} {'are not finite' if largest is None else f'reach {largest:.1e}'}, so there is no picture"
    if broken := broken_weights(parts):
        return InputError(f"{seen}: {broken}")
    if torch.float16 in {weight.dtype for module in parts.values() for weight in module.parameters()}:
        return NotFinite(f"{seen}: numbers in fp16 end at 65504; use --mixed-precision bf16 or no")
    learned = any(any(word in name for word in LEARNED) for m in parts.values() for name, _ in m.named_parameters())
    if learned:
        return InputError(f"{seen}: what was learned is too strong; lower --lora-scale or --guidance-scale, or learn it again "
                          "with a lower learning rate")  # fmt: skip
    return NotFinite(f"{seen}; lower --guidance-scale, or give another --model-path")


def broken_weights(parts: Parts) -> str | None:
    """Which of the base model's own weights make every result useless, and what to do; None where they are sane."""
    for part, module in parts.items():
        for name, weight in module.named_parameters():
            own = weight.is_floating_point() and not any(word in name for word in LEARNED)
            if own and not _is_sane(weight):
                return (f"the base model's {part} has weights that are not finite, or larger than {LIMIT:g}, such as {name}; "
                        "fetch or copy the base model again")  # fmt: skip
    return None


def _is_sane(values: torch.Tensor) -> bool:
    return bool((values.detach().abs() <= LIMIT).all())  # NaN is not
