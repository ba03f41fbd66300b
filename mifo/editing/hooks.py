"""What an edit does around each denoising step: guidance inside the mask, then blending, while the mask shrinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..attention.bounded import BoundedAttention
from ..sampling.guidance import LatentGuidance
from .blending import Blending
from .frame import within_length


@dataclass(frozen=True)
class EditHooks:
    """`words`: the control under which the prompt's content words keep to the mask, where the prompt names no asset."""

    blending: Blending
    guidance: LatentGuidance | None = None
    words: BoundedAttention | None = None

    def start(self, from_image: bool) -> torch.Tensor:
        """(B, C, h, w) at the first step's noise level: noise inside the mask, or, `from_image`, the noised source there too."""
        self._bind_words(0)
        return self.blending.start(from_image)

    def before_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if self.guidance is None:
            return latents
        return torch.where(self.blending.masks[step], self.guidance.guide(step, timestep, latents), latents)

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if not torch.equal(self.blending.masks[step], self.blending.masks[step + 1]):
            self._bind_words(step + 1)
        return self.blending.blend(step + 1, latents)

    def _bind_words(self, step: int) -> None:
        """The words keep to the mask as it shrinks. Beyond the ends of the true mask they say nothing: what they draw there
        would be cut away."""
        if self.words:
            masks = self.blending.masks
            region = within_length(masks[step].cpu().numpy(), masks[-1].cpu().numpy())
            self.words.refine(torch.from_numpy(region).to(masks[0].device)[None, None])
