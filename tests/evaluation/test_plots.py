"""Charts: the same values give the same picture, and without matplotlib everything else is there."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mifo.errors import InputError
from mifo.evaluation.plots import Bar, BarChart, MatrixChart, can_plot, save_charts

CHARTS = [
    BarChart("one asset alone", [Bar("identity", 0.8, 0.7, 0.9), Bar("confused", 0.1, color=1)], (-0.25, 1.0)),
    MatrixChart("crops against instances", [[0.9, None], [0.2, 1.0]], ["asset0", "asset1"], ["asset0", "asset1"]),
]


def colored(path: Path) -> float:
    """The number of pixels as red as the first series' bars."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float(((pixels[..., 0] - pixels[..., 1] > 120) & (pixels[..., 0] > 180)).sum())


def test_the_same_values_give_the_same_bytes_and_longer_bars_more_ink(tmp_path: Path):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        save_charts(CHARTS, tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    save_charts([BarChart("", [Bar("identity", 0.4)], (0.0, 1.0))], tmp_path / "short.png")
    save_charts([BarChart("", [Bar("identity", 0.8)], (0.0, 1.0))], tmp_path / "long.png")
    assert colored(tmp_path / "long.png") == pytest.approx(2 * colored(tmp_path / "short.png"), rel=0.05)


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert not can_plot()
    with pytest.raises(InputError, match=r"pip install 'mifo\[plots\]'"):
        save_charts(CHARTS, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
