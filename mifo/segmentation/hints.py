"""Where the things of a photo are, as a user says it: a box around each, or points on it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..boxes import Box
from ..errors import InputError

Point = tuple[float, float]
#: (width, height)
Size = tuple[int, int]


@dataclass(frozen=True)
class Hint:
    """One thing: the box around it, and points that are on it, as fractions of the picture's width and height."""

    box: Box
    points: tuple[Point, ...] = ()

    def pixels(self, size: Size) -> tuple[int, int, int, int]:
        """The box as (left, top, right, bottom), each within the picture, at least one pixel wide and high."""
        width, height = size
        x0, y0, x1, y1 = self.box.as_tuple()
        left, top = min(width - 1, math.floor(x0 * width)), min(height - 1, math.floor(y0 * height))
        return left, top, max(left + 1, math.ceil(x1 * width)), max(top + 1, math.ceil(y1 * height))

    def point_pixels(self, size: Size) -> list[tuple[int, int]]:
        """(x, y) of each point."""
        return [(min(size[0] - 1, int(x * size[0])), min(size[1] - 1, int(y * size[1]))) for x, y in self.points]


def parse_box(text: str, size: Size) -> Box:
    """`x0,y0,x1,y1` as fractions, or as pixels of a picture of that size where one of them is above 1. Raises InputError."""
    x0, y0, x1, y1 = _numbers(text, 4, "--box", "left, top, right and bottom, such as 0.1,0.2,0.5,0.9 or 120,80,640,500")
    if max(x0, y0, x1, y1) > 1:
        width, height = size
        x0, y0, x1, y1 = x0 / width, y0 / height, x1 / width, y1 / height
        if max(x0, y0, x1, y1) > 1 + 1e-9:
            raise InputError(f"--box {text} leaves the picture, which is {width}x{height} pixels")
    return Box(x0, y0, min(x1, 1.0), min(y1, 1.0))


def parse_point(text: str, size: Size) -> Point:
    """`x,y`, read as `parse_box` reads its numbers. Raises InputError."""
    x, y = _numbers(text, 2, "--point", "x and y, such as 0.4,0.6 or 320,240")
    if max(x, y) > 1:
        x, y = x / size[0], y / size[1]
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InputError(f"--point {text} leaves the picture, which is {size[0]}x{size[1]} pixels")
    return x, y


def _numbers(text: str, count: int, option: str, expected: str) -> list[float]:
    parts = text.strip().strip("[]()").replace(";", ",").split(",")
    try:
        found = [float(part) for part in parts]
    except ValueError:
        found = []
    if len(found) != count or not all(map(math.isfinite, found)):
        raise InputError(f"{option} is {reprlib.repr(text)}; expected {count} numbers with commas: {expected}")
    return found


def points_by_box(boxes: Sequence[Box], points: Sequence[Point]) -> tuple[list[Hint], list[Point]]:
    """A hint for each box, with the points in it: a point in several boxes is the smallest one's. And the points in none."""
    inside: list[list[Point]] = [[] for _ in boxes]
    alone = []
    for point in points:
        around = [k for k, box in enumerate(boxes) if box.x0 <= point[0] <= box.x1 and box.y0 <= point[1] <= box.y1]
        if around:
            inside[min(around, key=lambda k: _area(boxes[k]))].append(point)
        else:
            alone.append(point)
    return [Hint(box, tuple(found)) for box, found in zip(boxes, inside, strict=True)], alone


def _area(box: Box) -> float:
    return (box.x1 - box.x0) * (box.y1 - box.y0)
