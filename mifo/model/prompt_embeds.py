"""What a UNet is told beside the latents: the texts' hidden states, and for SDXL the pooled text and the picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel


@dataclass(frozen=True)
class ImageSize:
    """SDXL's size and crop conditioning (Podell et al., arXiv 2307.01952, section 2.2), in pixels, each (height, width) or
    (top, left)."""

    original: tuple[int, int]
    target: tuple[int, int]
    crop: tuple[int, int] = (0, 0)

    @property
    def numbers(self) -> tuple[int, ...]:
        """As the UNet wants them."""
        return (*self.original, *self.crop, *self.target)


@dataclass(frozen=True)
class PromptEmbeds:
    """One row a text, or one row for all."""

    states: torch.Tensor
    """(B, L, D) encoder hidden states"""
    pooled: torch.Tensor | None = None
    """(B, P), where the family has it"""
    time_ids: torch.Tensor | None = None
    """(B, 6), `ImageSize.numbers`, where the family has it"""

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> PromptEmbeds:
        return self._each(lambda tensor: tensor[rows])

    def expand(self, rows: int) -> PromptEmbeds:
        """One row as many; as many rows as they are."""
        return self._each(lambda tensor: tensor.expand(rows, *(-1,) * (tensor.ndim - 1)))

    def first_tokens(self, length: int) -> PromptEmbeds:
        """The first text of several that stand one behind another."""
        return replace(self, states=self.states[:, :length])

    def one_behind_another(self) -> PromptEmbeds:
        """(1, T * L, D) of T texts. What is said of the picture as a whole is the first text's."""
        first = self[:1]
        return replace(first, states=self.states.flatten(0, 1)[None])

    def repeated(self, texts: int) -> PromptEmbeds:
        """One text as often as that, one behind another."""
        return replace(self, states=self.states.repeat(1, texts, 1))

    @property
    def conditions(self) -> dict[str, torch.Tensor] | None:
        """`added_cond_kwargs` of diffusers' UNets."""
        if self.pooled is None or self.time_ids is None:
            return None
        return {"text_embeds": self.pooled, "time_ids": self.time_ids}

    def _each(self, change: Any) -> PromptEmbeds:
        pooled, ids = self.pooled, self.time_ids
        return PromptEmbeds(change(self.states), None if pooled is None else change(pooled), None if ids is None else change(ids))


def joined(parts: Sequence[PromptEmbeds]) -> PromptEmbeds:
    """Their rows, one below another."""
    pooled = [p.pooled for p in parts if p.pooled is not None]
    ids = [p.time_ids for p in parts if p.time_ids is not None]
    return PromptEmbeds(torch.cat([p.states for p in parts]), torch.cat(pooled) if pooled else None,
                        torch.cat(ids) if ids else None)  # fmt: skip


def predict(unet: UNet2DConditionModel, latents: torch.Tensor, timesteps: torch.Tensor, embeds: PromptEmbeds) -> torch.Tensor:
    """The UNet's own prediction, (B, C, h, w) in its dtype, of `latents` (B, C, h, w) with a row of `embeds` for each."""
    inputs = latents.to(first_weight(unet).dtype)
    prediction: torch.Tensor = unet(inputs, timesteps, embeds.states, added_cond_kwargs=embeds.conditions).sample
    return prediction


def first_weight(unet: UNet2DConditionModel) -> torch.Tensor:
    """Of the convolution that every UNet begins with and nothing quantizes: it has the device and the dtype of them all.
    diffusers' own `unet.device` and `unet.dtype` walk through all modules, which takes as long as a layer."""
    weight: torch.Tensor = unet.conv_in.weight
    return weight
