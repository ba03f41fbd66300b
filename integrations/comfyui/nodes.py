"""Three nodes over mifo's Python API. Pictures are ComfyUI's own (B, H, W, 3) floats in [0, 1], masks (B, H, W)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

import mifo
from mifo.config import with_steps
from mifo.presets import edit_preset, synthesis_preset

CATEGORY = "mifo"
SEED = ("INT", {"default": 0, "min": 0, "max": 2**31 - 1})
STEPS = ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0 takes the base model's preset"})
COUNT = ("INT", {"default": 1, "min": 1, "max": 16})
PROMPT = ("STRING", {"default": "a photo of <asset0> and <asset1>", "multiline": True})


@lru_cache(maxsize=1)
def _base(name: str, precision: str) -> Any:
    """The last one stays in memory: it takes seconds to load, and each prompt asks for it again."""
    return mifo.load_base_model(name, precision=precision)


class LoadBundle:
    """A learned bundle with its base model."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "load", ("MIFO_BUNDLE",), ("bundle",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"bundle": ("STRING", {"default": "Model_ours/toy_car"}),
                             "base_model": ("STRING", {"default": "toybox"}),
                             "precision": (["auto", "no", "fp16", "bf16"],)}}  # fmt: skip

    def load(self, bundle: str, base_model: str, precision: str = "auto") -> tuple[tuple[Any, Any]]:
        return ((_base(base_model, precision), mifo.load_bundle(bundle)),)


class PlaceInBoxes:
    """Each asset of the prompt in its box, in the prompt's order."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "place", ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"bundle": ("MIFO_BUNDLE",), "prompt": PROMPT, "num_images": COUNT, "seed": SEED, "steps": STEPS},
                "optional": {"boxes": ("BOUNDING_BOXES",),
                             "boxes_text": ("STRING", {"default": "", "tooltip": "[[x0, y0, x1, y1], ...] from 0 to 1"}),
                             "boxes_from": ("IMAGE", {"tooltip": "The picture in whose pixels the boxes are"})}}  # fmt: skip

    def place(self, bundle: tuple[Any, Any], prompt: str, num_images: int = 1, seed: int = 0, steps: int = 0, boxes: Any = None,
              boxes_text: str = "", boxes_from: torch.Tensor | None = None) -> tuple[torch.Tensor]:  # fmt: skip
        base, learned = bundle
        size = (base.resolution, base.resolution) if boxes_from is None else (boxes_from.shape[2], boxes_from.shape[1])
        layout = boxes_text.strip() or (fractions(boxes, size) if boxes is not None else None)
        config = with_steps(synthesis_preset(base.family), steps or None)
        drawn = mifo.synthesize(base, learned, prompt, layout, num_images=num_images, seed=seed, config=config)
        return (to_tensor(drawn.images),)


class EditPicture:
    """The prompt drawn into a mask; every other pixel stays. Candidates come best first."""

    CATEGORY, FUNCTION, RETURN_TYPES, RETURN_NAMES = CATEGORY, "edit", ("IMAGE",), ("images",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"bundle": ("MIFO_BUNDLE",), "image": ("IMAGE",), "mask": ("MASK",),
                             "prompt": ("STRING", {"default": "a photo of <asset0>", "multiline": True}),
                             "num_images": COUNT, "seed": SEED, "steps": STEPS}}  # fmt: skip

    def edit(self, bundle: tuple[Any, Any], image: torch.Tensor, mask: torch.Tensor, prompt: str, num_images: int = 1,
             seed: int = 0, steps: int = 0) -> tuple[torch.Tensor]:  # fmt: skip
        base, learned = bundle
        picture = Image.fromarray((image[0].clamp(0, 1) * 255).round().byte().cpu().numpy())
        white = (mask if mask.ndim == 2 else mask[0]).cpu().numpy() > 0.5
        config = with_steps(edit_preset(base.family), steps or None)
        found = mifo.edit(base, learned, picture, white, prompt, num_images=num_images, seed=seed, config=config)
        return (to_tensor(found.images),)


def fractions(boxes: Any, size: tuple[int, int]) -> list[list[float]]:
    """[[x0, y0, x1, y1], ...] from 0 to 1, of boxes in pixels of a picture of `size` (width, height).

    A box is a mapping with x, y, width and height, or four numbers x0, y0, x1, y1; several are a list of them, and of a batch the
    first picture's. Numbers that are all at most 1 are fractions already. Raises ValueError for anything else.
    """
    if isinstance(boxes, str):
        boxes = json.loads(boxes)
    if isinstance(boxes, Mapping):
        boxes = [boxes]
    if len(boxes) and isinstance(boxes[0], Sequence) and len(boxes[0]) and not isinstance(boxes[0][0], int | float):
        boxes = boxes[0]
    found = []
    for box in boxes:
        if isinstance(box, Mapping) and {"x", "y", "width", "height"} <= set(box):
            x, y = float(box["x"]), float(box["y"])
            corners = [x, y, x + float(box["width"]), y + float(box["height"])]
        elif not isinstance(box, Mapping) and len(box) == 4:
            corners = [float(value) for value in box]
        else:
            raise ValueError(f"a box is {str(box)[:100]}; expected x, y, width and height, or x0, y0, x1, y1")
        found.append(corners)
    if all(value <= 1 for corners in found for value in corners):
        return found
    width, height = size
    return [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in found]


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """(B, H, W, 3) floats in [0, 1]"""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).float() / 255


NODE_CLASS_MAPPINGS = {"MifoLoadBundle": LoadBundle, "MifoPlaceInBoxes": PlaceInBoxes, "MifoEdit": EditPicture}
NODE_DISPLAY_NAME_MAPPINGS = {"MifoLoadBundle": "Load mifo bundle", "MifoPlaceInBoxes": "Place assets in boxes",
                              "MifoEdit": "Put an asset into a picture"}  # fmt: skip
