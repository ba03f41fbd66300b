"""Which of several candidates comes closest to the asset's own picture, and to the prompt.

Two plain measures that need no further model. `asset_similarity` sees colours and edges, not things: it tells a red striped
candidate from a blue plain one, and does not know whether either is a car. `prompt_similarity` asks the diffusion model itself
whether the prompt explains the candidate (Diffusion Classifier, arXiv 2303.16203); it shares that model's errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import ndimage

from ..boxes import bounds
from ..model.prompt_embeds import PromptEmbeds, predict
from .frame import BoolArray

BINS = 8  # colour bins along each of red, green and blue
ANGLES = 8  # edge directions in half a turn
COLOR_WEIGHT = 0.75
PROBE_PARTS = (0.2, 0.4, 0.6)  # of the training schedule: where noise hides details but not things


def asset_similarity(drawn: npt.NDArray[np.uint8], mask: BoolArray, crop: Image.Image) -> float:
    """How much of the asset's colours and edges is in the masked part of `drawn` (H, W, 3), in [0, 1].

    `crop` is the asset's own picture, RGBA, transparent around it. The mask may hold more than the asset: what counts is
    that the asset's share is there.
    """
    left, top, right, bottom = bounds(mask)
    scale = max(right - left, bottom - top) / max(crop.size)  # edges are compared at the size at which they were drawn
    size = (max(2, round(crop.width * scale)), max(2, round(crop.height * scale)))
    asset = np.asarray(crop.resize(size, Image.Resampling.BOX))
    own = asset[..., 3] >= 128
    own = own if own.any() else asset[..., 3] > 0
    fill = float(own.mean())  # the asset's share of its bounding box; the mask may be that box
    wanted, found = color_histogram(asset[own][:, :3]), color_histogram(drawn[mask])
    color = float(np.minimum(fill * wanted, found).sum()) / fill
    edges = _cosine(edge_directions(asset[..., :3], own), edge_directions(drawn, mask))
    return COLOR_WEIGHT * color + (1 - COLOR_WEIGHT) * edges


def color_histogram(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """(N, 3) -> (8, 8, 8) shares that sum to 1, softened so that a shade next door still counts."""
    counts, _ = np.histogramdd(pixels.astype(np.float64), bins=(BINS,) * 3, range=[(0, 256)] * 3)
    soft = ndimage.gaussian_filter(counts, 0.7, mode="nearest")
    histogram: npt.NDArray[np.float64] = soft / max(1e-12, soft.sum())
    return histogram


def edge_directions(image: npt.NDArray[np.uint8], mask: BoolArray) -> npt.NDArray[np.float64]:
    """(8,) gradient magnitude by direction over half a turn, inside the mask."""
    grey = image.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    dy, dx = np.gradient(grey)
    turns = (np.arctan2(dy, dx) / np.pi) % 1.0
    return np.bincount((turns * ANGLES).astype(int)[mask] % ANGLES, np.hypot(dx, dy)[mask], ANGLES).astype(np.float64)


def _cosine(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """0 where either is nothing."""
    return float(a @ b) / max(1e-12, float(np.linalg.norm(a)) * float(np.linalg.norm(b)))


@torch.no_grad()
def prompt_similarity(unet: Any, scheduler: Any, latents: torch.Tensor, mask: torch.Tensor, prompt_embeds: PromptEmbeds,
                      negative_prompt_embeds: PromptEmbeds) -> list[float]:  # fmt: skip
    """By how much the prompt lowers the model's error inside the mask, one number a candidate: 0 is not at all, 1 is to nothing.

    latents (B, C, h, w), scaled, without noise; mask (h, w) bool; embeds of one row each. The same fixed noise for all, and one
    candidate at a time, so that a candidate's number does not depend on the others.
    """
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(latents)[None]
    total = int(scheduler.config["num_train_timesteps"])
    scores = []
    for row in latents.split(1):
        errors = torch.zeros(2)
        for part in PROBE_PARTS:
            timestep = torch.tensor([round(part * total)], device=latents.device)
            noisy = scheduler.add_noise(row, noise, timestep)
            for index, context in enumerate((negative_prompt_embeds, prompt_embeds)):
                prediction = predict(unet, noisy, timestep, context).float()
                clean = _clean(scheduler, noisy, prediction, timestep)
                errors[index] += float(((clean - row).pow(2) * mask).mean())
        scores.append(float(1 - errors[1] / errors[0].clamp(min=1e-12)))
    return scores


def _clean(scheduler: Any, noisy: torch.Tensor, prediction: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The latents without noise that a prediction stands for, by the scheduler's `prediction_type`."""
    signal: torch.Tensor = scheduler.alphas_cumprod.to(noisy)[timestep.to(scheduler.alphas_cumprod.device)].view(-1, 1, 1, 1)
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return (noisy - (1 - signal).sqrt() * prediction) / signal.sqrt()
    if kind == "v_prediction":
        return signal.sqrt() * noisy - (1 - signal).sqrt() * prediction
    return prediction


def best_first(scores: Sequence[dict[str, float]]) -> list[int]:
    """Indices of the candidates, best first: by the sum of their scores, each measure put on one scale (mean 0, spread 1)."""
    names = sorted({name for each in scores for name in each})
    total = np.zeros(len(scores))
    for name in names:
        values = np.array([each[name] for each in scores])
        total += (values - values.mean()) / max(values.std(), 1e-9)
    return [int(k) for k in np.argsort(-total, kind="stable")]
