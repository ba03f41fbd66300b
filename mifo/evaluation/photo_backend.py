"""The photo back end: DINOv2 for identity, CLIP for prompts, OWLv2 for detections, all through transformers.

Similarities are cosines of class tokens: comparable within one run, not a share of anything. Model names are hub ids or local
folders; only configurations and safetensors are read, never pickles or code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.instance import Instance
from ..errors import InputError
from ..model.base import public_name
from ..model.hub_models import CLIP, DETECTOR, DINO, load
from ..prompts import ASSET_PATTERN
from .backend import Detection, Seen
from .metrics import Array, BoxTuple, box_ious

GREY = (127, 127, 127)  # around a masked source crop, and around a crop that is no square
MAX_OVERLAP = 0.5  # IoU above which two detections are the same thing
DEFAULT_WORD = "object"


class PhotoBackend:
    """The back end of one instance. Raises InputError when a model cannot be had or is of another kind."""

    name = "photo"
    thresholds: tuple[float, ...] = (0.4, 0.5, 0.6)
    sees_all = False
    unrelated_prompts: tuple[str, ...] = (
        "a photo of a lighthouse at sunset", "a bowl of fruit on a kitchen table", "a street in the rain at night",
        "a mountain lake in summer", "a portrait of an old sailor", "a stack of books beside a window",
    )  # fmt: skip

    def __init__(self, instance: Instance, device: str = "cpu", dino: str = DINO, clip: str = CLIP, detector: str = DETECTOR,
                 min_score: float = 0.2):  # fmt: skip
        from transformers import AutoImageProcessor, AutoModel, AutoModelForZeroShotObjectDetection, AutoProcessor

        self.models = {"dino": dino, "clip": clip, "detector": detector}
        self.device, self.min_score = device, min_score
        self.words = instance.words or (DEFAULT_WORD,) * instance.count
        self.revisions: dict[str, str | None] = {}
        self.dino, self.dino_pixels, self.revisions["dino"] = load("dino", dino, AutoModel, AutoImageProcessor, device)
        self.clip, self.clip_inputs, self.revisions["clip"] = load("clip", clip, AutoModel, AutoProcessor, device)
        self.detector, self.detector_inputs, self.revisions["detector"] = load(
            "detector", detector, AutoModelForZeroShotObjectDetection, AutoProcessor, device
        )
        if not hasattr(self.clip, "logit_scale") or not hasattr(self.detector_inputs, "post_process_grounded_object_detection"):
            raise InputError(f"'{clip}' must be a CLIP model and '{detector}' an OWL-ViT or OWLv2 detector; give other ones")
        crops = [source_crop(instance.image, mask) for mask in instance.masks]
        self.sources = self._embed(crops)  # (N, D)

    def facts(self) -> dict[str, Any]:
        models = {kind: _public(name) for kind, name in self.models.items()}
        return {"name": self.name, "models": models, "revisions": self.revisions,
                "min_detection_score": self.min_score, "words": list(self.words),
                "similarity": "cosine of DINOv2 class tokens; the source crop is masked, the other is cut by its box",
                "distance": "1 - cosine of DINOv2 class tokens of the whole pictures",
                "prompt_fit": "cosine of CLIP's embeddings of the picture and of the prompt"}  # fmt: skip

    def among_sources(self) -> Array:
        return (self.sources @ self.sources.T).double().cpu().numpy()

    @torch.no_grad()
    def see(self, images: Sequence[Image.Image]) -> list[Seen]:
        queries = [f"a photo of {word}" for word in dict.fromkeys(self.words)]
        seen = []
        for image in images:
            inputs = self.detector_inputs(text=[queries], images=image, return_tensors="pt", truncation=True).to(self.device)
            size = torch.tensor([[image.height, image.width]])
            (found,) = self.detector_inputs.post_process_grounded_object_detection(
                self.detector(**inputs), threshold=self.min_score, target_sizes=size
            )
            detections = [_detection(box, float(score), queries[int(label)], image) for box, score, label in
                          zip(found["boxes"].tolist(), found["scores"], found["labels"], strict=True)]  # fmt: skip
            seen.append(Seen(image, without_repeats([d for d in detections if d])))
        return seen

    def similarity(self, seen: Seen, boxes: Sequence[BoxTuple | None]) -> Array:
        rows = np.zeros((len(boxes), len(self.sources)))
        present = [k for k, box in enumerate(boxes) if box is not None]
        if present:
            crops = [_cut(seen.image, boxes[k]) for k in present]
            rows[present] = (self._embed(crops) @ self.sources.T).double().cpu().numpy()
        return rows

    @torch.no_grad()
    def prompt_fit(self, seen: Seen, prompt: str, assets: Sequence[int]) -> float | None:
        """Raises nothing: CLIP reads its first 77 tokens."""
        text = ASSET_PATTERN.sub(lambda m: self.words[int(m.group()[6:-1])], prompt)
        inputs = self.clip_inputs(text=[text], images=seen.image, return_tensors="pt", padding=True, truncation=True)
        out = self.clip(**inputs.to(self.device))
        return float(F.cosine_similarity(out.image_embeds.float(), out.text_embeds.float())[0])

    def distance(self, first: Seen, second: Seen) -> float:
        embedded = self._embed([first.image, second.image])
        return float(1 - embedded[0] @ embedded[1])

    @torch.no_grad()
    def _embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """(len(images), D) unit vectors: the class token after the last norm."""
        squares = [_to_square(image) for image in images]
        inputs = self.dino_pixels(images=squares, return_tensors="pt").to(self.device)
        return F.normalize(self.dino(**inputs).last_hidden_state[:, 0].float(), dim=-1)


def _public(name: str) -> str:
    """A hub id as it is, of a local folder the last part: records are passed on."""
    return public_name(name, os.path.realpath(name)) if os.path.isdir(name) else name


def source_crop(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The instance alone: cut to its mask's bounding box, everything else grey."""
    alone = Image.new("RGB", image.size, GREY)
    alone.paste(image, (0, 0), mask)
    return alone.crop(mask.getbbox())


def _cut(image: Image.Image, box: BoxTuple | None) -> Image.Image:
    """The crop in a box, at least one pixel."""
    x0, y0, x1, y1 = box or (0.0, 0.0, 1.0, 1.0)
    left, top = min(round(x0 * image.width), image.width - 1), min(round(y0 * image.height), image.height - 1)
    return image.crop((left, top, max(left + 1, round(x1 * image.width)), max(top + 1, round(y1 * image.height))))


def _to_square(image: Image.Image) -> Image.Image:
    """Padded, because image processors cut the longer side's ends off."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _detection(box: Sequence[float], score: float, query: str, image: Image.Image) -> Detection | None:
    """Pixels -> fractions, cut to the picture; None where nothing is left."""
    x0, x1 = (min(max(x / image.width, 0.0), 1.0) for x in (box[0], box[2]))
    y0, y1 = (min(max(y / image.height, 0.0), 1.0) for y in (box[1], box[3]))
    return Detection((x0, y0, x1, y1), score, query.removeprefix("a photo of ")) if x1 > x0 and y1 > y0 else None


def without_repeats(detections: Sequence[Detection]) -> tuple[Detection, ...]:
    """Surest first; whatever the words, what overlaps a surer one by more than MAX_OVERLAP is the same thing."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if not kept or box_ious([detection.box], [k.box for k in kept]).max() <= MAX_OVERLAP:
            kept.append(detection)
    return tuple(kept)
