"""Looking at what was learned: the scene taken apart, and variations of it (Break-A-Scene, section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..attention.sites import smallest_map
from ..boxes import Layout, mask_box
from ..config import SynthesisConfig, to_dict
from ..data.instance import Instance
from ..errors import InputError
from ..io.files import write_folder
from ..io.json_text import record_text
from ..io.read_files import read_regular
from ..io.sheets import caption_below, save_sheets, thumbnail
from ..model.base import BaseModel
from ..prompts import ASSET_PATTERN, BACKGROUND_TOKEN, assets_in, check_prompt, join_assets, things_among, tokenize_prompt
from ..sampling.layout_control import latent_shape
from .resumable import Keep, draw_now
from .synthesize import synthesize

MAX_PROMPTS_BYTES = 1 << 20
#: `{}` stands for the scene or the asset. The toybox model knows its own few places only.
VARIATIONS: dict[str, tuple[str, ...]] = {
    "toybox": (
        "a photo of {}", "a photo of {} at the beach", "a photo of {} in the snow", "a photo of {} on the grass",
        "a photo of {} at night", "a photo of {} in front of a brick wall", "a photo of {} on a wooden floor",
        "a photo of {} on a plain background",
    ),
    "stable-diffusion": (
        "a photo of {}", "a photo of {} at the beach", "a photo of {} in the snow", "a photo of {} in the jungle",
        "a photo of {} on a wooden table in a bright kitchen", "a photo of {} on a cobblestone street at night",
        "a photo of {} with the Eiffel Tower in the background", "a photo of {} floating on water at sunset",
        "a close-up photo of {} with a blurred background", "a watercolor painting of {}", "an oil painting of {}",
        "a pencil sketch of {}", "a children's book illustration of {}", "a photo of {} made of wood",
    ),
}  # fmt: skip
VARIATIONS["sdxl"] = VARIATIONS["stable-diffusion"]


@dataclass(frozen=True)
class Shot:
    """One picture to be drawn."""

    name: str
    """Of its file, without the suffix."""
    prompt: str
    seed: int
    layout: Layout | None = None
    """Several assets' boxes."""

    def recipe(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"prompt": self.prompt, "boxes": self.layout.to_json() if self.layout else None, "seed": self.seed}


def places_in_photo(instance: Instance, base: BaseModel, config: SynthesisConfig) -> Layout:
    """A box per thing, where it stands in the photo; grown if the model's smallest attention map would not show it."""
    smallest = smallest_map(base.unet, *latent_shape(base, config))
    things = things_among(instance.tokens)
    boxes = tuple(mask_box(np.asarray(mask) > 127).made_visible(*smallest) for mask in instance.masks[: len(things)])
    return Layout(things, boxes)


def _placed(prompt: str, places: Layout | None) -> Layout | None:
    """The places of the prompt's assets; none for one asset alone, which may stand anywhere."""
    assets = tuple(assets_in(prompt))
    return Layout(assets, tuple(places.box_of(t) for t in assets)) if places and len(assets) > 1 else None


def decomposition(tokens: Sequence[str], seed: int, places: Layout | None = None) -> list[Shot]:
    """Each asset alone, all of them together in their `places`, and the background where it was learned."""
    things = things_among(tokens)
    shots = [Shot(t.strip("<>"), join_assets([t]), seed) for t in things]
    shots.append(Shot("all", join_assets(things), seed, _placed(join_assets(things), places)))
    if BACKGROUND_TOKEN in tokens:
        shots.append(Shot("background", join_assets([BACKGROUND_TOKEN]), seed))
    return shots


def variations(tokens: Sequence[str], templates: Sequence[str], count: int, seed: int,
               places: Layout | None = None) -> list[Shot]:  # fmt: skip
    """`count` pictures, the templates taking turns, each with a seed of its own; several assets keep to their `places`.

    `tokens` are what `{}` stands for. A template that names assets itself stays as it is.
    """
    subject = " and ".join(tokens)
    prompts = [template.replace("{}", subject) for template in templates]
    width = max(2, len(str(count - 1)))
    layouts = [_placed(prompt, places) for prompt in prompts]
    return [Shot(f"variation{k:0{width}d}", prompts[k % len(prompts)], seed + k, layouts[k % len(prompts)]) for k in range(count)]


