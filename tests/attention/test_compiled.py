"""Compiled blocks: the same pictures, without a graph break, and the model as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import load_base, mifo, tiny_bundle_folder
from PIL import Image
from torch._dynamo.utils import counters

from mifo.api import edit, load_bundle, synthesize
from mifo.attention.compiled import compile_blocks, is_compiled, repeated_blocks
from mifo.config import SynthesisConfig
from mifo.model.base import BaseModel
from mifo.presets import edit_preset, synthesis_preset

BOXES = [[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]


@pytest.fixture(autouse=True)
def compiled_code_is_forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def quick() -> SynthesisConfig:
    """Two steps are guided, and in the rest refinement is due every other time."""
    preset = synthesis_preset("toybox")
    guidance = replace(preset.guidance, steps=2, max_iterations=2)
    return replace(preset, guidance=guidance, refinement=replace(preset.refinement, every_steps=2))


def draw(base: BaseModel, boxes: Any = BOXES, seed: int = 0, steps: int = 5, contrast: float = 0.0) -> np.ndarray:
    bundle, config = load_bundle(tiny_bundle_folder()), replace(quick(), steps=steps, contrast_scale=contrast)
    result = synthesize(base, bundle, "a photo of <asset0> and <asset1>", boxes, seed=seed, config=config, num_images=2)
    return np.stack([np.asarray(image, dtype=int) for image in result.images])


@pytest.mark.parametrize(("boxes", "contrast"), [(BOXES, 0.0), (BOXES, 1.0), (None, 0.0)])
def test_compiled_blocks_draw_the_same_without_a_graph_break(boxes: Any, contrast: float) -> None:
    base = load_base()
    expected = draw(base, boxes, contrast=contrast)
    with compile_blocks(base.unet, backend="eager"):
        assert is_compiled(base.unet)
        found = draw(base, boxes, contrast=contrast)
        graphs = counters["stats"]["unique_graphs"]
        again = draw(base, boxes, seed=1, steps=7, contrast=contrast)
    # `fullgraph` makes an error of a break as well; the levels of gray are those of sums in another order
    assert not counters["graph_break"] and graphs >= 1
    assert abs(found - expected).max() <= 1
    assert counters["stats"]["unique_graphs"] == graphs  # another seed and more steps: nothing is compiled anew
    assert abs(again - found).max() > 1


def test_an_edit_in_compiled_blocks_is_the_same() -> None:
    base, bundle = load_base(), load_bundle(tiny_bundle_folder())
    image, mask = Image.effect_noise((128, 96), 80).convert("RGB"), np.zeros((96, 128), bool)
    mask[20:80, 30:100] = True
    config = replace(edit_preset("toybox"), steps=4, guidance=replace(quick().guidance, steps=1))
    found = []
    for compiled in (False, True):
        with compile_blocks(base.unet, compiled, backend="eager"):
            result = edit(base, bundle, image, mask, "a photo of <asset1>", config=config)
        found.append(np.asarray(result.images[0], dtype=int))
    assert not counters["graph_break"] and abs(found[0] - found[1]).max() <= 1
    assert (found[1][~mask] == np.asarray(image)[~mask]).all()


@pytest.mark.parametrize("failing", [False, True])
def test_afterwards_the_model_is_as_it_was(failing: bool) -> None:
    base = load_base()
    limit = torch._dynamo.config.recompile_limit
    try:
        with compile_blocks(base.unet, backend="eager"):
            if failing:
                raise KeyError("stopped")
    except KeyError:
        pass
    assert not is_compiled(base.unet) and torch._dynamo.config.recompile_limit == limit
    assert all(block._compiled_call_impl is None for block in repeated_blocks(base.unet))
    with compile_blocks(base.unet, enabled=False):
        assert not is_compiled(base.unet)


def test_without_a_compiler_one_message_says_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/nowhere/c++"))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    result = mifo("synthesize", tiny_bundle_folder(), "--prompt", "a photo of <asset0>", "--steps", 2, "--compile",
                  "--output-path", tmp_path / "out", exit_code=2)  # fmt: skip
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--compile cannot be used here" in errors[0] and "leave --compile out" in errors[0]
    assert not (tmp_path / "out").exists()
