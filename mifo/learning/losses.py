"""The method's losses as pure functions of tensors.

Attention maps are (h, w), probabilities averaged over heads; masks are (h, w) in [0, 1] at the map's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def masked_diffusion_loss(prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor,
                          by_area: bool = False) -> torch.Tensor:  # fmt: skip
    """Mean squared error inside the mask (Break-A-Scene, section 3.2). (B, C, h, w) twice, mask (B, 1, h, w).

    The mean runs over the whole picture, so small instances weigh little; `by_area` divides by the mask's area instead
    and lets them learn as fast as large ones.
    """
    error = (prediction.float() - target.float()).pow(2) * mask
    if by_area:
        channels = error.shape[1]
        return (error.sum((1, 2, 3)) / (mask.sum((1, 2, 3)) * channels).clamp(min=1)).mean()
    return error.mean()


def reward_loss(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """MSE(A, 0.5 M): teaches a token where it lives (MIFO, section 3)."""
    return F.mse_loss(attention.float(), 0.5 * mask)


def penalty_loss(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """MSE(A (1 - M), 0): punishes attention outside the mask, leaves the inside free (MIFO, section 3)."""
    return (attention.float() * (1 - mask)).pow(2).mean()


def relative_penalty_loss(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """MSE(A / max A (1 - M), 0): the penalty, whatever the map's strength (this project's own).

    One of many tokens has a few hundredths of a pixel's attention, whose square pulls next to nothing, and which a token can
    lower by being looked at less everywhere. Beside the map's own maximum only the place counts.
    """
    return (_relative(attention) * (1 - mask)).pow(2).mean()


def match_loss(attention: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """MSE(A / max A, M): Break-A-Scene's attention loss (section 3.3)."""
    return F.mse_loss(_relative(attention), mask)


def _relative(attention: torch.Tensor) -> torch.Tensor:
    """A map whose maximum is 1."""
    attention = attention.float()
    return attention / attention.max().clamp(min=1e-8)


def separation_loss(attentions: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean cosine similarity between the maps of every two assets; 0 for fewer than two."""
    if len(attentions) < 2:
        return torch.zeros((), device=attentions[0].device if attentions else None)
    flat = F.normalize(torch.stack([a.float().flatten() for a in attentions]), dim=1)  # (N, h*w)
    upper = torch.triu_indices(len(flat), len(flat), offset=1)
    return (flat @ flat.T)[upper[0], upper[1]].mean()
