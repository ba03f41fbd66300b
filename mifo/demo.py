"""The demo: three look-alike cars from one picture, each put in its box on two new backgrounds, in one picture that
explains itself.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .boxes import Layout, parse_layout
from .bundle.store import attach
from .data.instance import Instance, load_instance
from .io.files import write_folder
from .io.lock import checkpoint_folder
from .io.manifest import remove_ours
from .io.sheets import ASSET_COLORS, PAPER, TEXT, caption_below, draw_boxes, enlarge, grid, outline
from .learning.checkpoints import Checkpointing
from .learning.learn import learn
from .model.load_base import load_base_model
from .presets import learn_preset, synthesis_preset
from .sampling.sample import sample_prompts
from .synthesis.synthesize import synthesize
from .toybox.examples import write_example

BOXES = "[[0.04, 0.08, 0.46, 0.36], [0.54, 0.30, 0.96, 0.58], [0.10, 0.64, 0.52, 0.92]]"
PLACES = ("on the grass", "in the snow")
GO_ON = Checkpointing(resume=True, strict=False)
ALONE = "at the beach"
BUNDLE = "demo_bundle"
SIDE = 256  # pixels of each picture on the sheet: twice the model's


@dataclass(frozen=True)
class Demo:
    """What the demo drew, and where it keeps what it learned until that is written."""

    sheet: Image.Image
    kept: Path
    """Holds the bundle, learned and whole: `BUNDLE`."""
    metadata: dict[str, Any]


def draw_demo(place: Path, seed: int, device: str, bar: Any) -> Demo:
    """Learns and draws. Interrupted, the same call goes on where it was: what is learned is kept in `place/.checkpoints/demo`.

    Raises InputError when that cannot be written.
    """
    kept = checkpoint_folder(place / "demo")
    base = load_base_model("toybox", device)
    config = replace(learn_preset(base.family), seed=seed)
    with tempfile.TemporaryDirectory(prefix="mifo-demo-") as photos:
        write_example("toy_car", Path(photos) / "toy_car")
        instance = load_instance(Path(photos) / "toy_car")
        bundle = learn(instance, base, config, kept / BUNDLE, bar.learning, None, GO_ON)
    control = synthesis_preset(base.family)
    free = replace(control, bounded=False, guidance=replace(control.guidance, enabled=False))
    prompts = [f"a photo of {' and '.join(bundle.tokens)} {where}" for where in PLACES]
    layout = parse_layout(BOXES, bundle.tokens)
    with attach(base, bundle):
        alone = sample_prompts(base, [f"a photo of {t} {ALONE}" for t in bundle.tokens], bundle.tokens, seed)
        placed = [synthesize(base, p, layout, bundle.tokens, control, seed, 1, bar.denoising) for p in prompts]
        without = synthesize(base, prompts[0], None, bundle.tokens, free, seed, 1, bar.denoising).images[0]
    sheet = _sheet(instance, bundle.tokens, layout, alone, [p.images[0] for p in placed], without)
    seconds = round(max(p.seconds for p in placed), 1)
    return Demo(sheet, kept, {"learn_seconds": bundle.metadata["seconds"], "synthesize_seconds": seconds})


def save_demo(drawn: Demo, output: Path, overwrite: bool = False) -> dict[str, Any]:
    """`demo.png`, the instance `toy_car/` and the bundles. The folder appears whole, or not at all; returns what `--json` prints.

    Raises InputError when it cannot be written or has anything in it; with `overwrite` an earlier demo is replaced.
    """
    with write_folder(output, "demo", overwrite) as temporary:
        write_example("toy_car", temporary / "toy_car")
        shutil.copytree(drawn.kept / BUNDLE, temporary / BUNDLE)
        drawn.sheet.save(temporary / "demo.png", "PNG")
    remove_ours(drawn.kept / BUNDLE)
    return {"picture": str(output / "demo.png"), "bundle": str(output / BUNDLE), **drawn.metadata}


def _sheet(instance: Instance, tokens: Sequence[str], layout: Layout, alone: list[Image.Image], placed: list[Image.Image],
           without: Image.Image) -> Image.Image:  # fmt: skip
    """Above, what is learned: the photo with its masks, and each asset alone. Below, what it is for: the boxes that are asked
    for, the pictures in them, and what the same words draw without boxes."""
    source = instance.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    for index, mask in enumerate(instance.masks):
        source = outline(source, mask.resize(source.size, Image.Resampling.NEAREST), ASSET_COLORS[index])
    blank = Image.new("RGB", (SIDE, SIDE), (236, 236, 236))
    cells = [(source, "one photo, a mask for each car")]
    cells += [(enlarge(image, SIDE), f"{token} {ALONE}") for image, token in zip(alone, tokens, strict=True)]
    cells += [(draw_boxes(blank, layout), "asked for: a box for each")]
    cells += [(draw_boxes(enlarge(image, SIDE), layout), where) for image, where in zip(placed, PLACES, strict=True)]
    cells += [(enlarge(without, SIDE), f"{PLACES[0]}, without boxes")]
    body = grid([caption_below(image, text, 15) for image, text in cells], columns=4)
    sheet = Image.new("RGB", (body.width, body.height + 34), PAPER)
    title = "mifo: three look-alikes from one photo, each as a word of its own, each put where you want it"
    ImageDraw.Draw(sheet).text((8, 8), title, TEXT, ImageFont.load_default(18))
    sheet.paste(body, (0, 34))
    return sheet
