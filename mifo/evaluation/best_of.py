"""`synthesize --best-of N`: N seeds, ranked by layout and leakage, the best kept.

score = mean IoU (where boxes were given) + mean identity + 0.5 * mean identity margin + 0.5 if the count is right

The margin alone would not do: a smear that has nothing but the instance's own pattern is set apart too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from ..boxes import Layout
from ..config import SynthesisConfig, to_dict
from ..model.base import BaseModel
from ..synthesis.resumable import Keep, draw_now
from ..synthesis.synthesize import Synthesis, synthesize
from .backend import Backend
from .cases import Case, CaseImage
from .measure import Record, measure_images

MARGIN_WEIGHT = 0.5
COUNT_BONUS = 0.5


def draw_best(base: BaseModel, prompt: str, layout: Layout | None, tokens: Sequence[str], config: SynthesisConfig, seed: int,
              count: int, backend: Backend, on_progress: Callable[[int, int], None] | None = None,
              keep: Keep = draw_now) -> tuple[Synthesis, list[dict[str, Any]]] | None:  # fmt: skip
    """Draws the seeds from `seed` on one by one, so that the best is bit for bit what its seed alone draws. Those that `keep` has
    are not drawn again, those that fail are left out; one picture and the best so far are held at a time.

    Returns the best, with its own seed and the seconds of all, and every seed's scores, best first; equal scores keep the order
    of their seeds. None when every seed failed.
    """
    ranking: list[dict[str, Any]] = []
    drawn: list[Synthesis] = []  # the best so far, unless `keep` had it
    seconds, peak_gib = 0.0, 0.0
    recipe = {"prompt": prompt, "boxes": layout.to_json() if layout else None, "tokens": list(tokens), "config": to_dict(config)}
    for each in range(seed, seed + count):
        new: list[Synthesis] = []

        def draw(each: int = each, new: list[Synthesis] = new) -> list[Image.Image]:
            new.append(synthesize(base, prompt, layout, tokens, config, each, 1))
            return new[0].images

        images = keep(f"seed {each}", {**recipe, "seed": each}, 1, draw)
        if images:
            taken = CaseImage(Case(prompt, layout), each, images[0], f"{each:06d}.png")
            ranking += map(score, measure_images([taken], backend, tokens))
            if ranking[-1]["score"] > max((e["score"] for e in ranking[:-1]), default=-math.inf):
                drawn = new
        seconds, peak_gib = seconds + sum(r.seconds for r in new), max([peak_gib, *(r.peak_gib for r in new)])
        if on_progress:
            on_progress(each - seed + 1, count)
    if not ranking:
        return None
    ranking.sort(key=lambda entry: (-entry["score"], entry["seed"]))
    # a picture kept by an interrupted run has no record of how it was drawn
    best = drawn[0] if drawn else synthesize(base, prompt, layout, tokens, config, ranking[0]["seed"], 1)
    return replace(best, seconds=seconds or best.seconds, peak_gib=peak_gib or best.peak_gib), ranking


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
