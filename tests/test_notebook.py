"""The notebook runs from top to bottom and shows its pictures, in a part of the steps: no test of quality."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from _tiny import ROOT

SHORT = """
from dataclasses import replace
import mifo.api
whole = mifo.api.learn_preset
def short(family, assets):
    config = whole(family, assets=assets)
    return replace(config, embedding=replace(config.embedding, train_steps=15), lora=replace(config.lora, train_steps=10),
                   prior=replace(config.prior, num_class_images=2),
                   composites=replace(config.composites, num_backgrounds=2))
mifo.api.learn_preset = short

draws = mifo.api.synthesis_preset
def hasty(family):
    config = draws(family)
    return replace(config, steps=6, guidance=replace(config.guidance, steps=2))
mifo.api.synthesis_preset = hasty
"""


def test_the_quickstart_notebook_runs_and_shows_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(ROOT / "example" / "toy_car", tmp_path / "toy_car")
    notebook = nbformat.read(ROOT / "example" / "quickstart.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHORT))
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert any("identity" in output.get("text", "") for output in outputs)
