"""Where the learned tokens look in the picture they were learned from: outside their masks, and inside the others'.

The maps are the ones that the learning losses supervise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..config import AttentionTerms
from ..learning.dataset import InstanceData
from ..learning.report import snapshot_maps
from ..model.base import BaseModel


def leakage_shares(maps: torch.Tensor, masks: torch.Tensor) -> tuple[list[float], list[float]]:
    """Attention maps (N, h, w) and masks (N, h, w) in [0, 1] -> per asset, the share of its map's mass outside its own mask,
    and inside the other assets' masks (their union, without what its own mask covers too)."""
    outside, in_others = [], []
    for index, (attention, mask) in enumerate(zip(maps, masks, strict=True)):
        mass = attention.sum().clamp(min=1e-8)
        outside.append(float((attention * (1 - mask)).sum() / mass))
        rest = [m for j, m in enumerate(masks) if j != index]
        others = torch.stack(rest).amax(0) if rest else torch.zeros_like(mask)
        in_others.append(float((attention * others * (1 - mask)).sum() / mass))
    return outside, in_others


def attention_leakage(base: BaseModel, data: InstanceData, tokens: Sequence[str],
                      terms: AttentionTerms) -> tuple[list[float], list[float]]:  # fmt: skip
    """`leakage_shares` of the supervised sites' maps, averaged over the probe timesteps, all below 500 of 1000."""
    maps = snapshot_maps(base, data, tokens, terms)  # (N, h, w)
    masks = F.interpolate(data.masks[False], maps.shape[-2:], mode="area")[:, 0]
    return leakage_shares(maps.float(), masks.float())
