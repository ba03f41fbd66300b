"""Refined subject masks: clusters of self-attention, given to the subject that covers them (Bounded Attention, 4.3)."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from scipy.cluster.vq import kmeans2

STARTS = 50
"""Of k-means++ where nothing is known of the clusters: one start alone finds another clustering with every seed."""
ITERATIONS = 50
COMPONENTS = 8
"""In which pixels are clustered: most of what is left out is noise, and with it go most of the poor clusterings."""
COVERED = 0.5  # of the sharpened map: from here on a pixel counts as the token's


class MeanMap:
    """The mean over all maps so far, each divided by its own maximum: one step's map alone is noise, and a sharp one outweighs
    many flat ones."""

    def __init__(self) -> None:
        self.sum: torch.Tensor | None = None
        self.count = 0

    def add(self, maps: torch.Tensor) -> None:
        """(..., h*w, h*w)"""
        maps = maps.detach().float()
        maps = maps / maps.amax((-2, -1), keepdim=True).clamp(min=1e-8)
        self.sum = maps if self.sum is None else self.sum + maps
        self.count += 1

    @property
    def mean(self) -> torch.Tensor:
        """(..., h*w, h*w). Raises ValueError before the first map."""
        if self.sum is None:
            raise ValueError("there is no map yet")
        return self.sum / self.count


def cluster_pixels(self_attention: torch.Tensor, clusters: int, seed: int = 0,
                   before: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """(h*w, h*w) self-attention map -> (h*w,) cluster index. Pixels that look at the same places belong together.

    k-means of the map's rows in their first principal components, from the clusters of `before`, those of an earlier and similar
    map, or else from k-means++ with several starts, of which the one with the smallest distances is taken.
    """
    rows = self_attention.detach().float().cpu().numpy().astype(np.float64)
    clusters = min(clusters, len(np.unique(rows, axis=0)))
    points = principal_components(rows, COMPONENTS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "One of the clusters is empty", UserWarning)  # one fewer, then
        if before is not None:
            known = before.cpu().numpy()
            centers = np.stack([points[known == label].mean(0) for label in np.unique(known)])
            return torch.from_numpy(kmeans2(points, centers, minit="matrix", iter=ITERATIONS)[1]).long()
        rng = np.random.default_rng(seed)
        starts = [kmeans2(points, clusters, minit="++", iter=ITERATIONS, rng=rng) for _ in range(STARTS)]
    distances = [float(np.square(points - centers[labels]).sum()) for centers, labels in starts]
    return torch.from_numpy(starts[int(np.argmin(distances))][1]).long()


def principal_components(rows: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """(n, d) -> (n, at most `count`): the rows seen along the directions in which they differ most."""
    centered = rows - rows.mean(0)
    last = centered.shape[1] - 1
    _, directions = scipy.linalg.eigh(centered.T @ centered, subset_by_index=[max(0, last + 1 - count), last])
    points: npt.NDArray[np.float64] = centered @ directions
    return points


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

    How much a subject covers: the pixels that both have, of the smaller of the two. By the cluster's size alone a subject would
    lose a cluster that is larger than itself, and with it all it has. A cluster that nobody covers by `min_cover` is background.
    A subject left with nothing comes back all False.
    """
    masks = torch.zeros_like(covers, dtype=torch.bool)
    owned = covers >= COVERED
    for label in labels.unique():
        pixels = labels == label
        smaller = owned.sum(1).clamp(max=int(pixels.sum()), min=1)
        share = (owned & pixels).sum(1) / smaller
        best = int(share.argmax())
        if share[best] >= min_cover:
            masks[best] |= pixels
    return masks


def refine_masks(labels: torch.Tensor, cross_attention: torch.Tensor, present: torch.Tensor,
                 min_cover: float = 0.2) -> torch.Tensor:  # fmt: skip
    """Clusters (h*w,), token maps (subjects, h*w), present masks (subjects, h*w) bool -> new masks. Nobody is left empty."""
    covers = torch.stack([subject_cover(a, m) for a, m in zip(cross_attention, present, strict=True)])
    refined = assign_clusters(labels.to(present.device), covers, min_cover)
    empty = ~refined.any(1)
    refined[empty] = present[empty]
    return refined
