"""What a picture says of its own making, read back: `show` prints it, and `synthesize --again` repeats it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..boxes import Layout, parse_layout
from ..config import SynthesisConfig, from_dict
from ..errors import InputError
from ..io.image_file import open_image
from ..io.json_text import json_text
from ..prompts import assets_in

KEY = "mifo"  # of the PNG's text
OWN = ("prompt", "boxes", "seed", "batch_size", "config", "bundle", "bundles", "base_model", "base_fingerprint")
MAX_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """Of one picture."""

    prompt: str
    layout: Layout | None
    seed: int
    config: SynthesisConfig
    bundles: tuple[str, ...]
    """Their names."""
    base_fingerprint: str
    facts: dict[str, Any]
    """What else the record says, such as how the best of several seeds was chosen."""


def read_record(path: Path) -> dict[str, Any]:
    """The picture's record as it stands. Raises InputError for a file that is no picture, or one that has none."""
    text = open_image(path).metadata.get(KEY)
    if not isinstance(text, str):
        raise InputError(f"{path} does not say how it was made: it is no PNG that mifo wrote, or a program took its text out")
    try:
        if len(text) > MAX_CHARACTERS:
            raise ValueError("too long")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError):
        raise InputError(f"what {path} says of its making cannot be read; use another picture") from None
    return record


def read_recipe(path: Path) -> Recipe:
    """Raises InputError as `read_record` does, and for a picture that `synthesize` did not draw, or whose settings are none."""
    record = read_record(path)
    if not {"prompt", "seed", "config"} <= set(record) or "crop" in record:  # a crop is an edit's
        raise InputError(f"{path} was not drawn by synthesize; 'mifo show' says what it is")
    prompt, seed, boxes, bundle = (record.get(k) for k in ("prompt", "seed", "boxes", "bundle"))
    several = record.get("bundles")
    bundles = several if isinstance(several, list) else [bundle] if bundle is not None else []
    if not isinstance(prompt, str) or type(seed) is not int or not all(isinstance(name, str) for name in bundles):
        raise InputError(f"the recipe in {path} is damaged: its prompt, seed or bundle is none; use another picture")
    config = from_dict(SynthesisConfig, record["config"], f"the recipe in {path}")
    layout = None
    if boxes is not None:
        named = isinstance(several, list) and isinstance(boxes, dict)  # by names that hold the bundle's
        layout = parse_layout(json_text(list(boxes.values()) if named else boxes), tuple(boxes) if named else assets_in(prompt))
    return Recipe(prompt, layout, seed, config, tuple(bundles), str(record.get("base_fingerprint", "")),
                  {k: v for k, v in record.items() if k not in OWN})  # fmt: skip
