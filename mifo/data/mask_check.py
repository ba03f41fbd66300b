"""The mask linter: what learning will really see of each mask, and what looks wrong about it, before anything long starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..io.sheets import ASSET_COLORS, caption_below, grid, outline
from .instance import FURTHER_MASK_PATTERN, MASK_PATTERN, MAX_OVERLAP, FittedInstance, Instance, fit, fit_instance
from .mask_file import islands_in_words, open_mask, without_islands
from .mask_sizes import MaskSizes, filled_shares, mask_at_latents, mask_at_map

SHARED = 0.05  # overlap, as a share of the smaller mask, that is worth a warning; load_instance warns above MAX_OVERLAP
SOFT = 0.02  # share of grey pixels above which a mask is not black and white
SIDE = 128  # pixels of a cell on the contact sheet


@dataclass(frozen=True)
class MaskReport:
    """`facts` is what --json prints. `warnings` are about what can be used but probably is not meant; `notes` tell how files were
    read."""

    sizes: MaskSizes
    fitted: FittedInstance
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# --- checks -------------------------------------------------------------------------------------


def check_masks(instance: Instance, sizes: MaskSizes) -> MaskReport:
    """Areas at every size, overlaps, inversions, and what the mask files really hold.

    Raises InputError, as learning would, for a mask that has no pixel left at the model's resolution.
    """
    fitted = fit_instance(instance, sizes.resolution)
    warnings: list[str] = list(instance.warnings)
    masks, further = [], []
    files, things = _mask_files(instance), instance.count - instance.has_background
    for index, mask in enumerate(fitted.masks[:things]):
        name = files.get(("", index), f"mask{index}.png")
        masks.append({"mask": name, **_areas(mask, fitted.valid, sizes)})
        warnings += _mask_warnings(instance, name, instance.masks[index], masks[-1], sizes)
    for photo, small in zip(instance.others, fitted.others, strict=True):
        valid = fit(Image.new("L", photo.image.size, 255), sizes.resolution, 0, Image.Resampling.BOX)
        for index, (whole, mask_there) in enumerate(zip(photo.masks, small.masks, strict=True)):
            if whole is not None and mask_there is not None:
                name = files.get((photo.name, index), f"{photo.name}_mask{index}.png")
                further.append({"mask": name, **_areas(mask_there, valid, sizes)})
                warnings += _mask_warnings(instance, name, whole, further[-1], sizes)
    overlaps = _overlaps(instance)
    for pair in overlaps:
        if SHARED < pair["share_of_smaller"] <= MAX_OVERLAP:
            first, second = pair["masks"]
            share = f"{pair['pixels']} pixels, {100 * pair['share_of_smaller']:.0f} % of the smaller one"
            warnings.append(f"mask{first}.png and mask{second}.png share {share}; both tokens will learn what is there")
    facts = {"instance": instance.name, "image": list(instance.image.size), "resolution": sizes.resolution,
             "latent_size": sizes.latent, "supervised_map_sizes": list(sizes.maps), "masks": masks, "overlaps": overlaps,
             **({"further_masks": further} if further else {}),
             "warnings": warnings, "notes": list(instance.notes)}  # fmt: skip
    return MaskReport(sizes, fitted, facts, tuple(warnings), instance.notes)


def _mask_warnings(instance: Instance, name: str, mask: Image.Image, areas: dict[str, Any], sizes: MaskSizes) -> list[str]:
    """`name` is of the mask's file, `areas` what is known of its cells."""
    found = _area_warnings(areas, sizes)
    if _looks_inverted(mask):
        found.append(f"{name} looks inverted: it covers the picture's border and most of its area; paint the asset white "
                     "and the rest black")  # fmt: skip
    return [*found, *_file_warnings(Path(instance.source) / name), *_island_warnings(name, mask)]


def resized(mask: Image.Image, size: int, sizes: MaskSizes) -> torch.Tensor:
    """(size, size), by the very functions of learning: 0 or 1 at the latents' size, as the diffusion loss has it, else in
    [0, 1], as the attention losses have it."""
    full = _as_tensor(mask)
    return mask_at_latents(full[None, None], (size, size))[0, 0] if size == sizes.latent else mask_at_map(full, (size, size))


def _as_tensor(mask: Image.Image) -> torch.Tensor:
    """(H, W) in [0, 1]"""
    return torch.from_numpy(np.asarray(mask).copy()).float() / 255


def _areas(mask: Image.Image, valid: Image.Image, sizes: MaskSizes) -> dict[str, Any]:
    """`cells`: those that count as the asset's, at least half of each where it fills any by half; `largest`: the fullest
    cell, 1 if it is all the asset's."""
    at_sizes = {}
    for size in dict.fromkeys((sizes.latent, *sizes.maps)):
        cells = resized(mask, size, sizes)
        shares = filled_shares(_as_tensor(mask)[None, None], (size, size)) if size == sizes.latent else cells
        at_sizes[str(size)] = {"cells": int((cells >= 0.5).sum()), "largest": round(float(shares.max()), 3)}
    inside, whole = np.asarray(mask) > 0, np.asarray(valid) > 0
    return {"share_of_picture": round(float(inside.sum() / whole.sum()), 4), "pixels": int(inside.sum()), "at": at_sizes}


