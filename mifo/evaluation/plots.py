"""Charts of an evaluation, drawn by matplotlib (the extra `plots`): bars with intervals, and matrices as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..io.sheets import ASSET_COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCH = 96  # pixels
BAR_INCHES, MATRIX_INCHES, WIDTH_INCHES = 0.27, 0.62, 8.5
COLORS = ["#{:02x}{:02x}{:02x}".format(*color) for color in ASSET_COLORS]


@dataclass(frozen=True)
class Bar:
    """A value and its interval; `low` and `high` are None where there is none. `color` numbers the series."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    color: int = 0


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, one row each; values outside `span` are cut at its ends."""

    title: str
    bars: Sequence[Bar]
    span: tuple[float, float] = (0.0, 1.0)

    @property
    def inches(self) -> float:
        return 0.9 + BAR_INCHES * len(self.bars)

    def draw(self, axes: Axes) -> None:
        rows = range(len(self.bars))
        axes.barh(rows, [b.value for b in self.bars], color=[COLORS[b.color % len(COLORS)] for b in self.bars], height=0.7)
        for row, bar in zip(rows, self.bars, strict=True):
            said = f"{bar.value:.2f}"
            if bar.low is not None and bar.high is not None:
                axes.plot([bar.low, bar.high], [row, row], color="#222222", marker="|", linewidth=1.4, clip_on=True)
                said += f"  ({bar.low:.2f} to {bar.high:.2f})"
            axes.annotate(said, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        axes.set_yticks(rows, [b.label for b in self.bars], fontsize=9)
        axes.set_xlim(*self.span)
        axes.invert_yaxis()
        axes.grid(axis="x", color="#dedee2")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.axvline(0, color="#888888", linewidth=0.8)


@dataclass(frozen=True)
class MatrixChart:
    """Values in [0, 1], white to dark blue; None stays empty."""

    title: str
    rows: Sequence[Sequence[float | None]]
    row_labels: Sequence[str]
    column_labels: Sequence[str]

    @property
    def inches(self) -> float:
        return 0.9 + MATRIX_INCHES * len(self.rows)

    def draw(self, axes: Axes) -> None:
        values = [[0.0 if v is None else v for v in row] for row in self.rows]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="equal")
        for i, row in enumerate(self.rows):
            for j, value in enumerate(row):
                ink = "white" if value is not None and value > 0.6 else "#222222"
                axes.text(j, i, "-" if value is None else f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
        axes.set_yticks(range(len(self.row_labels)), self.row_labels, fontsize=9)
        axes.set_xticks(range(len(self.column_labels)), self.column_labels, fontsize=9)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)


def save_charts(charts: Sequence[BarChart | MatrixChart], path: Path) -> None:
    """Writes the charts, one under the other, as a PNG; the same values give the same bytes. Raises InputError without
    matplotlib."""
    figure = _figure()(figsize=(WIDTH_INCHES, sum(c.inches for c in charts)), dpi=INCH, layout="constrained")
    axes = figure.subplots(len(charts), 1, squeeze=False, height_ratios=[c.inches for c in charts])[:, 0]
    for chart, place in zip(charts, axes, strict=True):
        place.set_title(chart.title, loc="left", fontsize=10)
        chart.draw(place)
    figure.savefig(path, format="png", metadata={"Software": None})


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    try:
        _figure()
    except InputError:
        return False
    return True


def _figure() -> Any:
    """matplotlib's own class: no window system is looked for, and nothing global is changed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("charts need matplotlib; install it with: pip install 'mifo[plots]'") from None
    return Figure
