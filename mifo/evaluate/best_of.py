"""`synthesize --best-of N`: N seeds, ranked by layout and leakage, the best kept.

score = mean IoU (where boxes were given) + mean identity + 0.5 * mean identity margin + 0.5 if the count is right

The margin alone would not do: a smear that has nothing but the instance's own pattern is set apart too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..base_model import BaseModel
from ..boxes import Layout
from ..config import SynthesisConfig
from ..synthesize import Synthesis, synthesize
from .backend import Backend
from .cases import Case, Picture
from .measure import Record, measure_pictures

MARGIN_WEIGHT = 0.5
COUNT_BONUS = 0.5


def draw_best(base: BaseModel, prompt: str, layout: Layout | None, tokens: Sequence[str], config: SynthesisConfig, seed: int,
              count: int, backend: Backend,
              on_progress: Callable[[int, int], None] | None = None) -> tuple[Synthesis, list[dict[str, Any]]]:  # fmt: skip
    """Draws the seeds from `seed` on one by one, so that the best is bit for bit what its seed alone draws.

    Returns the best, with its own seed and the seconds of all, and every seed's scores, best first; equal scores keep the order
    of their seeds.
    """
    results = []
    for k in range(count):
        results.append(synthesize(base, prompt, layout, tokens, config, seed + k, 1))
        if on_progress:
            on_progress(k + 1, count)
    case = Case(prompt, layout)
    pictures = [Picture(case, r.seed, r.images[0], f"{r.seed:06d}.png") for r in results]
    ranking = sorted(map(score, measure_pictures(pictures, backend, tokens)), key=lambda e: (-e["score"], e["seed"]))
    best = results[ranking[0]["seed"] - seed]
    return replace(best, seconds=sum(r.seconds for r in results), peak_gib=max(r.peak_gib for r in results)), ranking


def score(record: Record) -> dict[str, Any]:
    """The parts of a picture's score and their sum."""
    ious = record.get("ious") or []
    margins = [m for m in record["identity_margin"] if m is not None]
    identity = float(np.mean(record["identity"])) if record["identity"] else 0.0
    iou = float(np.mean(ious)) if ious else None
    margin = float(np.mean(margins)) if margins else 0.0
    count = bool(record.get("count_right", False))
    total = (iou or 0.0) + identity + MARGIN_WEIGHT * margin + COUNT_BONUS * count
    return {"seed": record["seed"], "score": round(total, 4), "iou": None if iou is None else round(iou, 4),
            "identity": round(identity, 4), "identity_margin": round(margin, 4),
            "count_right": count, "confused": record.get("confused", [])}  # fmt: skip
