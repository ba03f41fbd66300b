"""Looks at a toybox picture and says what is in it: a small convolutional network, trained on drawn scenes.

It knows all ten classes (the two rare ones too), colours, patterns and the seven backgrounds, and finds where each thing is.
What was asked for is the caller's business: `match` pairs what was found with what was wanted by place alone. It says nothing of
how good a picture is: a smeared car is a car while it is more car than anything else. A checkered star or mushroom does not show
which of its two colours is the main one, so there `main` and `second` may come swapped.

Boxes are xyxy, normalized to [0, 1]. Weights come from scripts/toybox/train_judge.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from torch import nn

from .draw import BACKGROUNDS, CLASSES, COLORS, PATTERNS, RARE_CLASSES
from .world import IMAGE_SIZE, Thing

WEIGHTS = Path(__file__).with_name("judge.safetensors")
GRID = 16  # cells along each side of the maps
BATCH = 64

#: what each cell names, and the words it can choose from
VOCABULARY: dict[str, tuple[str, ...]] = {
    "class_name": (*CLASSES, *RARE_CLASSES),
    "main": tuple(COLORS),
    "second": tuple(COLORS),
    "pattern": PATTERNS,
}

MIN_SCORE = 0.3
MAX_OVERLAP = 0.4  # IoU above which two findings are the same thing
MATCH_IOU = 0.3

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Finding:
    """One thing seen. `second` is None when the pattern is 'plain'; `score` in [0, 1]: how surely a thing is there."""

    class_name: str
    main: str
    second: str | None
    pattern: str
    box: Box
    score: float


@dataclass(frozen=True)
class Verdict:
    """What one picture shows, surest finding first."""

    findings: tuple[Finding, ...]
    background: str


@dataclass(frozen=True)
class Maps:
    """The network's raw answer, B pictures on a G x G grid."""

    heat: torch.Tensor  # (B, G, G) logits: a thing's centre is here
    sides: torch.Tensor  # (B, 4, G, G) from the cell's centre to the box's left, top, right, bottom; picture = 1
    words: dict[str, torch.Tensor]  # VOCABULARY's keys -> (B, choices, G, G) logits
    background: torch.Tensor  # (B, 7) logits


def _conv(channels_in: int, channels_out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU())


class _Residual(nn.Module):
    """Two 3x3 convolutions around a skip."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.second(self.first(x)))


class Judge(nn.Module):
    """Down to 4x4 for context, back up to 16x16 with skips; every cell then answers for the thing centred on it."""

    def __init__(self, first: int = 16, stem: int = 32, fine: int = 64, coarse: int = 80, hidden: int = 128):
        super().__init__()
        halving = (_conv(3, first, kernel=5, stride=2), _conv(first, stem, stride=2), _conv(stem, fine, stride=2))
        self.to_fine = nn.Sequential(*halving, _Residual(fine))
        self.to_middle = nn.Sequential(_conv(fine, coarse, stride=2), _Residual(coarse))
        self.to_coarse = nn.Sequential(_conv(coarse, coarse, stride=2), _Residual(coarse))
        self.middle = _conv(coarse, coarse)
        self.from_middle = nn.Conv2d(coarse, fine, 1)
        self.fine = _Residual(fine)
        self.sizes = {"heat": 1, "sides": 4, **{name: len(choices) for name, choices in VOCABULARY.items()}}
        self.head = nn.Sequential(_conv(fine, hidden, kernel=1), nn.Conv2d(hidden, sum(self.sizes.values()), 1))
        self.background = nn.Linear(coarse, len(BACKGROUNDS))

    def forward(self, pixels: torch.Tensor) -> Maps:
        """`pixels` (B, 3, 128, 128) in [0, 1]."""
        fine = self.to_fine(4 * (pixels - 0.5))  # (B, 64, 16, 16)
        middle = self.to_middle(fine)  # (B, 80, 8, 8)
        coarse = self.to_coarse(middle)  # (B, 80, 4, 4)
        middle = self.middle(middle + F.interpolate(coarse, scale_factor=2.0))
        fine = self.fine(fine + F.interpolate(self.from_middle(middle), scale_factor=2.0))
        maps = dict(zip(self.sizes, self.head(fine).split(list(self.sizes.values()), 1), strict=True))
        heat, sides = maps.pop("heat")[:, 0].sub(3.0), maps.pop("sides").sub(1.5).sigmoid()
        return Maps(heat, sides, maps, self.background(coarse.mean((2, 3))))


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The trained judge on the CPU, fp32, ready to answer (fp16 on disk)."""
    judge = Judge()
    judge.load_state_dict(load_file(path))  # copies into fp32 parameters
    return judge.eval().requires_grad_(False)


