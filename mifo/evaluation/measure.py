"""From pictures to numbers: each picture's own measurements, and their summary with intervals over seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from . import metrics
from .backend import Backend, Seen
from .cases import CaseImage
from .metrics import Array, BoxTuple

Record = dict[str, Any]
MIN_IOU = 0.1  # a detection that overlaps its box less is not what stands in it


def measure_images(images: Sequence[CaseImage], backend: Backend, tokens: Sequence[str]) -> list[Record]:
    """One record per picture. `tokens[i]` is the token of the back end's instance i."""
    among = backend.among_sources()
    seen = backend.see([p.image for p in images])
    return [measure_image(p, s, backend, tokens, among) for p, s in zip(images, seen, strict=True)]


def measure_image(taken: CaseImage, seen: Seen, backend: Backend, tokens: Sequence[str], among: Array) -> Record:
    """Identity, layout and prompt fit of one picture."""
    case = taken.case
    asked = [tokens.index(t) for t in case.tokens]
    record: Record = {"name": taken.name, "prompt": case.prompt, "seed": taken.seed, "in_boxes": case.layout is not None,
                      "assets": asked, "detections": len(seen.detections)}  # fmt: skip
    boxes: list[BoxTuple | None]
    if case.layout:
        asked_boxes = [box.as_tuple() for _, box in case.layout]
        matched = metrics.match_boxes(asked_boxes, [d.box for d in seen.detections])
        record["ious"] = [round(iou, 4) for _, iou in matched]
        boxes = _crops_in_boxes(backend, seen, asked_boxes, matched)
    else:
        boxes = _surest(backend, seen, asked)
    rows = backend.similarity(seen, boxes)  # (assets asked for, N)
    record["leakage"] = _rounded(rows)
    record["crops"] = [[round(v, 4) for v in box] if box else None for box in boxes]
    if asked:
        record["count_right"] = len(seen.detections) == len(asked)
        every = backend.similarity(seen, [d.box for d in seen.detections])[:, asked]
        record["detect_and_compare"] = round(metrics.detect_and_compare(every, among[np.ix_(asked, asked)]), 4)
    record["identity"] = [round(float(row[i]), 4) for row, i in zip(rows, asked, strict=True)]
    record["identity_margin"] = _each(metrics.identity_margin(row, i, among) for row, i in zip(rows, asked, strict=True))
    record["raw_margin"] = _each(metrics.raw_margin(row, i) for row, i in zip(rows, asked, strict=True))
    if len(among) > 1:
        record["right_instance"] = [round(metrics.right_instance(row, i), 4) for row, i in zip(rows, asked, strict=True)]
        record["confused"] = [metrics.is_confused(row, i) for row, i in zip(rows, asked, strict=True)]
    fit = backend.prompt_fit(seen, case.prompt, asked)
    record["prompt_fit"] = None if fit is None else round(fit, 4)
    return record


def _crops_in_boxes(backend: Backend, seen: Seen, asked: Sequence[BoxTuple],
                    matched: Sequence[tuple[int | None, float]]) -> list[BoxTuple | None]:  # fmt: skip
    """The detection matched to a box. Without one: nothing, where the back end sees all that is there; else the box itself."""
    crops: list[BoxTuple | None] = []
    for box, (detection, iou) in zip(asked, matched, strict=True):
        missed = None if backend.sees_all else box
        crops.append(seen.detections[detection].box if detection is not None and iou >= MIN_IOU else missed)
    return crops


def _surest(backend: Backend, seen: Seen, asked: Sequence[int]) -> list[BoxTuple | None]:
    """Without boxes: the surest detections, as many as assets were asked for, given to the assets so that the sum of their
    similarities is largest. Whom a picture without boxes confuses cannot be said, except for an asset alone."""
    found: list[BoxTuple | None] = [None] * len(asked)
    boxes = [d.box for d in seen.detections[: len(asked)]]
    if boxes and asked:
        similarity = backend.similarity(seen, boxes)[:, list(asked)]
        for detection, asset in zip(*linear_sum_assignment(similarity, maximize=True), strict=True):
            found[asset] = boxes[detection]
    return found


def _each(values: Any) -> list[float | None]:
    return [None if v is None else round(v, 4) for v in values]


def _rounded(rows: Array) -> list[list[float]]:
    return [[round(float(v), 4) for v in row] for row in rows]


# --- summary ------------------------------------------------------------------------------------


def summarize(records: Sequence[Record], thresholds: Sequence[float]) -> dict[str, Any]:
    """All pictures' numbers as means with 95 % intervals over seeds: `alone` (one asset, no box), `in_boxes`, `free` (more
    without boxes); each of them empty where there were no such pictures."""
    kinds = {
        "alone": [r for r in records if not r["in_boxes"] and len(r["assets"]) == 1],
        "in_boxes": [r for r in records if r["in_boxes"]],
        "free": [r for r in records if not r["in_boxes"] and len(r["assets"]) != 1],
    }
    return {kind: _summary(chosen, thresholds) for kind, chosen in kinds.items() if chosen}


def _summary(records: Sequence[Record], thresholds: Sequence[float]) -> dict[str, Any]:
    found: dict[str, Any] = {"pictures": len(records)}
    for name in ("identity", "identity_margin", "raw_margin", "right_instance", "confused", "detect_and_compare", "prompt_fit",
                 "count_right"):  # fmt: skip
        values = by_seed(records, name)
        if any(values.values()):
            found[name] = metrics.interval(values)
    for threshold in thresholds:
        collapsed = {seed: [v < threshold for v in values] for seed, values in by_seed(records, "identity").items()}
        if any(collapsed.values()):
            found[f"collapse_below_{threshold}"] = metrics.interval(collapsed)
    if any("ious" in r for r in records):
        ious = by_seed(records, "ious")
        found["iou"] = metrics.interval(ious)
        found["success_at_0.5"] = metrics.interval({seed: [v >= 0.5 for v in values] for seed, values in ious.items()})
    return found


def by_seed(records: Sequence[Record], name: str) -> dict[int, list[float]]:
    """All values of one measurement, by their picture's seed; what was not measured is left out."""
    values: dict[int, list[float]] = defaultdict(list)
    for record in records:
        value = record.get(name)
        found = value if isinstance(value, list) else [value]
        values[record["seed"]] += [float(v) for v in found if v is not None]
    return dict(values)


def leakage_matrix(records: Sequence[Record], count: int) -> list[list[float | None]]:
    """(N, N): the mean similarity of the crops that stand for asset i to instance j; None where i was never asked for."""
    rows: dict[int, list[list[float]]] = defaultdict(list)
    for record in records:
        for asset, row in zip(record["assets"], record["leakage"], strict=True):
            rows[asset].append(row)
    return [[round(float(v), 4) for v in np.mean(rows[i], 0)] if rows[i] else [None] * count for i in range(count)]
