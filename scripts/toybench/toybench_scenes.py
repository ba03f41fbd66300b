"""The benchmark's scenes, drawn by seed at four levels of likeness; the models were trained on none of them.

    classes    different classes
    colors     one class and pattern, different colours
    patterns   one class and colour, different patterns (beyond four: then different second colours too)
    rare       shapes that the training world does not have
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mifo.toybox.draw import BACKGROUNDS, CLASSES, COLORS, PATTERNS, RARE_CLASSES
from mifo.toybox.world import Scene, Thing, placed

LEVELS = ("classes", "colors", "patterns", "rare")
COUNTS = (2, 3, 4)
LARGE_COUNTS = (6, 8)
SPLITS = ("dev", "holdout")
FIRST_SEED = 500_000  # training began at 1,000,000, tests and the other measurements stand at 800,000 and 900,000
#: longer side of a thing, as a fraction of the picture
SIZES = {2: (0.36, 0.46), 3: (0.32, 0.42), 4: (0.30, 0.40), 6: (0.25, 0.29), 8: (0.24, 0.28)}


@dataclass(frozen=True)
class Cell:
    """One scene of the benchmark. `index` counts within the split."""

    level: str
    count: int
    index: int
    split: str

    @property
    def number(self) -> int:
        """Among the scenes of this level and count; every third is held out."""
        return 3 * self.index + 2 if self.split == "holdout" else 3 * (self.index // 2) + self.index % 2

    @property
    def seed(self) -> int:
        return FIRST_SEED + 10_000 * LEVELS.index(self.level) + 1_000 * self.count + self.number

    @property
    def name(self) -> str:
        return f"{self.level}-{self.count}-{self.number:03d}"


def bench_scene(cell: Cell) -> Scene:
    """The scene of a cell: no two of its things look the same, none overlap."""
    rng = np.random.default_rng(cell.seed)
    looks = _looks(cell.level, cell.count, rng)
    background = str(rng.choice(BACKGROUNDS))
    things = tuple(placed(Thing(*look, (0.0, 0.0, 1.0, 1.0), bool(rng.random() < 0.5)), center, longer)
                   for look, (center, longer) in zip(looks, places(cell.count, rng), strict=True))  # fmt: skip
    return Scene(things, background, int(rng.integers(2**31)))


def _looks(level: str, count: int, rng: np.random.Generator) -> list[tuple[str, str, str, str]]:
    """(class, main colour, second colour, pattern) of each thing."""
    colors = [str(c) for c in rng.permutation(list(COLORS))]
    mains, second = colors[:count], colors[-1]  # twelve colours, at most eight things: the second is never a main one
    patterns = [str(p) for p in rng.permutation(PATTERNS)]
    if level == "classes":
        names = [str(c) for c in rng.permutation(list(CLASSES))[:count]]
        pairs = [[str(c) for c in rng.choice(list(COLORS), 2, replace=False)] for _ in names]
        return [(name, main, other, str(rng.choice(PATTERNS))) for name, (main, other) in zip(names, pairs, strict=True)]
    if level == "colors":
        name, pattern = str(rng.choice(list(CLASSES))), patterns[0]
        return [(name, main, second, pattern) for main in mains]
    if level == "patterns":
        name = str(rng.choice(list(CLASSES)))
        patterned = [p for p in patterns if p != "plain"]
        looks = [(p, second) for p in patterns] + [(p, c) for c in colors[1:-1] for p in patterned]
        return [(name, colors[0], other, pattern) for pattern, other in looks[:count]]
    names = [str(c) for c in rng.permutation(list(RARE_CLASSES))]
    return [(names[k % len(names)], main, second, str(rng.choice(PATTERNS))) for k, main in enumerate(mains)]


def places(count: int, rng: np.random.Generator) -> list[tuple[tuple[float, float], float]]:
    """(centre, longer side) in cells of a grid, in random order, shaken as far as they stay apart."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    found = []
    for cell in rng.permutation(columns * rows)[:count]:
        row, column = divmod(int(cell), columns)
        longer = float(rng.uniform(*SIZES[count]))
        slack = [max(0.0, 1 / n - longer - 0.02) / 2 for n in (columns, rows)]
        x = (column + 0.5) / columns + rng.uniform(-slack[0], slack[0])
        y = (row + 0.5) / rows + rng.uniform(-slack[1], slack[1])
        found.append(((float(x), float(y)), longer))
    return found
