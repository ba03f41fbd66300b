"""The toybox back end: a judge that knows the drawn world, and the truth of what was drawn.

Similarity of two things is the share of their four looks that agree: class, main colour, second colour, pattern.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.instance import MAX_TRUTH_BYTES, Instance
from ..errors import InputError
from ..io.read_files import read_regular
from ..toybox.draw import CLASSES, COLORS, PATTERNS, RARE_CLASSES
from ..toybox.judge import Finding, Judge, Verdict, judge_images, load_judge
from ..toybox.world import BACKGROUND_PHRASES, Thing, mask_box, random_scene
from .backend import Detection, Seen
from .metrics import Array, BoxTuple, box_ious

Looks = tuple[str, str, str | None, str]  # class, main colour, second colour (None when plain), pattern
MIN_IOU = 0.1  # a box that overlaps no finding by more holds nothing
UNRELATED_SEED = 800_000


class ToyboxBackend:
    """The back end of one instance; `truth` is what was drawn, otherwise the judge reads it from the instance's picture."""

    name = "toybox"
    thresholds: tuple[float, ...] = (0.5, 0.75, 1.0)
    sees_all = True
    unrelated_prompts: tuple[str, ...] = tuple(random_scene(UNRELATED_SEED + k, 1).caption() for k in range(6))

    def __init__(self, instance: Instance, truth: Sequence[Thing] | None = None, judge: Judge | None = None):
        self.judge = judge or load_judge()
        truth = truth if truth is not None else load_truth(instance)
        self.from_truth = truth is not None
        self.looks = [thing_looks(t) for t in truth] if truth is not None else self._read(instance)
        self.words = tuple(_words(look) for look in self.looks)

    def _read(self, instance: Instance) -> list[Looks]:
        (seen,) = self.see([instance.image])
        looks = []
        for index, mask in enumerate(instance.masks):
            found = _finding_in(seen, mask_box(mask))
            if found is None:
                raise InputError(
                    f"the judge of the toybox sees nothing in mask{index}.png of {instance.source}; it knows drawn toys only: "
                    "use --backend photo for photographs"
                )
            looks.append(finding_looks(found))
        return looks

    def facts(self) -> dict[str, Any]:
        return {"name": self.name, "similarity": "share of the four looks (class, main and second colour, pattern) that agree",
                "instances": [list(look) for look in self.looks],
                "instances_from": "truth.json" if self.from_truth else "the judge's reading of the instance's picture",
                "distance": "root mean square difference of the pixels, each in [0, 1]",
                "prompt_fit": "share of what the prompt says that the judge sees: each asset's class, and the place"}  # fmt: skip

    def among_sources(self) -> Array:
        return np.array([[agreement(a, b) for b in self.looks] for a in self.looks])

    def see(self, images: Sequence[Image.Image]) -> list[Seen]:
        verdicts = judge_images(self.judge, list(images))
        return [Seen(image, tuple(Detection(f.box, f.score, f.class_name) for f in v.findings), v)
                for image, v in zip(images, verdicts, strict=True)]  # fmt: skip

    def similarity(self, seen: Seen, boxes: Sequence[BoxTuple | None]) -> Array:
        rows = np.zeros((len(boxes), len(self.looks)))
        for row, box in zip(rows, boxes, strict=True):
            finding = _finding_in(seen, box)
            if finding is not None:
                row[:] = [agreement(finding_looks(finding), look) for look in self.looks]
        return rows

    def prompt_fit(self, seen: Seen, prompt: str, assets: Sequence[int]) -> float | None:
        verdict: Verdict = seen.notes
        said = [name for name, phrase in BACKGROUND_PHRASES.items() if phrase in prompt.lower()]
        holds = [verdict.background == name for name in said]
        left = Counter(f.class_name for f in verdict.findings)
        for asset in assets:
            class_name = self.looks[asset][0]
            holds.append(left[class_name] > 0)
            left[class_name] -= 1
        return float(np.mean(holds)) if holds else None

    def distance(self, first: Seen, second: Seen) -> float:
        pixels = [np.asarray(s.image.convert("RGB")).astype(float) / 255 for s in (first, second)]
        return float(np.sqrt(((pixels[0] - pixels[1]) ** 2).mean()))


def load_truth(instance: Instance) -> list[Thing] | None:
    """The things that `truth.json` beside the instance says were drawn, one per mask; None without such a file.

    Raises InputError when it cannot be read or is about another number of things.
    """
    path = Path(instance.source) / "truth.json"
    if not os.path.lexists(path):
        return None
    try:
        things = [_thing(record) for record in json.loads(read_regular(path, MAX_TRUTH_BYTES))["things"]]
    except (OSError, AttributeError, OverflowError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a drawn scene's truth ({error}); remove it or draw the scene again") from None
    if len(things) != instance.count:
        raise InputError(f"{path} has {len(things)} things but there are {instance.count} masks; remove it, or add the masks")
    return things


def _thing(record: dict[str, Any]) -> Thing:
    """Raises one of several errors for what is no thing of this world: the file may come from a stranger, in a bundle."""
    thing = Thing(**{**record, "box": tuple(float(v) for v in record["box"])})
    known = thing.class_name in {**CLASSES, **RARE_CLASSES} and {thing.main, thing.second} <= set(COLORS)
    if not known or thing.pattern not in PATTERNS or len(thing.box) != 4:
        raise ValueError("a thing that this world does not have")
    return thing


def thing_looks(thing: Thing) -> Looks:
    return thing.class_name, thing.main, thing.second if thing.pattern != "plain" else None, thing.pattern


def finding_looks(finding: Finding) -> Looks:
    return finding.class_name, finding.main, finding.second, finding.pattern


def agreement(a: Looks, b: Looks) -> float:
    """Share of the four looks that agree. Of two checkered things the colours count in the order that agrees better: neither
    colour of a checkerboard is the main one."""
    colors = (a[1] == b[1]) + (a[2] == b[2])
    if a[3] == b[3] == "checkered":
        colors = max(colors, (a[1] == b[2]) + (a[2] == b[1]))
    return ((a[0] == b[0]) + colors + (a[3] == b[3])) / 4


def _words(look: Looks) -> str:
    class_name, main, second, pattern = look
    return f"{main} {class_name}" if pattern == "plain" else f"{main} and {second} {pattern} {class_name}"


def _finding_in(seen: Seen, box: BoxTuple | None) -> Finding | None:
    """The finding that overlaps a box most, if by more than MIN_IOU."""
    verdict: Verdict = seen.notes
    if box is None or not verdict.findings:
        return None
    ious = box_ious([box], [f.box for f in verdict.findings])[0]
    return verdict.findings[int(ious.argmax())] if ious.max() > MIN_IOU else None
