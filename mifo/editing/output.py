"""What `edit` writes: the candidates as whole pictures, best first, a contact sheet and a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..io.files import write_folder
from ..io.json_text import record_text
from ..io.sheets import ASSET_COLORS, caption_below, outline, save_sheets
from .edit import Candidate, Edit
from .source_image import SourceImage

KIND = "edit"  # of its manifest
CELL = 256  # pixels of each picture on the contact sheet


def save_edit(result: Edit, source: SourceImage, output: Path, facts: dict[str, Any] | None = None,
              overwrite: bool = False) -> list[Path]:  # fmt: skip
    """`edit00.png` (the best) and so on, each the whole picture with the recipe in its metadata; contact sheets; `edit.json`.

    The folder appears whole, or not at all. Raises InputError when it cannot be written or has anything in it; with
    `overwrite` an earlier edit is replaced.
    """
    recipe = {**result.recipe(), **(facts or {})}
    names = [f"edit{k:02d}.png" for k in range(len(result.candidates))]
    record = {
        **recipe,
        "candidates": [{"image": name, "seed": c.seed, "scores": _rounded(c)}
                       for name, c in zip(names, result.candidates, strict=True)],
        "seconds": round(result.seconds, 2),
        "peak_gib": round(result.peak_gib, 3),
    }  # fmt: skip
    cells = [caption_below(_outlined_crop(result), "the mask")]
    with write_folder(output, KIND, overwrite) as temporary:
        for k, (name, candidate) in enumerate(zip(names, result.candidates, strict=True)):
            whole = result.edited_image(k)
            info = PngInfo()
            info.add_text("mifo", record_text({**recipe, "seed": candidate.seed, "batch_size": 1}))
            source.save(temporary / name, whole, result.mask, pnginfo=info)
            scores = ", ".join(f"{n} {v:.2f}" for n, v in _rounded(candidate).items())
            cells.append(caption_below(_cell(result, whole), f"{k + 1}. seed {candidate.seed}, {scores}"))
        save_sheets(temporary, cells, columns=4)
        (temporary / "edit.json").write_text(record_text(record, indent=2) + "\n")
    return [output / name for name in names]


def _rounded(candidate: Candidate) -> dict[str, float]:
    return {name: round(value, 4) for name, value in sorted(candidate.scores.items())}


def _cell(result: Edit, whole: Image.Image) -> Image.Image:
    """The part around the mask, its longer side CELL pixels."""
    crop = whole.crop(result.frame.crop)
    scale = CELL / max(crop.size)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    return crop.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _outlined_crop(result: Edit) -> Image.Image:
    mask = _cell(result, Image.fromarray(result.mask.astype("uint8") * 255))
    return outline(_cell(result, result.image), mask, ASSET_COLORS[0])
