"""How well `segment` cuts things out: 40 drawn scenes with known masks, loose boxes, GrabCut.

    python -m scripts.quality.measure_segment
    python -m scripts.quality.measure_segment --photos PHOTO:x0,y0,x1,y1 --sheet segments.png    # a sheet to look at as well

A box is looser than its thing by 3 to LOOSE percent of the thing's side, drawn anew for each of the four sides.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mifo.boxes import Box
from mifo.io.sheets import caption_below, grid
from mifo.segmentation.grabcut import BoolArray, GrabCut, propose
from mifo.segmentation.hints import Hint, parse_box
from mifo.segmentation.instance_folder import overview
from mifo.segmentation.segment import read_photo, segment
from mifo.toybox.world import draw_scene
from scripts.record import spread, write_result
from scripts.toybench.toybench_scenes import COUNTS, LEVELS, Cell, bench_scene

FIRST = 40  # scenes from here on were not looked at when the method was made


def loose_box(mask: BoolArray, loose: float, rng: np.random.Generator) -> Box:
    """Around the mask, each side further out by 3 % to `loose` of the thing's width or height."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    x0, x1, y0, y1 = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    out = rng.uniform(0.03, loose, 4) * np.array([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
    return Box(max(0.0, float((x0 - out[0]) / width)), max(0.0, float((y0 - out[1]) / height)),
               min(1.0, float((x1 + out[2]) / width)), min(1.0, float((y1 + out[3]) / height)))  # fmt: skip


def iou(first: BoolArray, second: BoolArray) -> float:
    return float((first & second).sum() / max(1, (first | second).sum()))


def measure_boxes(scenes: int, pixels: int, loose: float) -> dict[str, Any]:
    """IoU of each thing's mask with the truth, where all things of a scene are marked and where one alone is; and how many of
    the things `--auto` proposes."""
    rng, ious, alone, seconds, proposed = np.random.default_rng(0), [], [], [], []
    for k in range(scenes):
        cell = Cell(LEVELS[k % len(LEVELS)], COUNTS[k % len(COUNTS)], FIRST + k, "dev")
        drawing = draw_scene(bench_scene(cell), pixels)
        truth = [np.asarray(mask.convert("L")) > 127 for mask in drawing.masks]
        hints = [Hint(loose_box(mask, loose, rng)) for mask in truth]
        started = time.perf_counter()
        found = GrabCut().masks(drawing.image, hints)
        seconds.append((time.perf_counter() - started) / len(hints))
        ious += [iou(a, b) for a, b in zip(found, truth, strict=True)]
        alone += [iou(GrabCut().masks(drawing.image, [hint])[0], mask) for hint, mask in zip(hints, truth, strict=True)]
        guesses = GrabCut().masks(drawing.image, propose(drawing.image))
        proposed += [max((iou(guess, mask) for guess in guesses), default=0.0) for mask in truth]
    low, high = (float(np.percentile(ious, q)) for q in (5, 95))
    return {"things": len(ious), "mean_iou": round(float(np.mean(ious)), 4), "median_iou": round(float(np.median(ious)), 4),
            "percentiles_5_95": [round(low, 3), round(high, 3)], "below_0.8": sum(v < 0.8 for v in ious),
            "mean_iou_marked_alone": round(float(np.mean(alone)), 4), "alone_below_0.8": sum(v < 0.8 for v in alone),
            "seconds_a_thing": spread(seconds),
            "auto_finds_percent": round(100 * float(np.mean([v >= 0.8 for v in proposed])), 1)}  # fmt: skip


def main(
    scenes: int = 40,
    pixels: int = 512,
    loose: Annotated[str, typer.Option(help="Largest looseness of a side, shares of the thing's.")] = "0.15,0.30",
    photos: Annotated[list[str] | None, typer.Option(help="PHOTO:x0,y0,x1,y1, for the sheet.")] = None,
    sheet: Path | None = None,
    name: str = "segment",
) -> None:
    """Measures and writes scripts/results/<name>.json."""
    rows = {each: measure_boxes(scenes, pixels, float(each)) for each in loose.split(",")}
    cells = []
    for given in photos or ():
        path, box = given.rsplit(":", 1)
        stored, image = read_photo(Path(path))
        found = segment(stored, image, [parse_box(box, image.size)])
        cells.append(caption_below(overview(found.image, found.masks), Path(path).name))
    if sheet and cells:
        grid(cells, 3).save(sheet)
    print(write_result(name, {"scenes": scenes, "pixels": pixels, "goal_mean_iou": 0.92, "by_looseness": rows}))


if __name__ == "__main__":
    typer.run(main)
