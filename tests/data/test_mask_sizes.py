"""Masks at latent size: what is half full counts, thin things stay, and the linter shows what is learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import load_base
from PIL import Image

from mifo.data.instance import fit_instance, load_instance
from mifo.data.mask_check import check_masks
from mifo.data.mask_sizes import MaskSizes, mask_at_latents, mask_at_map, union_at_latents
from mifo.learning.dataset import InstanceData


def line(offset: int, width: int = 4, size: int = 512) -> torch.Tensor:
    """A horizontal line from side to side, (1, 1, size, size)."""
    mask = torch.zeros(1, 1, size, size)
    mask[:, :, 256 + offset : 256 + offset + width] = 1
    return mask


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_a_line_thinner_than_a_latent_pixel_stays_at_every_offset(offset: int, width: int) -> None:
    kept = mask_at_latents(line(offset, width), (64, 64))[0, 0]
    rows = kept.sum(1)
    assert kept.unique().tolist() == [0, 1]
    assert rows.max() == 64, "from side to side"
    assert 1 <= int((rows > 0).sum()) <= 2, "and no thicker than the cells that it touches"


def test_half_and_more_counts_and_less_does_not() -> None:
    mask = torch.zeros(1, 1, 4, 16)
    for cell, pixels in enumerate((16, 8, 7, 9)):  # of 16 in each cell of 4x4
        mask[0, 0, :, 4 * cell : 4 * cell + 4] = (torch.arange(16) < pixels).float().view(4, 4)
    assert mask_at_latents(mask, (1, 4)).flatten().tolist() == [1, 1, 0, 1]


def test_a_thin_mask_keeps_its_strongest_cells_and_an_empty_one_nothing() -> None:
    mask = torch.zeros(1, 1, 4, 12)
    for cell, pixels in enumerate((6, 3, 2)):  # none has half of 16; 3 is half of the fullest
        mask[0, 0, :, 4 * cell : 4 * cell + 4] = (torch.arange(16) < pixels).float().view(4, 4)
    assert mask_at_latents(mask, (1, 3)).flatten().tolist() == [1, 1, 0]
    assert mask_at_latents(torch.zeros(1, 1, 8, 8), (2, 2)).sum() == 0


def test_a_thin_mask_beside_a_large_one_is_in_the_union() -> None:
    large = torch.zeros(1, 1, 512, 512)
    large[..., :200, :200] = 1
    union = union_at_latents(torch.cat([large, line(3)]), (64, 64))
    assert union.shape == (1, 1, 64, 64)
    assert union[0, 0, 32].sum() == 64 and union[0, 0, :25, :25].all()
    quarters = torch.zeros(2, 1, 8, 8)  # neither fills a cell by half, both together do
    quarters[0, 0, :3, :3] = quarters[1, 0, 3:6, :6] = 1
    assert union_at_latents(quarters, (1, 1)).item() == 1


def thin_instance(folder: Path, mask: np.ndarray) -> Path:
    folder.mkdir()
    Image.new("RGB", mask.shape[::-1], "grey").save(folder / "img.png")
    Image.fromarray(mask).save(folder / "mask0.png")
    return folder


def test_learning_and_the_linter_see_the_same_cells(tmp_path: Path) -> None:
    pixels = np.zeros((128, 128), np.uint8)
    pixels[66:68] = 255  # two pixels of the toybox's latent pixel of eight
    instance = load_instance(thin_instance(tmp_path / "rope", pixels))
    data = InstanceData(fit_instance(instance, 128), load_base())
    batch = data.sample(np.random.default_rng(0), torch.Generator().manual_seed(0), 1, True, 0.0)
    assert batch.union_mask.sum() == 16, "the line is learned"
    report = check_masks(instance, MaskSizes(128, 16, (16, 8)))
    assert report.facts["masks"][0]["at"]["16"] == {"cells": 16, "largest": 0.25}
    (thin, vanishes) = [w for w in report.warnings if "rope" not in w]
    assert "thinner than a cell at 16x16" in thin and "at most 25 % of a cell" in thin and "16 cells" in thin
    assert "vanishes at 8x8" in vanishes


def test_at_a_map_the_mask_is_as_the_attention_losses_have_it() -> None:
    mask = torch.zeros(8, 8)
    mask[:4, :2] = 1
    found = mask_at_map(mask, (2, 2))
    assert found.shape == (2, 2) and 0 < found[0, 0] < 1 and found[0, 0] > found[1, 0] > found[1, 1]
