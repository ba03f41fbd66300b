"""Which kernel computes attention where no map is asked for: xformers, PyTorch's fused attention (SDPA), or plain matrices.

Chosen once per job, with the reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..errors import InputError
from .sites import Kernel, Processor, attention_probabilities, sdpa, use_processors

BACKENDS = ("auto", "sdpa", "xformers", "materialized")


@dataclass(frozen=True)
class Backend:
    """What was chosen, and why."""

    name: str
    reason: str


def materialized(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None,
                 scale: float) -> torch.Tensor:  # fmt: skip
    """As `sdpa`, through the whole map in fp32: slow and large, for comparison."""
    return attention_probabilities(query, key, scale, visible).to(value.dtype) @ value


def xformers(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None,
             scale: float) -> torch.Tensor:  # fmt: skip
    """As `sdpa`. xformers wants (B, Q, heads, D), and a mask as numbers to add whose rows start at multiples of 8."""
    from xformers import ops

    bias = None if visible is None else _aligned_bias(visible, query, key.shape[2])
    parts = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
    return ops.memory_efficient_attention(*parts, attn_bias=bias, scale=scale).transpose(1, 2)  # type: ignore[no-any-return]


def _aligned_bias(visible: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    """Boolean mask -> (B, heads, Q, keys) of 0 and -inf, a view of a tensor whose rows are padded to multiples of 8."""
    batch, heads, queries = query.shape[:3]
    padded = query.new_zeros((visible.shape[0], 1, queries, -(-keys // 8) * 8))
    bias = padded[..., :keys]
    bias.masked_fill_(~visible, float("-inf"))
    return bias.expand(batch, heads, -1, -1)


_KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "xformers": xformers, "materialized": materialized}


def choose_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """'auto' takes SDPA, or xformers where it is installed, works on this device and is a tenth faster: both are timed, some
    milliseconds each, on a map as Stable Diffusion's largest.

    Raises InputError for an unknown name, and for xformers asked for by name where it does not work.
    """
    if name not in BACKENDS:
        raise InputError(f"the attention backend '{name}' is not known; choose one of {', '.join(BACKENDS)}")
    if name in ("sdpa", "materialized"):
        return Backend(name, "asked for")
    problem = _why_no_xformers(device, dtype)
    if name == "xformers":
        if problem is not None:
            raise InputError(f"--attention-backend xformers cannot be used: {problem}; use auto or sdpa")
        return Backend(name, "asked for")
    if problem is not None:
        return Backend("sdpa", problem)
    seconds = {each: kernel_seconds(_KERNELS[each], device, dtype) for each in ("sdpa", "xformers")}
    shown = ", ".join(f"{each} {1000 * taken:.2f} ms" for each, taken in seconds.items())
    chosen = "xformers" if seconds["xformers"] < 0.9 * seconds["sdpa"] else "sdpa"  # so that noise does not choose
    return Backend(chosen, f"measured on {device} in {dtype}: {shown}")


def kernel_seconds(kernel: Kernel, device: torch.device | str, dtype: torch.dtype, repeats: int = 5) -> float:
    """The median of `repeats` masked attentions with their gradient, after one to warm up."""
    side, heads, width = (64, 8, 64) if torch.device(device).type == "cuda" else (16, 2, 32)
    query, key, value = (torch.ones((2, heads, side * side, width), device=device, dtype=dtype, requires_grad=True)
                         for _ in range(3))  # fmt: skip
    visible = torch.ones((1, 1, side * side, side * side), dtype=torch.bool, device=device).tril()
    taken = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        torch.autograd.grad(kernel(query, key, value, visible, 0.1).sum(), (query, key, value))
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _why_no_xformers(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """None when a small masked attention and its gradient agree with SDPA's, else the reason in words."""
    shape = (1, 2, 16, 40)
    query, key, value = (torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(device, dtype).requires_grad_()
                         for k in range(3))  # fmt: skip
    visible = torch.ones((1, 1, 16, 16), dtype=torch.bool, device=device).tril()
    try:
        found = xformers(query, key, value, visible, 0.1)
        (gradient,) = torch.autograd.grad(found.float().sum(), key)
    except ImportError:
        return "xformers is not installed"
    except Exception as error:  # xformers raises many kinds for a device or a dtype without a kernel
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return f"xformers does not work on {device} in {dtype} ({reason})"
    expected = sdpa(query, key, value, visible, 0.1)
    near = torch.allclose(found.float(), expected.float(), atol=2e-2) and bool(torch.isfinite(gradient).all())
    return None if near else f"xformers' result on {device} in {dtype} is wrong"


@contextmanager
def use_backend(unet: UNet2DConditionModel, backend: Backend) -> Iterator[None]:
    """Within the block every attention layer that materializes no map for its own sake runs on `backend`."""
    processors: dict[str, Any] = {name: Processor(_KERNELS[backend.name]) for name in unet.attn_processors}
    with use_processors(unet, processors):
        yield
