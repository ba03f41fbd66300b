"""Where a model runs, and in which precision."""

from __future__ import annotations

import torch

from ..errors import InputError
from ..io.processes import local_index, process_count

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision_name(dtype: torch.dtype) -> str:
    """The word of a base's dtype, by which learning knows whether gradients need scaling."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def choose_device(name: str = "") -> str:
    """`name`, or for an empty one a GPU where there is one: of a launcher's processes, each has its own.

    Raises InputError for a device that cannot be used here."""
    if not name and process_count() > 1 and torch.cuda.is_available():
        return f"cuda:{local_index()}"
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()  # "meta" makes tensors, but they have no values
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the device '{name[:50]}' cannot be used here ({reason[:200]}); try --device cpu") from None
    return name


def choose_dtype(precision: str, device: str) -> torch.dtype:
    """The frozen base's dtype. `precision`: 'no', 'fp16', 'bf16', or 'auto': bf16 or fp16 on a GPU, fp32 elsewhere.

    Raises InputError for another word, and for fp16 without a GPU.
    """
    if precision not in (*DTYPES, "auto"):
        raise InputError(f"the precision is {precision[:50]!r}; choose auto, {', '.join(DTYPES)}")
    if precision == "fp16" and not device.startswith("cuda"):
        raise InputError(f"--mixed-precision fp16 needs a GPU, but the device is {device}; use no or bf16")
    if precision != "auto":
        return DTYPES[precision]
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
