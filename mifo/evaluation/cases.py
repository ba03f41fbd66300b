"""What an evaluation draws or is given: cases (a prompt and its boxes), and pictures of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..boxes import Box, Layout, parse_layout
from ..data.instance import Instance
from ..errors import InputError
from ..io.image_file import DECODE_ERRORS, load_image
from ..io.json_text import json_text
from ..io.read_files import read_regular
from ..io.sheets import SHEET_NAME
from ..io.swap import finish_swaps
from ..prompts import assets_in, check_characters, check_prompt, join_assets

PLACES = ("at the beach", "in the snow", "on the grass")
MAX_PROMPTS_BYTES = 1 << 18
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Case:
    """One prompt, and where its assets shall stand; without a layout they may stand anywhere."""

    prompt: str
    layout: Layout | None

    @property
    def tokens(self) -> list[str]:
        """The assets asked for: in the layout's order, or the prompt's."""
        return list(self.layout.tokens) if self.layout else assets_in(self.prompt)

    def to_json(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "boxes": self.layout.to_json() if self.layout else None}


@dataclass(frozen=True)
class CaseImage:
    """One picture of one case."""

    case: Case
    seed: int
    image: Image.Image
    name: str


def default_cases(tokens: Sequence[str], aspects: Sequence[float]) -> list[Case]:
    """Each asset alone in each place, then all of them in boxes in each place; who stands where changes with the place."""
    alone = [Case(f"{join_assets([token])} {place}", None) for token in tokens for place in PLACES]
    together = [Case(f"{join_assets(list(tokens))} {place}", grid_layout(tokens, aspects, turn))
                for turn, place in enumerate(PLACES)]  # fmt: skip
    return alone + together


def grid_layout(tokens: Sequence[str], aspects: Sequence[float], turn: int = 0) -> Layout:
    """A box of each asset's own shape (`aspects`: width / height) in the middle of a grid's cell; `turn` moves them along."""
    columns = max(2, math.ceil(math.sqrt(len(tokens))))
    rows = math.ceil(len(tokens) / columns)
    longer = min(0.44, 0.86 / max(columns, rows))
    boxes = []
    for index, aspect in enumerate(aspects):
        row, column = divmod((index + turn) % len(tokens), columns)
        x, y = (column + 0.5) / columns, (row + 0.5) / rows
        w, h = (longer, longer / aspect) if aspect > 1 else (longer * aspect, longer)
        boxes.append(Box(x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    return Layout(tuple(tokens), tuple(boxes))


def mask_aspects(instance: Instance) -> list[float]:
    """Width / height of each mask's bounding box, between 1:3 and 3:1."""
    found = []
    for mask in instance.masks:
        x0, y0, x1, y1 = mask.getbbox()  # type: ignore[misc]  # no mask of an instance is empty
        found.append(min(3.0, max(1 / 3, (x1 - x0) / (y1 - y0))))
    return found


def read_cases(prompts: Path | None, boxes: str | None, tokens: Sequence[str], aspects: Sequence[float]) -> list[Case]:
    """Cases from a file of prompts, one a line, and boxes for all of them; the defaults stand in for what is not given.

    Raises InputError for a file that cannot be read, a prompt with an unknown asset, or boxes that do not fit.
    """
    if prompts is None and boxes is None:
        return default_cases(tokens, aspects)
    lines = _read_prompts(prompts) if prompts else [f"{join_assets(list(tokens))} {place}" for place in PLACES]
    for number, line in enumerate(lines, 1):
        check_prompt(line, tokens, f"prompt {number} of {prompts}" if prompts else "prompt")
    used = [t for t in tokens if any(t in assets_in(line) for line in lines)]
    if boxes is None:
        return [Case(line, None) for line in lines]
    whole = parse_layout(boxes, used)
    cases = []
    for line in lines:
        named = assets_in(line)
        cases.append(Case(line, Layout(tuple(named), tuple(whole.box_of(t) for t in named)) if named else None))
    return cases


def _read_prompts(path: Path) -> list[str]:
    try:
        text = read_regular(path, MAX_PROMPTS_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        shown = str(path)[:200]
        raise InputError(f"the prompts file {shown} cannot be read ({reason}); give a text file, one prompt a line") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError(f"the prompts file {path} is empty; write one prompt a line")
    for number, line in enumerate(lines, 1):
        check_characters(line, f"{path}: prompt {number}")
    return lines


# --- pictures that exist ------------------------------------------------------------------------


def read_images(folder: Path, prompts: Path | None, boxes: str | None, tokens: Sequence[str]) -> list[CaseImage]:
    """The pictures of a folder. What `synthesize` wrote says itself what was asked for; for pictures of another origin the one
    prompt in `prompts`, and `boxes`, say it.

    Raises InputError when the folder has no pictures, or one that nobody says anything about.
    """
    finish_swaps(folder.parent)
    if not os.path.isdir(folder):
        raise InputError(f"there is no folder {str(folder)[:300]}; give the folder of pictures that synthesize wrote")
    stated = read_cases(prompts, boxes, tokens, []) if prompts else None
    if stated and len(stated) > 1:
        raise InputError(f"{prompts} has {len(stated)} prompts; for pictures that exist give one, which holds for all of them")
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not SHEET_NAME.fullmatch(p.name))
    images = [_read_image(folder / name, number, stated[0] if stated else None, tokens) for number, name in enumerate(names)]
    if not images:
        raise InputError(f"{folder} has no pictures (PNG, JPEG or WebP); give the folder that synthesize wrote")
    return images


def _read_image(path: Path, number: int, stated: Case | None, tokens: Sequence[str]) -> CaseImage:
    image = load_image(path)
    if stated:
        return CaseImage(stated, number, image, path.name)
    recipe = _recipe_of(path)
    if recipe is None:
        raise InputError(f"{path} does not say what was asked for, because synthesize did not write it; give its prompt in a "
                         "file with --prompts, and its --boxes")  # fmt: skip
    try:
        prompt, boxes, seed = str(recipe["prompt"]), recipe["boxes"], int(recipe["seed"])
        check_prompt(prompt, tokens)
        layout = parse_layout(json_text(boxes), assets_in(prompt)) if boxes else None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(f"{path}: {error}") from None
        raise InputError(f"the recipe in {path} is garbled ({error}); draw the picture again") from None
    return CaseImage(Case(prompt, layout), seed, image, path.name)


def _recipe_of(path: Path) -> dict[str, Any] | None:
    """What `synthesize` wrote into the PNG; None where there is nothing."""
    try:
        with Image.open(path, formats=("PNG",)) as file:
            file.load()
            recipe = json.loads(getattr(file, "text", {}).get("mifo", "null"))
    except (*DECODE_ERRORS, RecursionError):
        return None
    return recipe if isinstance(recipe, dict) else None
