"""Masks at the sizes at which a model looks at them: the latents', and the attention maps'.

Learning and the mask linter use these same functions, so that what the linter shows is what is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

EMPTY = 1e-6  # below this share of a cell nothing is there


@dataclass(frozen=True)
class MaskSizes:
    """Pixels of the square picture, and the heights (= widths) of its latents and of the supervised attention maps."""

    resolution: int
    latent: int
    maps: tuple[int, ...]


def filled_shares(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, 1, H, W) in [0, 1] -> (N, 1, h, w): how much of each latent pixel a mask fills."""
    return F.interpolate(masks, size, mode="area")


def mask_at_latents(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, 1, H, W) in [0, 1] -> (N, 1, h, w) of 0 and 1: the latent pixels that a mask fills by half or more.

    A mask that fills none by half, because it is thinner than a latent pixel, keeps its strongest ones: those that are at
    least half as full as its fullest.
    """
    filled = filled_shares(masks, size)
    fullest = filled.amax((2, 3), keepdim=True)
    enough = torch.where(fullest >= 0.5 - EMPTY, 0.5, fullest / 2)
    return ((filled >= enough - EMPTY) & (filled > EMPTY)).float()


def union_at_latents(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(N, 1, H, W) in [0, 1] -> (1, 1, h, w): the latent pixels that any mask holds, or that all of them fill by half."""
    together = mask_at_latents(masks.amax(0, keepdim=True), size)
    return torch.maximum(together, mask_at_latents(masks, size).amax(0, keepdim=True))


def mask_at_map(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(H, W) in [0, 1] -> (h, w) in [0, 1], as the attention losses compare it with an attention map."""
    return F.interpolate(mask[None, None], size, mode="bilinear", antialias=True)[0, 0]
