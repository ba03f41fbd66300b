"""What further photos of the same things bring: learned from one, two and four of them, in the same number of steps.

    python -m scripts.quality.measure_photos --work photos

Drawn scenes of three look-alikes (the benchmark's development scenes); the further photos show the same things at other places,
on other backgrounds. Then each thing alone on three backgrounds, and all of them in boxes, by the judge. Interrupted, the same
command goes on.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mifo import learn, load_base_model, load_bundle, load_instance
from mifo.bundle.store import Bundle, attach
from mifo.io.json_text import json_text
from mifo.model.base import BaseModel
from mifo.presets import synthesis_preset
from mifo.toybox.draw import BACKGROUNDS
from mifo.toybox.examples import write_instance
from mifo.toybox.judge import load_judge
from mifo.toybox.world import Scene, draw_scene, placed
from scripts.quality.measure_main_job import measure_alone, measure_boxes, pooled
from scripts.record import write_result
from scripts.toybench.toybench_scenes import Cell, bench_scene, places

COUNTS = (1, 2, 4)
CELLS = tuple(Cell(level, 3, index, "dev") for index in (0, 1) for level in ("colors", "patterns"))


def write_photos(cell: Cell, count: int, folder: Path) -> None:
    """An instance folder with `count` photos of the cell's things; the first is the benchmark's."""
    scene = bench_scene(cell)
    write_instance(scene, folder)
    for k in range(1, count):
        rng = np.random.default_rng([cell.seed, k])
        things = tuple(placed(replace(thing, flipped=bool(rng.random() < 0.5)), center, longer)
                       for thing, (center, longer) in zip(scene.things, places(cell.count, rng), strict=True))  # fmt: skip
        drawing = draw_scene(Scene(things, str(rng.choice([b for b in BACKGROUNDS if b != scene.background])), k))
        drawing.image.save(folder / f"img{k}.png")
        for index, mask in enumerate(drawing.masks):
            mask.convert("1").save(folder / f"img{k}_mask{index}.png")


def learned(work: Path, name: str, cell: Cell, count: int, base: BaseModel) -> Bundle:
    folder, photos = work / "bundles" / name, work / "instances" / name
    if (folder / "bundle.json").exists():
        return load_bundle(folder)
    if not photos.exists():
        write_photos(cell, count, photos)
    return learn(load_instance(photos), base, folder, resume=True)


def measure(work: Path, cell: Cell, count: int, base: BaseModel, judge: Any, seeds: int, images: int) -> dict[str, Any]:
    name = f"{cell.name}-{count}"
    kept = work / f"{name}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    bundle, things = learned(work, name, cell, count, base), list(bench_scene(cell).things)
    with attach(base, bundle):
        alone, _ = measure_alone(base, bundle, things, judge, seeds)
        in_boxes, _ = measure_boxes(base, bundle, things, judge, synthesis_preset(base.family), images)
    in_boxes.pop("seconds_per_image")
    item = {"scene": cell.name, "photos": count, "alone": alone, "in_boxes": in_boxes}
    kept.write_text(json_text(item))
    return item


def main(
    work: Annotated[Path, typer.Option(help="Where half-done work is kept.")],
    scenes: Annotated[int, typer.Option(help="Of the four.")] = len(CELLS),
    seeds: Annotated[int, typer.Option(help="Pictures of each asset on each background.")] = 3,
    images: Annotated[int, typer.Option(help="Pictures with all assets in their boxes.")] = 9,
    name: str = "photos",
) -> None:
    """Writes scripts/results/<name>.json."""
    work.mkdir(parents=True, exist_ok=True)
    base, judge, items = load_base_model("toybox"), load_judge(), []
    for cell in CELLS[:scenes]:
        for count in COUNTS:
            items.append(measure(work, cell, count, base, judge, seeds, images))
            print(json_text(items[-1]), flush=True)
    by_count = {str(count): {part: pooled([item[part] for item in items if item["photos"] == count])
                             for part in ("alone", "in_boxes")} for count in COUNTS}  # fmt: skip
    print(write_result(name, {"scenes": [cell.name for cell in CELLS[:scenes]], "by_photos": by_count, "items": items}))


if __name__ == "__main__":
    typer.run(main)
