"""Boxes -> what a denoising loop needs to hold assets in them: bounded attention, texts, and hooks around each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention.bounded import BoundedAttention, ForwardPass
from ..attention.sites import smallest_map
from ..boxes import Layout
from ..config import SynthesisConfig
from ..model.base import BaseModel
from ..model.prompt_embeds import ImageSize, PromptEmbeds
from ..prompts import TokenizedPrompt
from .denoise import is_guided
from .guidance import LatentGuidance, MaskRefinement


def latent_shape(base: BaseModel, config: SynthesisConfig) -> tuple[int, int]:
    """(h, w) of the latents. Raises InputError unless width and height are multiples that the UNet can halve and double."""
    sides = []
    for name, value in (("height", config.height), ("width", config.width)):
        pixels = value if value is not None else base.resolution
        base.check_side(f"--{name}", pixels)
        sides.append(pixels // base.vae_factor)
    return sides[0], sides[1]


def check_boxes(base: BaseModel, layout: Layout, latent_size: tuple[int, int]) -> None:
    """Raises InputError for a box that has no pixel on the model's smallest attention map."""
    smallest = smallest_map(base.unet, *latent_size)
    for _, box in layout:
        box.check_visible(*smallest)


def encode_texts(base: BaseModel, texts: Sequence[Sequence[int]], negative: Sequence[int],
                 size: ImageSize | None = None) -> tuple[PromptEmbeds, PromptEmbeds]:  # fmt: skip
    """Token ids (T, L), (L,) -> embeds (1, T * L, D) of the texts, one behind another, and as many of the negative prompt's:
    repeated, so that its half of the attention is what it is for one. `size`: of the picture."""
    with torch.no_grad():
        if base.zero_negative:
            prompts = base.encode_prompt(torch.tensor([*texts]), size)
            empty = base.encode_negative(torch.tensor([negative]), size)
        else:
            both = base.encode_prompt(torch.tensor([*texts, negative]), size)
            prompts, empty = both[:-1], both[-1:]
    return prompts.one_behind_another(), empty.repeated(len(texts))


def layout_control(base: BaseModel, config: SynthesisConfig, prompt: TokenizedPrompt, layout: Layout | None,
                   latent_size: tuple[int, int], count: int) -> BoundedAttention | None:  # fmt: skip
    """What bounds attention to the boxes of `layout`; None where there are none, or nothing shall be bounded or guided."""
    if layout is None or not (config.bounded or config.guidance.enabled):
        return None
    return BoundedAttention(prompt, layout, latent_size, base.device, config.own_text and config.bounded, config.bounded,
                            sampling=ForwardPass(count, unconditional=is_guided(config.guidance_scale)))  # fmt: skip


class LayoutHooks:
    """The hooks of one run: box guidance before a step, mask refinement around it."""

    def __init__(self, base: BaseModel, config: SynthesisConfig, control: BoundedAttention | None, prompt_embeds: PromptEmbeds):
        self.guidance: LatentGuidance | None = None
        self.refinement: MaskRefinement | None = None
        if control is None:
            return
        self.guidance = LatentGuidance(base.unet, control, config.guidance, prompt_embeds)
        if config.bounded and config.refinement.enabled:
            self.refinement = MaskRefinement(base.unet, control, config.refinement, config.guidance.steps)

    def before_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if self.guidance:
            latents = self.guidance.guide(step, timestep, latents)
        if self.refinement:
            self.refinement.before(step)
        return latents

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if self.refinement:
            self.refinement.after(step)
        return latents
