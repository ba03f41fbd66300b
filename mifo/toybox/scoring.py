"""Holds what the judge saw against what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..boxes import Box
from .judge import Finding, Verdict
from .world import Thing


@dataclass(frozen=True)
class Look:
    """Which parts of a thing's looks came out right."""

    class_name: bool
    colors: bool
    pattern: bool

    @property
    def all(self) -> bool:
        return self.class_name and self.colors and self.pattern


NOTHING = Look(False, False, False)


def compare(finding: Finding | None, thing: Thing) -> Look:
    """The looks of one finding. Of a checkered thing the two colours may come in either order: neither is the main one."""
    if finding is None:
        return NOTHING
    seen = (finding.main, finding.second) if thing.pattern != "plain" else (finding.main,)
    asked = (thing.main, thing.second) if thing.pattern != "plain" else (thing.main,)
    same = set(seen) == set(asked) if thing.pattern == "checkered" else seen == asked
    return Look(finding.class_name == thing.class_name, same, finding.pattern == thing.pattern)


def main_color_and_class(finding: Finding | None, thing: Thing) -> bool:
    """The looser test for prompts: the right class, and the main colour (either colour of a checkered thing)."""
    if finding is None or finding.class_name != thing.class_name:
        return False
    return finding.main in ((thing.main, thing.second) if thing.pattern == "checkered" else (thing.main,))


def surest(verdict: Verdict) -> Finding | None:
    """The finding that the judge is surest of."""
    return max(verdict.findings, key=lambda f: f.score, default=None)


def nearest(finding: Finding | None, things: Sequence[Thing]) -> int | None:
    """Which of several known things a finding looks most like: its index; None when nothing was found.

    One point each for class, main colour, second colour and pattern; the first of equals wins.
    """
    if finding is None:
        return None

    def points(thing: Thing) -> int:
        second = thing.second if thing.pattern != "plain" else None
        return (3 * (finding.main == thing.main) + 2 * (finding.pattern == thing.pattern) + (finding.second == second)
                + (finding.class_name == thing.class_name))  # fmt: skip

    return max(range(len(things)), key=lambda i: points(things[i]))


def best_in_box(verdict: Verdict, box: Box) -> tuple[Finding | None, float]:
    """The finding that overlaps a box most, and its IoU with it; (None, 0) when none touches it."""
    overlaps = [(Box(*_inside(f.box)).iou(box), f) for f in verdict.findings]
    iou, finding = max(overlaps, key=lambda pair: pair[0], default=(0.0, None))
    return (finding, iou) if iou > 0 else (None, 0.0)


def _inside(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Cut to the picture; never empty."""
    x0, y0 = min(max(box[0], 0.0), 0.999), min(max(box[1], 0.0), 0.999)
    return x0, y0, min(max(box[2], x0 + 1e-3), 1.0), min(max(box[3], y0 + 1e-3), 1.0)