def choose_asset(name: str | None, tokens: Sequence[str]) -> list[str]:
    """`<asset0>`, `asset0` or `0` -> its token; None is the whole scene. Raises InputError when there is no such asset."""
    if name is None:
        return list(things_among(tokens))
    bare = name.strip().lower().strip("<>")
    token = f"<{bare}>" if not bare.isdigit() else f"<asset{int(bare[:9])}>"
    if token not in tokens:
        raise InputError(f"there is no asset '{name[:50]}'; the bundle has {', '.join(tokens)}")
    return [token]


def read_prompts(path: Path, tokens: Sequence[str]) -> list[str]:
    """One prompt a line; empty lines and lines that start with '#' are left out.

    Raises InputError for a file that cannot be read, has none, or has one that names neither `{}` nor an asset.
    """
    try:
        text = read_regular(path, MAX_PROMPTS_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the prompts file {str(path)[:200]} cannot be read ({reason}); write one short prompt a line") from None
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip() and line.strip()[0] != "#"]
    if not lines:
        raise InputError(f"{path} has no prompts; write one a line, such as: a photo of {{}} at the beach")
    for number, line in lines:
        check_prompt(line, tokens, f"prompt in line {number} of {path}")
        if "{}" not in line and not ASSET_PATTERN.search(line) and BACKGROUND_TOKEN not in line.lower():
            raise InputError(f"{path}, line {number}, names no asset: write {{}} where the scene or the asset belongs")
    return [line for _, line in lines]


class Drawn(Mapping[Shot, Image.Image]):
    """The picture of each shot, taken from its item when it is looked at."""

    def __init__(self, items: Mapping[Shot, Sequence[Image.Image]]):
        self._items = dict(items)

    def __getitem__(self, shot: Shot) -> Image.Image:
        return self._items[shot][0]

    def __iter__(self) -> Iterator[Shot]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def draw_shots(base: BaseModel, shots: Sequence[Shot], tokens: Sequence[str], config: SynthesisConfig,
               on_progress: Callable[[int, int], None] | None = None,
               keep: Keep = draw_now) -> Mapping[Shot, Image.Image]:  # fmt: skip
    """One picture per shot; those that `keep` has are not drawn again, those that fail are left out. Where `keep` writes them to
    the disk, they are read from there again when they are looked at.

    Raises InputError for a prompt that is too long, before anything is drawn.
    """
    for shot in shots:
        assets = [t for t in tokens if t in shot.prompt.lower()]
        tokenize_prompt(base.tokenizer, shot.prompt, assets, f"prompt {shot.prompt[:60]!r}")
    drawn: dict[Shot, Sequence[Image.Image]] = {}
    for k, shot in enumerate(shots):

        def progress(done: int, total: int, k: int = k) -> None:
            if on_progress:
                on_progress(k * total + done, len(shots) * total)

        def draw(shot: Shot = shot, progress: Callable[[int, int], None] = progress) -> list[Image.Image]:
            return synthesize(base, shot.prompt, shot.layout, tokens, config, shot.seed, 1, progress).images

        recipe = {**shot.recipe(), "tokens": list(tokens), "config": to_dict(config)}
        if found := keep(shot.name, recipe, 1, draw):
            drawn[shot] = found
    return Drawn(drawn)


def save_shots(drawn: Mapping[Shot, Image.Image], output: Path, record_name: str, facts: dict[str, Any],
               overwrite: bool = False) -> list[Path]:  # fmt: skip
    """A PNG per shot, contact sheets and `<record_name>.json`, which is what its manifest calls the folder.

    The folder appears whole, or not at all. Raises InputError when it cannot be written or has anything in it; with
    `overwrite` an earlier one of the same kind is replaced.
    """
    listed = [{"image": f"{s.name}.png", **s.recipe()} for s in drawn]
    with write_folder(output, record_name, overwrite) as temporary:
        save_sheets(temporary, _save_each(drawn, temporary), columns=4)
        (temporary / f"{record_name}.json").write_text(record_text({**facts, "images": listed}, indent=2) + "\n")
    return [output / f"{s.name}.png" for s in drawn]


def _save_each(drawn: Mapping[Shot, Image.Image], folder: Path) -> Iterator[Image.Image]:
    """Writes each picture, and yields its cell of the contact sheet; one picture at a time."""
    for shot, image in drawn.items():
        image.save(folder / f"{shot.name}.png", "PNG")
        yield caption_below(thumbnail(image), shot.prompt)
