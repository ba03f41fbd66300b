"""SAM 2 (Ravi et al., arXiv 2408.00714) through transformers: a mask for each box and its points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from ..model.hub_models import load
from .grabcut import BoolArray
from .hints import Hint

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, with which SAM 2 was trained


class Sam2:
    """`name`: a hub id such as facebook/sam2.1-hiera-small, or a folder. Raises InputError when it cannot be had, or is none."""

    name = "sam2"

    def __init__(self, name: str, device: str = "cpu"):
        from transformers import Sam2Model

        self.model, _, self.revision = load("sam2", name, Sam2Model, None, device)
        if self.model.config.model_type not in ("sam2", "sam2_video"):
            raise InputError(f"'{name}' is no SAM 2 model; give one such as facebook/sam2.1-hiera-small")
        self.side = int(self.model.config.vision_config.backbone_config.image_size[0])

    @torch.no_grad()
    def masks(self, image: Image.Image, hints: Sequence[Hint]) -> list[BoolArray]:
        """(H, W) for each hint. The picture is looked at once, at the model's own square size, squashed as it was trained."""
        square = image.convert("RGB").resize((self.side, self.side), Image.Resampling.BILINEAR)
        pixels = (np.asarray(square, np.float32) / 255 - MEAN) / DEVIATION
        inputs = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.model.device, self.model.dtype)
        embeddings = self.model.get_image_embeddings(inputs)
        return [self._mask(embeddings, hint, image.size) for hint in hints]

    def _mask(self, embeddings: Any, hint: Hint, size: tuple[int, int]) -> BoolArray:
        box = torch.tensor([[[v * self.side for v in hint.box.as_tuple()]]], device=self.model.device)  # (1, 1, 4)
        prompts: dict[str, Any] = {"input_boxes": box}
        if hint.points:
            points = [[x * self.side, y * self.side] for x, y in hint.points]
            prompts["input_points"] = torch.tensor([[points]], device=self.model.device)  # (1, 1, P, 2)
            prompts["input_labels"] = torch.ones((1, 1, len(points)), dtype=torch.int, device=self.model.device)
        logits = self.model(image_embeddings=embeddings, multimask_output=False, **prompts).pred_masks  # (1, 1, 1, h, w)
        large = torch.nn.functional.interpolate(logits.float()[:, 0], (size[1], size[0]), mode="bilinear", align_corners=False)
        found: BoolArray = (large[0, 0] > 0).cpu().numpy()
        return found
