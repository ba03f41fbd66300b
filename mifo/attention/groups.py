"""Bounded self-attention without a mask: pixels that see the same keys are one group, and one fused product a group is enough.

A mask over a map of N pixels has N x N entries, which kernels convert to floats at every layer; groups need none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from .sites import Kernel, sdpa


@dataclass(frozen=True)
class Group:
    """Pixels that see the same."""

    queries: torch.Tensor
    """(n,) indices into a flattened map"""
    keys: torch.Tensor | None
    """(k,) indices of what they see; None: all pixels"""


@dataclass(frozen=True)
class Groups:
    """Every pixel of a map is a query of exactly one group."""

    groups: tuple[Group, ...]
    pixels: int

    @cached_property
    def order(self) -> torch.Tensor:
        """(pixels,): where each pixel stands when the groups' queries stand one behind another."""
        return torch.cat([g.queries for g in self.groups]).argsort()

    def to(self, device: torch.device | str) -> Groups:
        moved = (Group(g.queries.to(device), None if g.keys is None else g.keys.to(device)) for g in self.groups)
        return Groups(tuple(moved), self.pixels)

    def saves_memory(self, elements: int, with_gradient: bool) -> bool:
        """Whether what is gathered takes less memory than a mask does, which kernels convert to floats;
        `elements` are those of one pixel of the query, (B * heads * D).

        With a gradient every group's keys and values are kept for it, without one a group's at a time. Large maps pay.
        """
        gathered = [len(g.keys) for g in self.groups if g.keys is not None] or [0]
        keys = sum(gathered) if with_gradient else max(gathered)
        return 2 * (keys + self.pixels) * elements < self.pixels**2  # keys and values; queries and outputs


def group_pixels(subjects: npt.NDArray[np.bool_]) -> Groups:
    """Masks (subjects, h*w) -> groups on the CPU. A subject's pixels see all its pixels and the background, a pixel of
    several subjects what each of them sees, the background everything (Bounded Attention, arXiv 2403.16990, section 4.1)."""
    background = ~subjects.any(0)
    patterns, which = np.unique(subjects, axis=1, return_inverse=True)
    groups = []
    for index, pattern in enumerate(patterns.T):
        sees = background | subjects[pattern].any(0)
        keys = None if sees.all() or not pattern.any() else torch.from_numpy(np.flatnonzero(sees))
        groups.append(Group(torch.from_numpy(np.flatnonzero(which.ravel() == index)), keys))
    return Groups(tuple(groups), subjects.shape[1])


def attention_in_groups(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Sequence[Groups],
                        scale: float, kernel: Kernel = sdpa) -> torch.Tensor:  # fmt: skip
    """(B, heads, N, D) three times -> (B, heads, N, D): what a mask would give, up to rounding.

    One `Groups` for all rows, or one for each of I pictures; row b is then of picture b % I.
    """
    images = len(groups)
    if images == 1:
        return _one_image(query, key, value, groups[0], scale, kernel)
    outputs = [_one_image(query[k::images], key[k::images], value[k::images], g, scale, kernel) for k, g in enumerate(groups)]
    return torch.stack(outputs, 1).flatten(0, 1)


def _one_image(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Groups, scale: float,
                 kernel: Kernel) -> torch.Tensor:  # fmt: skip
    """Rows that all have the same groups: shapes as in `attention_in_groups`."""
    parts = []
    for group in groups.groups:
        own_key, own_value = (x if group.keys is None else x.index_select(2, group.keys) for x in (key, value))
        part = kernel(query.index_select(2, group.queries), own_key, own_value, None, scale)
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, 1).index_select(1, groups.order).transpose(1, 2)  # so that joining the heads copies nothing
