"""docs/comparison.png: what each part is worth at a glance, on three held-out scenes of look-alikes that nobody picked.

    python -m scripts.quality.draw_comparison

A row a scene (toybench's first three held-out scenes with three things of one class: colours, patterns, colours): the photo,
mifo in its boxes, the same without boxes, and in boxes no attention loss and Break-A-Scene's, each as its own search found
it. One seed for all of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from PIL import Image

from mifo.boxes import Layout, parse_layout
from mifo.bundle.store import attach
from mifo.data.instance import Instance, load_instance
from mifo.io.json_text import json_text
from mifo.io.sheets import ASSET_COLORS, caption_below, draw_boxes, enlarge, grid, outline
from mifo.learning.learn import learn
from mifo.model.load_base import load_base_model
from mifo.presets import synthesis_preset
from mifo.synthesis.synthesize import synthesize
from mifo.toybox.examples import write_instance
from scripts.quality.measure_main_job import ARRANGEMENTS, arrangement, recipe_config
from scripts.toybench.toybench_scenes import Cell, bench_scene

CELLS = (Cell("colors", 3, 0, "holdout"), Cell("patterns", 3, 0, "holdout"), Cell("colors", 3, 1, "holdout"))
SIDE = 256
RECIPES = {"mifo": "mifo", "no attention loss": "no-attention-loss-tuned", "Break-A-Scene's loss": "break-a-scene-tuned"}


def photo_with_masks(instance: Instance) -> Image.Image:
    source = instance.image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    for index, mask in enumerate(instance.masks):
        source = outline(source, mask.resize(source.size, Image.Resampling.NEAREST), ASSET_COLORS[index])
    return source


def main(
    seed: int = 0,
    place: str = "on the grass",
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("docs/comparison.png"),
) -> None:
    """Learns nine times and draws twelve pictures."""
    base = load_base_model("toybox")
    boxed = synthesis_preset(base.family)
    free = replace(boxed, bounded=False, guidance=replace(boxed.guidance, enabled=False))
    cells: list[Image.Image] = []
    for cell in CELLS:
        scene = bench_scene(cell)
        with TemporaryDirectory() as work:
            write_instance(scene, Path(work) / "photo")
            instance = load_instance(Path(work) / "photo")
            boxes = json_text(arrangement(list(scene.things), ARRANGEMENTS[0]))
            drawn: dict[str, Image.Image] = {}
            for title, recipe in RECIPES.items():
                config = replace(recipe_config(base.family, recipe, len(scene.things)), seed=seed)
                bundle = learn(instance, base, config, Path(work) / recipe)
                layout: Layout = parse_layout(boxes, bundle.tokens)
                prompt = f"a photo of {' and '.join(bundle.tokens)} {place}"
                with attach(base, bundle):
                    image = synthesize(base, prompt, layout, bundle.tokens, boxed, seed).images[0]
                    drawn[f"{title}, in boxes"] = draw_boxes(enlarge(image, SIDE), layout)
                    if recipe == "mifo":
                        plain = synthesize(base, prompt, None, bundle.tokens, free, seed).images[0]
                        drawn["mifo, without boxes"] = enlarge(plain, SIDE)
        cells.append(caption_below(photo_with_masks(instance), "the photo", 15))
        cells += [caption_below(image, title, 15) for title, image in drawn.items()]
    grid(cells, columns=5).save(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
