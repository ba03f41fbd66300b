"""Refined subject masks: clusters of self-attention, given to the subject that covers them (Bounded Attention, 4.3).

Knows maps and masks. Knows nothing of models or steps.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from scipy.cluster.vq import kmeans2


def cluster_pixels(self_attention: torch.Tensor, clusters: int, seed: int = 0) -> torch.Tensor:
    """(h*w, h*w) mean self-attention map -> (h*w,) cluster index. Pixels that look at the same places belong together."""
    rows = self_attention.detach().float().cpu().numpy().astype(np.float64)
    clusters = min(clusters, len(np.unique(rows, axis=0)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty", UserWarning)  # one fewer, then
        _, labels = kmeans2(rows, clusters, minit="++", iter=20, rng=np.random.default_rng(seed))
    return torch.from_numpy(labels).long()


def subject_cover(cross_attention: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """One token's map and its present mask, both (h*w,) -> soft membership in [0, 1], 0 outside the mask.

    The map is min-max normalized inside the mask, then sharpened by sigmoid(10 (x - 0.2)).
    """
    inside = cross_attention.float()[present]
    cover = torch.zeros(present.shape, dtype=torch.float32, device=present.device)
    if len(inside) == 0:
        return cover
    spread = (inside - inside.min()) / (inside.max() - inside.min()).clamp(min=1e-8)
    sharp = torch.sigmoid(10 * (spread - 0.2))
    low, high = torch.sigmoid(torch.tensor([-2.0, 8.0])).tolist()  # the sigmoid's own ends, at 0 and 1
    cover[present] = (sharp - low) / (high - low)
    return cover


def assign_clusters(labels: torch.Tensor, covers: torch.Tensor, min_cover: float = 0.2) -> torch.Tensor:
    """Labels (h*w,), covers (subjects, h*w) -> (subjects, h*w) bool: each cluster to whoever covers most of it.

    A cluster that nobody covers by `min_cover` is background. A subject left with nothing comes back all False.
    """
    masks = torch.zeros_like(covers, dtype=torch.bool)
    for label in labels.unique():
        pixels = labels == label
        share = covers[:, pixels].mean(1)
        best = int(share.argmax())
        if share[best] >= min_cover:
            masks[best] |= pixels
    return masks


def refine_masks(self_attention: torch.Tensor, cross_attention: torch.Tensor, present: torch.Tensor,
                 clusters_per_box: int = 3, min_cover: float = 0.2) -> torch.Tensor:  # fmt: skip
    """(h*w, h*w) self map, (subjects, h*w) token maps, (subjects, h*w) bool masks -> new masks. Nobody is left empty."""
    labels = cluster_pixels(self_attention, clusters_per_box * len(present)).to(present.device)
    covers = torch.stack([subject_cover(a, m) for a, m in zip(cross_attention, present, strict=True)])
    refined = assign_clusters(labels, covers, min_cover)
    empty = ~refined.any(1)
    refined[empty] = present[empty]
    return refined
