"""Contrast: each of several assets in boxes is led away from what the words of the others would draw there.

noise += scale * (prediction with the asset's own text - prediction with a text of the others), inside the boxes. This project's
own; classifier-free guidance (Ho and Salimans, arXiv 2207.12598) does the same with no text in the place of the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel

from ..attention.bounded import BoundedAttention, ForwardPass
from ..boxes import Layout
from ..config import SynthesisConfig
from ..errors import InputError
from ..model.base import BaseModel
from ..model.prompt_embeds import ImageSize, PromptEmbeds, predict
from .layout_control import encode_texts


@dataclass(frozen=True)
class Contrast:
    """The denoising loop's `add_noise`. The UNet must be under `bound_attention(unet, control)`."""

    unet: UNet2DConditionModel
    control: BoundedAttention
    scale: float
    others: PromptEmbeds
    """(1, T * L, D): `control.texts_of_others`, one behind another"""

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) latents and conditional prediction -> (B, C, h, w) that is added to the noise, 0 outside all boxes."""
        with self.control.meanwhile(ForwardPass(len(latents), unconditional=False)):
            of_others = predict(self.unet, latents, timestep, self.others.expand(len(latents))).float()
        size = (latents.shape[-2], latents.shape[-1])
        inside = self.control.subject_masks(size).any(1).unflatten(-1, size)[:, None]  # (B or 1, 1, h, w)
        added: torch.Tensor = self.scale * inside * (conditional - of_others)
        return added


def make_contrast(base: BaseModel, config: SynthesisConfig, control: BoundedAttention | None, negative: Sequence[int],
                  size: ImageSize | None = None) -> Contrast | None:  # fmt: skip
    """None where it is not asked for, or where nothing or a single asset is in a box. `negative`: token ids (L,) of the negative
    prompt; `size`: of the picture. Raises InputError as `check_contrast`."""
    if not config.contrast_scale or control is None or len(control.layout) < 2:
        return None
    check_contrast(config, control.layout, by_place=base.local_lora is not None)
    others, _ = encode_texts(base, control.texts_of_others, negative, size)
    return Contrast(base.unet, control, config.contrast_scale, others)


def check_contrast(config: SynthesisConfig, layout: Layout | None, by_place: bool) -> None:
    """Raises InputError where contrast is asked for and there are no two assets in boxes, each with a text of its own, or where
    LoRA acts by place."""
    if not config.contrast_scale:
        return
    asked = f"a contrast scale of {config.contrast_scale:g}"
    if layout is None or len(layout) < 2:
        raise InputError(f"{asked} leads assets in boxes away from each other, and there are {len(layout or ())} in boxes; give "
                         "--boxes for two or more, or leave it out")  # fmt: skip
    if not (config.own_text and config.bounded):
        raise InputError(f"{asked} needs a text of each asset's own; leave out --no-own-text and --no-bounded")
    if by_place:
        raise InputError(f"{asked} does not go with several bundles or --lora-place boxes; leave it out")