@torch.no_grad()
def judge_images(judge: Judge, images: list[Image.Image]) -> list[Verdict]:
    """One verdict per image. Any size will do; the judge looks at 128x128."""
    device = judge.background.weight.device
    verdicts: list[Verdict] = []
    for first in range(0, len(images), BATCH):
        pixels = torch.stack([_to_pixels(image) for image in images[first : first + BATCH]])  # (B, 3, 128, 128)
        maps = judge(pixels.to(device))
        backgrounds = maps.background.argmax(1).tolist()
        verdicts += [Verdict(f, BACKGROUNDS[b]) for f, b in zip(read_findings(maps), backgrounds, strict=True)]
    return verdicts


def _to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, 128, 128) in [0, 1]."""
    image = image.convert("RGB")
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def cell_centers(grid: int = GRID) -> torch.Tensor:
    """(grid,) centres of the cells along one side, in fractions of the picture."""
    return (torch.arange(grid) + 0.5) / grid


def decode_boxes(sides: torch.Tensor) -> torch.Tensor:
    """(B, 4, G, G) distances to left, top, right, bottom -> (B, 4, G, G) boxes xyxy."""
    at = cell_centers(sides.shape[-1]).to(sides)
    x, y = at[None, None, :].expand_as(sides[:, 0]), at[None, :, None].expand_as(sides[:, 0])  # (B, G, G) each
    left, top, right, bottom = sides.unbind(1)
    return torch.stack([x - left, y - top, x + right, y + bottom], 1)


def read_findings(maps: Maps) -> list[tuple[Finding, ...]]:
    """Peaks of the heat map (each the highest of its 3x3 cells), one finding per thing, surest first."""
    scores = maps.heat.sigmoid()  # (B, G, G)
    peaks = (scores == F.max_pool2d(scores[:, None], 3, 1, 1)[:, 0]) & (scores > MIN_SCORE)
    boxes = decode_boxes(maps.sides).clamp(0, 1)
    found: list[list[Finding]] = [[] for _ in scores]
    for b, row, column in peaks.nonzero().tolist():
        words = _read_words({name: logits[b, :, row, column] for name, logits in maps.words.items()})
        x0, y0, x1, y1 = boxes[b, :, row, column].tolist()
        found[b].append(Finding(**words, box=(x0, y0, x1, y1), score=float(scores[b, row, column])))
    return [without_repeats(findings) for findings in found]


def _read_words(logits: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One cell's likeliest words. A patterned thing's two colours are read as one pair, since they always differ."""
    best = {name: int(values.argmax()) for name, values in logits.items()}
    plain = VOCABULARY["pattern"][best["pattern"]] == "plain"
    if not plain:
        pairs = logits["main"].log_softmax(0)[:, None] + logits["second"].log_softmax(0)  # (main, second)
        best["main"], best["second"] = divmod(int(pairs.fill_diagonal_(-torch.inf).argmax()), len(pairs))
    words: dict[str, Any] = {name: VOCABULARY[name][choice] for name, choice in best.items()}
    return {**words, "second": None} if plain else words


def without_repeats(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Surest first; drops what overlaps a surer finding by more than MAX_OVERLAP."""
    kept: list[Finding] = []
    for finding in sorted(findings, key=lambda f: -f.score):
        if not kept or box_ious([finding.box], [k.box for k in kept]).max() <= MAX_OVERLAP:
            kept.append(finding)
    return tuple(kept)


def box_ious(a: Sequence[Box], b: Sequence[Box]) -> np.ndarray:
    """(len(a), len(b)) intersection over union."""
    left, right = np.reshape(a, (-1, 1, 4)), np.reshape(b, (1, -1, 4))
    sides = np.minimum(left[..., 2:], right[..., 2:]) - np.maximum(left[..., :2], right[..., :2])  # (A, B, 2)
    shared = sides.clip(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (left, right)]
    ious: np.ndarray[Any, Any] = shared / (areas[0] + areas[1] - shared)
    return ious


def match(findings: Sequence[Finding], things: Sequence[Thing]) -> list[Finding | None]:
    """For each thing the finding at its place (best sum of IoU over all pairs), None where IoU is below MATCH_IOU."""
    matched: list[Finding | None] = [None] * len(things)
    if findings and things:
        ious = box_ious([t.box for t in things], [f.box for f in findings])  # (things, findings)
        for thing, finding in zip(*linear_sum_assignment(ious, maximize=True), strict=True):
            if ious[thing, finding] >= MATCH_IOU:
                matched[thing] = findings[finding]
    return matched
