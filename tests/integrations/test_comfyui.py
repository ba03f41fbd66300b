"""The ComfyUI nodes' functions, called as ComfyUI calls them; ComfyUI itself is not here."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import ROOT, load_base, tiny_base_folder, tiny_bundle_folder

import mifo
from mifo.bundle.store import load_bundle
from mifo.errors import InputError


@pytest.fixture(scope="module")
def pack() -> Any:
    """Imported from its folder under another name, as ComfyUI imports custom nodes."""
    folder = ROOT / "integrations" / "comfyui"
    spec = importlib.util.spec_from_file_location("custom_nodes_mifo", folder / "__init__.py",
                                                  submodule_search_locations=[str(folder)])  # fmt: skip
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_nodes_mifo"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(pack: Any) -> Any:
    (found,) = run(pack, "MifoLoadBundle", bundle=str(tiny_bundle_folder()), base_model=str(tiny_base_folder()), precision="no")
    return found


def run(pack: Any, name: str, **inputs: Any) -> Any:
    """With the defaults that ComfyUI fills in; inputs that a node does not state are an error."""
    node = pack.NODE_CLASS_MAPPINGS[name]
    stated = node.INPUT_TYPES()
    required = {k: v[1]["default"] for k, v in stated["required"].items() if len(v) > 1 and "default" in v[1]}
    assert set(inputs) <= {*stated["required"], *stated.get("optional", {})}
    result = getattr(node(), node.FUNCTION)(**{**required, **inputs})
    assert len(result) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return result


def test_boxes_draw_what_the_api_draws(pack: Any, loaded: Any) -> None:
    prompt, boxes = "a photo of <asset0> and <asset1>", [[0.0, 0.25, 0.5, 0.75], [0.5, 0.25, 1.0, 0.75]]
    pixels = [{"x": 0, "y": 32, "width": 64, "height": 64}, {"x": 64, "y": 32, "width": 64, "height": 64}]
    (images,) = run(pack, "MifoPlaceInBoxes", bundle=loaded, prompt=prompt, boxes=pixels, num_images=2, seed=5, steps=2)
    assert images.shape == (2, 128, 128, 3) and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    from mifo.config import with_steps
    from mifo.presets import synthesis_preset

    base = load_base()
    config = with_steps(synthesis_preset(base.family), 2)
    expected = mifo.synthesize(base, load_bundle(tiny_bundle_folder()), prompt, boxes, num_images=2, seed=5, config=config)
    assert np.array_equal((images * 255).round().byte().numpy(), np.stack([np.asarray(i) for i in expected.images]))
    (text,) = run(pack, "MifoPlaceInBoxes", bundle=loaded, prompt=prompt, boxes_text=str(boxes), num_images=2, seed=5, steps=2)
    assert torch.equal(text, images)
    (free,) = run(pack, "MifoPlaceInBoxes", bundle=loaded, prompt=prompt, num_images=2, seed=5, steps=2)
    assert not torch.equal(free, images)


def test_an_edit_keeps_every_pixel_outside_the_mask(pack: Any, loaded: Any) -> None:
    image, mask = torch.rand(1, 96, 160, 3).mul(255).round() / 255, torch.zeros(1, 96, 160)
    mask[:, 20:80, 40:110] = 1
    (found,) = run(pack, "MifoEdit", bundle=loaded, image=image, mask=mask, prompt="a photo of <asset1>", steps=2, num_images=2)
    assert found.shape == (2, 96, 160, 3)
    outside = mask[0] == 0
    assert torch.equal((found * 255).round()[:, outside], (image * 255).round().expand(2, -1, -1, -1)[:, outside])
    assert (found[:, ~outside] - image[:, ~outside]).abs().max() > 0.1


def test_boxes_in_any_shape_that_nodes_give(pack: Any) -> None:
    fractions, expected = sys.modules["custom_nodes_mifo.nodes"].fractions, [[0.25, 0.5, 0.5, 1.0]]
    box = {"x": 64, "y": 128, "width": 64, "height": 128}
    for given in (box, [box], [[box], [box]], [[64, 128, 128, 256]], [[0.25, 0.5, 0.5, 1.0]], "[[64, 128, 128, 256]]"):
        assert fractions(given, (256, 256)) == expected, given
    with pytest.raises(ValueError, match="expected x, y"):
        fractions([{"left": 1}], (10, 10))


def test_what_is_wrong_is_said(pack: Any, loaded: Any) -> None:
    with pytest.raises(InputError, match="box"):
        run(pack, "MifoPlaceInBoxes", bundle=loaded, prompt="a photo of <asset0>", boxes_text="[[0, 0, 1, 1], [0, 0, 1, 1]]")