def _area_warnings(entry: dict[str, Any], sizes: MaskSizes) -> list[str]:
    found = []
    for size in dict.fromkeys((sizes.latent, *sizes.maps)):
        at = entry["at"][str(size)]
        fullest = f"it fills at most {100 * at['largest']:.0f} % of a cell"
        if size == sizes.latent and at["largest"] < 0.5:
            found.append(f"{entry['mask']} is thinner than a cell at {size}x{size}, where the diffusion loss looks: {fullest}; "
                         f"the {at['cells']} cells that it fills most stand for it: crop the photo closer to it")  # fmt: skip
        elif at["cells"] == 0:
            found.append(f"{entry['mask']} vanishes at {size}x{size}, where the attention losses look: {fullest}; crop the photo "
                         "closer to the assets")  # fmt: skip
    return found


def _looks_inverted(mask: Image.Image) -> bool:
    inside = np.asarray(mask) > 0
    border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
    return bool(inside.mean() > 0.5 and border.mean() > 0.75)


def _overlaps(instance: Instance) -> list[dict[str, Any]]:
    """Every two masks that share pixels, in the photo's own pixels."""
    arrays = [np.asarray(mask) > 0 for mask in instance.masks]
    found = []
    for i, j in combinations(range(len(arrays)), 2):
        pixels = int((arrays[i] & arrays[j]).sum())
        if pixels:
            share = pixels / min(int(arrays[i].sum()), int(arrays[j].sum()))
            found.append({"masks": [i, j], "pixels": pixels, "share_of_smaller": round(share, 4)})
    return found


def _mask_files(instance: Instance) -> dict[tuple[str, int], str]:
    """(further photo's name, or "" for the first; asset) -> the mask's file."""
    names = sorted(os.listdir(instance.source))
    first = {("", int(m[1])): name for name in names if (m := MASK_PATTERN.fullmatch(name))}
    return first | {(f"img{int(m[1])}", int(m[2])): name for name in names if (m := FURTHER_MASK_PATTERN.fullmatch(name))}


def _file_warnings(path: Path) -> list[str]:
    """What the file holds besides black and white."""
    grey = open_mask(path).grey
    soft = float(((grey > 16) & (grey < 239)).mean())
    if soft > SOFT:
        return [f"{path.name} is {100 * soft:.0f} % grey; greys from half up count as the asset, darker ones do not"]
    return []


def _island_warnings(name: str, mask: Image.Image) -> list[str]:
    _, islands = without_islands(np.asarray(mask) > 0)
    return [f"{name} has {islands_in_words(islands)}; erase what is not meant"] if islands else []


# --- the sheet ----------------------------------------------------------------------------------


def check_sheet(report: MaskReport) -> Image.Image:
    """What the model will really see: the fitted picture with all outlines, then per asset its cut-out and its mask at the
    latents' size and at every supervised map size."""
    fitted, sizes = report.fitted, report.sizes
    outlined = _cell(fitted.image)
    for index, mask in enumerate(fitted.masks):
        outlined = outline(outlined, _cell(mask), ASSET_COLORS[index % len(ASSET_COLORS)])
    shown = list(dict.fromkeys((sizes.latent, *sizes.maps)))
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    cells = [caption_below(_cell(fitted.image), f"{sizes.resolution}x{sizes.resolution}"), caption_below(outlined, "masks")]
    cells += [caption_below(blank, "") for _ in range(len(shown) - 1)]
    for entry, mask in zip(report.facts["masks"], fitted.masks, strict=True):
        alone = Image.new("RGB", fitted.image.size, (127, 127, 127))
        alone.paste(fitted.image, (0, 0), mask)
        cells.append(caption_below(_cell(alone), entry["mask"]))
        for size in shown:
            values = (resized(mask, size, sizes) * 255).round().byte().numpy()
            small = Image.fromarray(values).convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            cells.append(caption_below(small, f"{size}x{size}: {entry['at'][str(size)]['cells']} cells"))
    return grid(cells, columns=1 + len(shown))


def _cell(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.NEAREST if image.mode == "L" else Image.Resampling.BICUBIC)


def check_lines(report: MaskReport, warnings: Sequence[str]) -> list[str]:
    """For people."""
    lines = []
    for entry in (*report.facts["masks"], *report.facts.get("further_masks", ())):
        at = ", ".join(f"{found['cells']} cells at {size}x{size}" for size, found in entry["at"].items())
        lines.append(f"{entry['mask']}: {100 * entry['share_of_picture']:.1f} % of the picture, {at}")
    lines += [f"note: {note}" for note in report.notes]
    return lines + ([f"warning: {w}" for w in warnings] or ["nothing looks wrong"])
