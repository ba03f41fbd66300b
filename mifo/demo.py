"""The demo: three look-alike cars from one picture, each put in its box on two new backgrounds, in one picture that
explains itself.

Knows the jobs and how to show their results. Knows nothing of how they work.
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
from .config import learn_preset, synthesis_preset
from .data.instance import Instance, load_instance
from .io.files import write_folder
from .io.lock import checkpoint_folder
from .io.manifest import remove_ours
from .io.sheets import ASSET_COLORS, PAPER, TEXT, caption_below, draw_boxes, enlarge, grid, outline
from .learning.checkpoints import Checkpointing
from .learning.learn import learn
from .model.base import load_base_model
from .sampling.sample import sample_prompts
from .synthesis.synthesize import synthesize
from .toybox.examples import write_example

BOXES = "[[0.04, 0.08, 0.46, 0.36], [0.54, 0.30, 0.96, 0.58], [0.10, 0.64, 0.52, 0.92]]"
PLACES = ("on the grass", "in the snow")
GO_ON = Checkpointing(resume=True, strict=False)
ALONE = "at the beach"
BUNDLES = ("demo_bundle", "demo_without_penalty")
SIDE = 192  # pixels of each picture on the sheet


@dataclass(frozen=True)
class Demo:
    """What the demo drew, and where it keeps what it learned until that is written."""

    sheet: Image.Image
    kept: Path
    """Holds the bundles, learned and whole: `BUNDLES`."""
    facts: dict[str, Any]


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
        bundle = learn(instance, base, config, kept / BUNDLES[0], bar.learning, None, GO_ON)
        none = replace(config.embedding.attention, loss="none")
        lora = replace(config.lora, attention=replace(config.lora.attention, loss="none"))
        without = replace(config, embedding=replace(config.embedding, attention=none), lora=lora)
        blended = learn(instance, base, without, kept / BUNDLES[1], bar.learning, None, GO_ON)
    control = synthesis_preset(base.family)
    plain = replace(control, bounded=False, guidance=replace(control.guidance, enabled=False))
    prompts = [f"a photo of {' and '.join(bundle.tokens)} {where}" for where in PLACES]
    layout = parse_layout(BOXES, bundle.tokens)
    with attach(base, bundle):
        alone = sample_prompts(base, [f"a photo of {t} {ALONE}" for t in bundle.tokens], bundle.tokens, seed)
        placed = [synthesize(base, p, layout, bundle.tokens, control, seed, 1, bar.denoising) for p in prompts]
        free = [synthesize(base, p, None, bundle.tokens, plain, seed).images[0] for p in prompts]
    with attach(base, blended):  # the same boxes with assets learned without any attention loss
        mixed = [synthesize(base, p, layout, blended.tokens, control, seed, 1).images[0] for p in prompts]
    sheet = _sheet(instance, bundle.tokens, layout, prompts, alone, [p.images[0] for p in placed], free, mixed)
    seconds = round(max(p.seconds for p in placed), 1)
    return Demo(sheet, kept, {"learn_seconds": bundle.facts["seconds"], "synthesize_seconds": seconds})


def save_demo(drawn: Demo, output: Path, overwrite: bool = False) -> dict[str, Any]:
    """`demo.png`, the instance `toy_car/` and the bundles. The folder appears whole, or not at all; returns what `--json` prints.

    Raises InputError when it cannot be written or has anything in it; with `overwrite` an earlier demo is replaced.
    """
    with write_folder(output, "demo", overwrite) as temporary:
        write_example("toy_car", temporary / "toy_car")
        for name in BUNDLES:
            shutil.copytree(drawn.kept / name, temporary / name)
        drawn.sheet.save(temporary / "demo.png", "PNG")
    for name in BUNDLES:
        remove_ours(drawn.kept / name)
    return {"picture": str(output / "demo.png"), "bundle": str(output / BUNDLES[0]), **drawn.facts}


def _sheet(instance: Instance, tokens: Sequence[str], layout: Layout, prompts: Sequence[str], alone: list[Image.Image],
           placed: list[Image.Image], free: list[Image.Image], without: list[Image.Image]) -> Image.Image:  # fmt: skip
    """Row 1: the input, and each asset alone. Then a row per prompt: the boxes, the result, and the two comparisons."""
    source = instance.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    for index, mask in enumerate(instance.masks):
        source = outline(source, mask.resize(source.size, Image.Resampling.NEAREST), ASSET_COLORS[index])
    rows = [[(source, "the one photo, with its masks")]]
    rows[0] += [(enlarge(image, SIDE), f'"a photo of {t} {ALONE}"') for image, t in zip(alone, tokens, strict=True)]
    blank = Image.new("RGB", (SIDE, SIDE), (236, 236, 236))
    for k, prompt in enumerate(prompts):
        rows.append([
            (draw_boxes(blank, layout), prompt.split(" and ")[-1].split("> ")[-1]),
            (draw_boxes(enlarge(placed[k], SIDE), layout), "mifo: each in its box"),
            (draw_boxes(enlarge(without[k], SIDE), layout), "learned without the penalty"),
            (enlarge(free[k], SIDE), "without box control"),
        ])  # fmt: skip
    cells = [caption_below(image, text) for row in rows for image, text in row]
    body = grid(cells, columns=4)
    sheet = Image.new("RGB", (body.width, body.height + 30), PAPER)
    title = "mifo: learn the things in one photo, then put each where you want it"
    ImageDraw.Draw(sheet).text((8, 8), title, TEXT, ImageFont.load_default(17))
    sheet.paste(body, (0, 30))
    return sheet
