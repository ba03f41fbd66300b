"""The metrics as pure functions of arrays, each with its exact definition and source.

`L` is a leakage matrix: L[i, j] is the similarity of the crop that stands for asked asset i to instance j. `G` holds the
similarities that the source crops have among themselves (look-alikes start high). Boxes are xyxy, normalized to [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.stats import bootstrap

Array = npt.NDArray[np.float64]
BoxTuple = tuple[float, float, float, float]

MIN_GAP = 0.02  # two instances whose source crops are more alike than 1 - MIN_GAP cannot be told apart by this similarity
BOOTSTRAP_DRAWS = 2000

#: what evaluation.json says about each number, beside it
DEFINITIONS = {
    "identity": "similarity of the crop that stands for an asset to its own source crop; 0 where nothing stands for it",
    "raw_margin": "similarity to the own source crop minus the mean similarity to the other instances' crops",
    "identity_margin": "mean over the other instances j of (L[i,i] - L[i,j]) / (1 - G[i,j]), G the source crops' similarity "
                       "among themselves: 1 set apart as far as the source crops are, 0 as like the others as itself, -1 "
                       "swapped; how good the copy is, identity says",
    "right_instance": "the crop is more like its own instance than like any other (a tie of k counts 1/k); 0 where there is none",
    "confused": "the crop is more like another instance than like its own",
    "detect_and_compare": "1 - ||S - G||_2 over the asked instances, not below 0; 0 if the count is wrong (MuDI, "
                          "arXiv 2404.04243)",
    "collapse": "share of asked assets whose identity is below the threshold (subject collapse rate)",
    "iou": "IoU of each box with the detection matched to it (Hungarian, largest sum); a miss counts 0",
    "success_at_0.5": "share of boxes with IoU of at least 0.5",
    "count_right": "as many detections as assets were asked for",
    "prompt_fit": "fit of the picture to the prompt with the assets' words in place of their tokens",
    "drift": "distance of the bundle's pictures from the base model's on unrelated prompts with the same seeds",
    "attention_outside": "share of a token's attention outside its own mask, mean over probe timesteps below 500",
    "attention_in_others": "share of a token's attention inside the other assets' masks, same probes",
}  # fmt: skip


# --- identity -----------------------------------------------------------------------------------


def identity_margin(row: Array, own: int, among: Array) -> float | None:
    """Corrected margin of one crop: mean over j != own of (L[own] - L[j]) / (1 - G[own, j]).

    `row` (N,) similarities of the crop to every instance, `among` (N, N) = G. A perfect copy of instance `own` scores 1
    however alike the instances are, a blend of all 0, a perfect copy of the other -1. It tells instances apart, nothing else: a
    poor copy may score 1 too, if all that it has is what sets the instance apart, so read it beside the identity. None when no
    other instance can be told apart by this similarity (1 - G below MIN_GAP), or there is none.
    """
    gaps = 1 - among[own]
    others = [j for j in range(len(row)) if j != own and gaps[j] > MIN_GAP]
    return float(np.mean([(row[own] - row[j]) / gaps[j] for j in others])) if others else None


def raw_margin(row: Array, own: int) -> float | None:
    """L[own] minus the mean of the others; None for a single instance."""
    others = np.delete(row, own)
    return float(row[own] - others.mean()) if len(others) else None


def right_instance(row: Array, own: int) -> float:
    """1 if the crop is most like its own instance, 1/k where k instances tie for it, 0 else and where all similarities are 0."""
    best = row.max()
    ties = np.isclose(row, best)
    return float(1 / ties.sum()) if best > 0 and ties[own] else 0.0


def is_confused(row: Array, own: int) -> bool:
    """Another instance is strictly more like the crop than its own."""
    return bool(row.max() > row[own] and not np.isclose(row.max(), row[own]))


def detect_and_compare(similarities: Array, among: Array) -> float:
    """Detect-and-Compare (MuDI, arXiv 2404.04243): 1 - ||S - G||_2, 0 if the count is wrong, never below 0.

    `similarities` (detections, n) to the n asked instances, `among` (n, n) their source crops' own. The detections are put in
    the order that makes the sum of S[i, i] largest; the norm is over all entries (Frobenius).
    """
    if similarities.shape != among.shape:
        return 0.0
    order = linear_sum_assignment(similarities.T, maximize=True)[1]  # for each instance its detection
    return max(0.0, 1.0 - float(np.linalg.norm(similarities[order] - among)))


# --- layout -------------------------------------------------------------------------------------


def box_ious(a: Sequence[BoxTuple], b: Sequence[BoxTuple]) -> Array:
    """(len(a), len(b)) intersection over union."""
    left, right = np.reshape(np.array(a, float), (-1, 1, 4)), np.reshape(np.array(b, float), (1, -1, 4))
    sides = np.minimum(left[..., 2:], right[..., 2:]) - np.maximum(left[..., :2], right[..., :2])  # (A, B, 2)
    shared = sides.clip(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).clip(min=0).prod(-1) for box in (left, right)]
    ious: npt.NDArray[np.float64] = shared / np.maximum(areas[0] + areas[1] - shared, 1e-12)
    return ious


def match_boxes(boxes: Sequence[BoxTuple], detections: Sequence[BoxTuple]) -> list[tuple[int | None, float]]:
    """For each box (index of the detection matched to it, IoU): Hungarian, the largest sum of IoU; (None, 0) for a miss."""
    matched: list[tuple[int | None, float]] = [(None, 0.0)] * len(boxes)
    if boxes and detections:
        ious = box_ious(boxes, detections)
        for box, detection in zip(*linear_sum_assignment(ious, maximize=True), strict=True):
            if ious[box, detection] > 0:
                matched[box] = (int(detection), float(ious[box, detection]))
    return matched


# --- edits --------------------------------------------------------------------------------------


def edit_preservation(before: Image.Image, after: Image.Image, mask: Image.Image) -> dict[str, int]:
    """Outside the mask (grey below 128): the largest difference of any channel, 0 to 255, and how many pixels changed.

    All three pictures have one size. Raises ValueError otherwise.
    """
    if not before.size == after.size == mask.size:
        raise ValueError(f"sizes differ: {before.size}, {after.size}, {mask.size}")
    pixels = [np.asarray(image.convert("RGB")).astype(int) for image in (before, after)]
    outside = np.asarray(mask.convert("L")) < 128
    difference = np.abs(pixels[0] - pixels[1]).max(-1)[outside]
    largest = int(difference.max()) if difference.size else 0
    return {"largest_difference": largest, "changed_pixels": int((difference > 0).sum()), "outside_pixels": int(outside.sum())}


# --- intervals ----------------------------------------------------------------------------------


def _mean_of_all(sums: Array, counts: Array, axis: int = -1) -> Array:
    """Mean over all values of groups that have these sums and counts."""
    mean: Array = sums.sum(axis) / counts.sum(axis)
    return mean


def interval(groups: Mapping[Any, Sequence[float]]) -> dict[str, Any]:
    """Mean of all values and its 95 % percentile bootstrap interval, resampling whole groups (seeds, scenes) with replacement.

    Values of one group (one seed's assets, say) are not independent, so groups are drawn, never single values. The draws are
    fixed: the same values give the same interval. With fewer than two groups there is no interval.
    """
    filled = [np.asarray(values, float) for _, values in sorted(groups.items(), key=lambda item: str(item[0])) if len(values)]
    if not filled:
        return {"mean": None, "interval_95": None, "groups": 0, "values": 0}
    sums, counts = np.array([v.sum() for v in filled]), np.array([len(v) for v in filled])
    found: dict[str, Any] = {"mean": round(float(sums.sum() / counts.sum()), 4), "interval_95": None}
    if len(filled) > 1:
        drawn = bootstrap((sums, counts), _mean_of_all, n_resamples=BOOTSTRAP_DRAWS, vectorized=True, paired=True,
                          method="percentile", rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
        found["interval_95"] = [round(float(drawn.low), 4), round(float(drawn.high), 4)]
    return {**found, "groups": len(filled), "values": int(counts.sum())}
