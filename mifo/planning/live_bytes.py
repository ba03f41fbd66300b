"""Counts the bytes of tensors that are alive while code runs, at its peak and by what they are for.

On the meta device nothing is computed and no memory is used: a whole training step of a large model is counted in seconds.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512  # bytes; CUDA's allocator rounds up to them


@dataclass(frozen=True)
class Peak:
    """What was alive when most was."""

    total: int
    """Bytes beside the tensors that were there before."""
    by_tag: dict[str, int]


class LiveBytes(TorchDispatchMode):
    """Within its block, every new storage counts from its making to its end, under the `tag` that is set at its making.

    Storages are counted once however many views look at them. `known` are tensors from before that do not count.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), tag: str = "activations"):
        super().__init__()  # type: ignore[no-untyped-call]
        self.tag = tag
        self.live: Counter[str] = Counter()
        self.peak = Peak(0, {})
        self._storages: dict[int, tuple[str, int]] = {}
        for tensor in known:
            self.ignore(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return made

    def ignore(self, tensor: torch.Tensor) -> None:
        """It was there before and does not count."""
        self._note(tensor, 0)

    def _note(self, tensor: torch.Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK if size is None else size
        self._storages[key] = (self.tag, size)
        self.live[self.tag] += size
        weakref.finalize(storage, self._forget, key)
        total = sum(self.live.values())
        if total > self.peak.total:
            self.peak = Peak(total, {t: n for t, n in self.live.items() if n})

    def _forget(self, key: int) -> None:
        tag, size = self._storages.pop(key)
        self.live[tag] -= size

    def retag(self, tensor: torch.Tensor, tag: str) -> None:
        """From now on the tensor's storage counts under another tag."""
        key = tensor.untyped_storage()._cdata
        before, size = self._storages.get(key, (tag, 0))
        if key in self._storages:
            self._storages[key] = (tag, size)
            self.live[before] -= size
            self.live[tag] += size

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """Within the block, what is made counts under `tag`."""
        before, self.tag = self.tag, tag
        try:
            yield
        finally:
            self.tag = before


class _FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values, the output and one fp32 number per query; never a map."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty((batch, length, heads, value.shape[-1])).transpose(1, 2)  # so that joining the heads copies nothing
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp, *([] if bias is None else [bias]))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, _, logsumexp, *_ = ctx.saved_tensors
        _ = torch.empty_like(logsumexp)  # the sum of output times gradient, per query
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _fused_cost(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
                *_: Any, **__: Any) -> torch.Tensor:  # fmt: skip
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = attn_mask.to(query.dtype)  # kernels take numbers to add; PyTorch makes them from a boolean mask each call
    return _FusedAttention.apply(query, key, value, attn_mask)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def fused_attention_cost() -> Iterator[None]:
    """Within the block PyTorch's fused attention costs what a fused kernel costs, which the meta device does not have."""
    before = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _fused_cost
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before
