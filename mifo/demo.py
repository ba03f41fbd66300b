"""The demo: three look-alike cars from one picture, each put in its box on two new backgrounds, in one picture that
explains itself.

Knows the jobs and how to show their results. Knows nothing of how they work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .base_model import BaseModel, load_base_model
from .boxes import Layout, parse_layout
from .bundle import attach
from .checkpoints import Checkpointing
from .config import learn_preset, synthesis_preset
from .files import replace_files
from .instance import Instance, load_instance
from .learn import learn
from .learn_report import sample_prompts
from .pictures import ASSET_COLORS, PAPER, TEXT, caption_below, draw_boxes, enlarge, grid, outline
from .synthesize import synthesize
from .toybox.examples import write_example

BOXES = "[[0.04, 0.08, 0.46, 0.36], [0.54, 0.30, 0.96, 0.58], [0.10, 0.64, 0.52, 0.92]]"
PLACES = ("on the grass", "in the snow")
GO_ON = Checkpointing(resume=True, strict=False)
ALONE = "at the beach"
SIDE = 192  # pixels of each picture on the sheet


def run_demo(output: Path, seed: int, device: str, bar: Any) -> dict[str, Any]:
    """Learns, draws, and writes `output/demo.png`. Raises InputError when `output` cannot be written."""
    with replace_files(output / "toy_car") as temporary:
        write_example("toy_car", temporary)
    instance = load_instance(output / "toy_car")
    base = load_base_model("toybox", device)
    config = replace(learn_preset(base.family), seed=seed)
    bundle = learn(instance, base, config, output / "demo_bundle", bar.learning, None, GO_ON)
    control = synthesis_preset(base.family)
    plain = replace(control, bounded=False, guidance=replace(control.guidance, enabled=False))
    prompts = [f"a photo of {' and '.join(bundle.tokens)} {place}" for place in PLACES]
    layout = parse_layout(BOXES, bundle.tokens)
    seconds = []
    with attach(base, bundle):
        alone = sample_prompts(base, [f"a photo of {t} {ALONE}" for t in bundle.tokens], bundle.tokens, seed)
        placed = []
        for prompt in prompts:
            result = synthesize(base, prompt, layout, bundle.tokens, control, seed, 1, bar.denoising)
            seconds.append(result.seconds)
            placed += result.images
        free = [synthesize(base, p, None, bundle.tokens, plain, seed).images[0] for p in prompts]
    without = _without_penalty(instance, base, config, output, prompts, layout, seed, bar)
    sheet = _sheet(instance, bundle.tokens, layout, prompts, alone, placed, free, without)
    with replace_files(output) as temporary:
        sheet.save(temporary / "demo.png", "PNG")
    return {"picture": str(output / "demo.png"), "bundle": str(bundle.folder), "learn_seconds": bundle.facts["seconds"],
            "synthesize_seconds": round(max(seconds), 1)}  # fmt: skip


def _without_penalty(instance: Instance, base: BaseModel, config: Any, output: Path, prompts: Sequence[str], layout: Layout,
                     seed: int, bar: Any) -> list[Image.Image]:  # fmt: skip
    """The same boxes with assets learned without any attention loss."""
    none = replace(config.embedding.attention, loss="none")
    lora = replace(config.lora, attention=replace(config.lora.attention, loss="none"))
    config = replace(config, embedding=replace(config.embedding, attention=none), lora=lora)
    bundle = learn(instance, base, config, output / "demo_without_penalty", bar.learning, None, GO_ON)
    with attach(base, bundle):
        control = synthesis_preset(base.family)
        return [synthesize(base, p, layout, bundle.tokens, control, seed, 1).images[0] for p in prompts]


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
