"""What a back end must be able to do: see what is in a picture, and say how like the instances' source crops it is.

Two exist: `toybox` (the judge and the drawn truth) and `photo` (DINOv2, CLIP and an open-vocabulary detector).
Knows no model. Boxes are xyxy, normalized to [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from .metrics import Array, BoxTuple


@dataclass(frozen=True)
class Detection:
    """One thing seen. `score` in [0, 1]."""

    box: BoxTuple
    score: float
    label: str


@dataclass(frozen=True)
class Seen:
    """A picture and what a back end found in it, surest first. `notes` is the back end's own."""

    image: Image.Image
    detections: tuple[Detection, ...]
    notes: Any = None


class Backend(Protocol):
    """Similarities are at most 1, which is a copy of the source crop."""

    name: str
    thresholds: tuple[float, ...]
    """Of identity, for the subject collapse rate."""
    sees_all: bool
    """What it does not see is not there. False for detectors of photographs, which miss things."""
    words: tuple[str, ...]
    """Per instance, what stands for its token where a prompt is compared with a picture."""
    unrelated_prompts: tuple[str, ...]
    """Prompts that have nothing to do with any instance, for drift."""

    def facts(self) -> dict[str, Any]:
        """Which models, and what the numbers mean."""
        ...

    def among_sources(self) -> Array:
        """(N, N) similarities of the instances' source crops among themselves."""
        ...

    def see(self, images: Sequence[Image.Image]) -> list[Seen]:
        """What is in each picture."""
        ...

    def similarity(self, seen: Seen, boxes: Sequence[BoxTuple | None]) -> Array:
        """(len(boxes), N): the crop in each box against every instance; zeros where the box is None."""
        ...

    def prompt_fit(self, seen: Seen, prompt: str, assets: Sequence[int]) -> float | None:
        """How well the picture fits the prompt, `assets` being the instances named in it; None where nothing can be said."""
        ...

    def distance(self, first: Seen, second: Seen) -> float:
        """Between two pictures; 0 for equal ones."""
        ...
