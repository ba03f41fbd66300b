"""Charts with Pillow alone: bars with intervals, and a matrix as a heat map.

Knows numbers and labels. Knows nothing of what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..io.sheets import ASSET_COLORS, PAPER, TEXT

GRID_LINE = (222, 222, 226)
BAR_HEIGHT = 18
ROW_GAP = 8
TICK = 0.25


@dataclass(frozen=True)
class Bar:
    """A value and its interval; `low` and `high` are None where there is none. `color` numbers the series."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: int = 0


def bar_chart(title: str, bars: Sequence[Bar], span: tuple[float, float] = (0.0, 1.0), width: int = 640) -> Image.Image:
    """Horizontal bars from zero, one row each, whiskers for the intervals; values outside `span` are cut at its ends."""
    font = ImageFont.load_default(13)
    left = 12 + max(int(font.getlength(b.label)) for b in bars)
    right = width - 150
    row = BAR_HEIGHT + ROW_GAP
    chart = Image.new("RGB", (width, 58 + row * len(bars)), PAPER)
    draw = ImageDraw.Draw(chart)
    draw.text((10, 8), title, TEXT, ImageFont.load_default(15))

    def at(value: float) -> float:
        cut = min(max(value, span[0]), span[1])
        return left + (right - left) * (cut - span[0]) / (span[1] - span[0])

    for k in range(math.ceil(span[0] / TICK), math.floor(span[1] / TICK) + 1):
        tick = k * TICK
        draw.line([at(tick), 32, at(tick), chart.height - 22], GRID_LINE)
        draw.text((at(tick), chart.height - 20), f"{tick:g}", TEXT, font, anchor="ma")
    for k, bar in enumerate(bars):
        top = 36 + k * row
        middle = top + BAR_HEIGHT / 2
        draw.text((left - 6, middle), bar.label, TEXT, font, anchor="rm")
        zero, end = sorted((at(0.0), at(bar.value)))
        draw.rectangle([zero, top, max(zero + 1, end), top + BAR_HEIGHT], fill=ASSET_COLORS[bar.color % len(ASSET_COLORS)])
        said = f"{bar.value:.2f}"
        if bar.low is not None and bar.high is not None:
            draw.line([at(bar.low), middle, at(bar.high), middle], TEXT, 2)
            for value in (bar.low, bar.high):
                draw.line([at(value), middle - 5, at(value), middle + 5], TEXT, 2)
            said += f"  ({bar.low:.2f} to {bar.high:.2f})"
        draw.text((right + 10, middle), said, TEXT, font, anchor="lm")
    return chart


def matrix_chart(title: str, rows: Sequence[Sequence[float | None]], row_labels: Sequence[str],
                 column_labels: Sequence[str]) -> Image.Image:  # fmt: skip
    """A heat map of values in [0, 1], white to dark blue; None stays empty."""
    font, cell = ImageFont.load_default(13), 64
    left = 14 + max(int(font.getlength(label)) for label in row_labels)
    width = max(left + cell * len(column_labels) + 14, 28 + int(ImageFont.load_default(15).getlength(title)))
    chart = Image.new("RGB", (width, 64 + cell * len(rows)), PAPER)
    draw = ImageDraw.Draw(chart)
    draw.text((10, 8), title, TEXT, ImageFont.load_default(15))
    for j, label in enumerate(column_labels):
        draw.text((left + (j + 0.5) * cell, 44), label, TEXT, font, anchor="mm")
    for i, row in enumerate(rows):
        draw.text((left - 6, 54 + (i + 0.5) * cell), row_labels[i], TEXT, font, anchor="rm")
        for j, value in enumerate(row):
            corner = (left + j * cell, 54 + i * cell)
            depth = 0.0 if value is None else min(1.0, max(0.0, value))
            fill = (round(255 - 215 * depth), round(255 - 165 * depth), round(255 - 75 * depth))
            draw.rectangle([*corner, corner[0] + cell - 3, corner[1] + cell - 3], fill=fill, outline=GRID_LINE)
            said = "-" if value is None else f"{value:.2f}"
            ink = PAPER if depth > 0.6 else TEXT
            draw.text((corner[0] + cell / 2, corner[1] + cell / 2), said, ink, font, anchor="mm")
    return chart


def below(charts: Sequence[Image.Image], gap: int = 14) -> Image.Image:
    """Charts under each other."""
    sheet = Image.new("RGB", (max(c.width for c in charts), sum(c.height + gap for c in charts)), PAPER)
    top = 0
    for chart in charts:
        sheet.paste(chart, (0, top))
        top += chart.height + gap
    return sheet
