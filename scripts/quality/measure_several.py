"""Assets of several photos in one picture: is each right, in its own box, beside the others?

    python -m scripts.quality.measure_several --work several

Drawn photos of two things each, a bundle of each; compositions of two and three bundles, one asset of each, in boxes. Two levels
of likeness: things of different classes, and things of one class and pattern that differ in colour alone. Against each other:

    by place    each bundle's LoRA in its own assets' boxes (what `synthesize` does with several bundles)
    summed      all LoRA of the UNet on everywhere, as diffusers' `set_adapters` has them; the same boxes, masks, guidance and
                texts, each of its own bundle's text encoder
    joint       the things of the composition learned from one photo that shows them together (the first --joint of each cell)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from mifo import learn, load_base_model, load_bundle, load_instance, synthesize
from mifo.attention.bounded import BoundedAttention
from mifo.boxes import Box
from mifo.bundle.store import Bundle
from mifo.io.json_text import json_text
from mifo.io.sheets import caption_below, draw_boxes, grid
from mifo.model.base import BaseModel
from mifo.presets import synthesis_preset
from mifo.toybox.draw import CLASSES, COLORS
from mifo.toybox.examples import NOWHERE, write_instance
from mifo.toybox.judge import Judge, judge_images, load_judge
from mifo.toybox.scoring import best_in_box, compare, nearest
from mifo.toybox.world import BACKGROUND_PHRASES, Scene, Thing, placed
from scripts.record import write_result

LEVELS = ("classes", "look-alikes")
PHOTOS, THINGS = 4, 2
PLACES = (((0.27, 0.28), 0.44), ((0.7, 0.7), 0.44))
BOXES = {2: ([0.04, 0.28, 0.46, 0.72], [0.54, 0.28, 0.96, 0.72]),
         3: ([0.04, 0.06, 0.44, 0.46], [0.56, 0.06, 0.96, 0.46], [0.3, 0.54, 0.7, 0.94])}  # fmt: skip
BACKGROUNDS = ("grass", "snow", "beach", "wooden floor")
MIN_IOU = 0.3  # with its box, for a thing to be in it


def photo_things(level: str) -> list[list[Thing]]:
    """Of each photo."""
    rng = np.random.default_rng(LEVELS.index(level))
    colors = [str(c) for c in rng.permutation(list(COLORS))][: PHOTOS * THINGS]
    classes = [str(c) for c in rng.permutation(list(CLASSES))]
    found = []
    for k, color in enumerate(colors):
        class_name = classes[k % len(classes)] if level == "classes" else "car"
        center, size = PLACES[k % THINGS]
        second = "white" if color != "white" else "black"
        found.append(placed(Thing(class_name, color, second, "plain", NOWHERE), center, size))
    return [found[k : k + THINGS] for k in range(0, len(found), THINGS)]


def compositions(level: str, bundles: int, count: int) -> Iterator[tuple[list[tuple[int, int]], str]]:
    """((photo, thing) of each box, background)."""
    rng = np.random.default_rng([LEVELS.index(level), bundles])
    for _ in range(count):
        photos = rng.permutation(PHOTOS)[:bundles]
        yield [(int(p), int(rng.integers(THINGS))) for p in photos], str(rng.choice(BACKGROUNDS))


def learned(work: Path, name: str, scene: Scene, base: BaseModel) -> Bundle:
    """From a drawn photo; kept."""
    folder, photo = work / "bundles" / name, work / "photos" / name
    if (folder / "bundle.json").exists():
        return load_bundle(folder)
    if not photo.exists():
        write_instance(scene, photo)
    print(f"learning {name}", flush=True)
    return learn(load_instance(photo), base, folder, resume=True)


@contextmanager
def all_everywhere() -> Iterator[None]:
    """Adapters act on all pixels and all words."""
    before = BoundedAttention.pixel_gates, BoundedAttention.key_gates

    def pixels(self: BoundedAttention, size: tuple[int, int]) -> torch.Tensor:
        return torch.ones_like(before[0](self, size))

    def keys(self: BoundedAttention) -> torch.Tensor:
        return torch.ones_like(before[1](self))

    BoundedAttention.pixel_gates, BoundedAttention.key_gates = pixels, keys  # type: ignore[method-assign]
    try:
        yield
    finally:
        BoundedAttention.pixel_gates, BoundedAttention.key_gates = before  # type: ignore[method-assign]


def judged(judge: Judge, image: Image.Image, things: list[Thing], boxes: list[list[float]], background: str) -> dict[str, Any]:
    """Of one picture: per box whether the right thing is in it, all its looks, and whether it has another's colour."""
    (verdict,) = judge_images(judge, [image])
    right, looks, other = [], [], []
    for k, box in enumerate(boxes):
        finding, iou = best_in_box(verdict, Box(*box))
        finding = finding if iou >= MIN_IOU else None
        right.append(nearest(finding, things) == k)
        looks.append(compare(finding, things[k]).all)
        mains = {thing.main for j, thing in enumerate(things) if j != k} - {things[k].main}
        other.append(finding is not None and finding.main in mains)
    return {"right": right, "all_looks": looks, "others_color": other, "background": verdict.background == background}


def measure(work: Path, level: str, bundles: int, count: int, joint: int, seeds: int) -> list[dict[str, Any]]:
    base, judge, found = load_base_model("toybox"), load_judge(), []
    photos = photo_things(level)
    kept = [learned(work, f"{level}{k}", Scene(tuple(things), "plain", k), base) for k, things in enumerate(photos)]
    for number, (chosen, background) in enumerate(compositions(level, bundles, count)):
        path = work / "items" / f"{level}-{bundles}-{number:02d}.json"
        if path.exists():
            found += json.loads(path.read_text())
            continue
        things, boxes = [photos[p][t] for p, t in chosen], [list(box) for box in BOXES[bundles]]
        several = [kept[p] for p, _ in chosen]
        names = [f"<{kept[p].name}.asset{t}>" for p, t in chosen]
        prompt = f"a photo of {' and '.join(names)} {BACKGROUND_PHRASES[background]}"
        rows, cells = [], []
        for method in ("by place", "summed", *(["joint"] if number < joint else [])):
            used: Any = several
            said = prompt
            if method == "joint":
                together = tuple(placed(t, ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2), 0.38)
                                 for t, b in zip(things, boxes, strict=True))  # fmt: skip
                used = learned(work, f"joint-{level}-{bundles}-{number}", Scene(together, "plain", number), base)
                said = f"a photo of {' and '.join(used.tokens)} {BACKGROUND_PHRASES[background]}"
            for seed in range(seeds):
                if method == "summed":
                    with all_everywhere():
                        result = synthesize(base, used, said, boxes, seed=seed)
                else:
                    result = synthesize(base, used, said, boxes, seed=seed)
                image = result.images[0]
                rows.append({"level": level, "bundles": bundles, "number": number, "method": method, "seed": seed,
                             "seconds": round(result.synthesis.seconds, 2), **judged(judge, image, things, boxes, background)})
                cells.append(caption_below(image.resize((256, 256), Image.Resampling.LANCZOS), f"{method}, seed {seed}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(cells, seeds).save(path.with_suffix(".png"))
        path.write_text(json_text(rows))
        print(path.stem, flush=True)
        found += rows
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares with 95 % intervals: compositions are drawn again, with all their pictures (percentile bootstrap)."""
    by_number: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        by_number.setdefault((row["level"], row["bundles"], row["number"]), []).append(row)
    groups, rng = list(by_number.values()), np.random.default_rng(0)
    found: dict[str, Any] = {"compositions": len(groups), "pictures": len(rows)}
    for name in ("right", "all_looks", "others_color", "background"):
        values = [float(np.mean([np.mean(row[name]) for row in group])) for group in groups]
        draws = [float(np.mean(rng.choice(values, len(values)))) for _ in range(2000)]
        low, high = np.percentile(draws, (2.5, 97.5))
        found[name] = {"share": round(float(np.mean(values)), 3), "low": round(float(low), 3), "high": round(float(high), 3)}
    found["seconds_median"] = round(float(np.median([row["seconds"] for row in rows])), 2)
    return found


def draw_sheet(work: Path, path: Path) -> None:
    """The first composition of two bundles at each level: both photos, and the new pictures of one thing of each."""
    base, cells = load_base_model("toybox"), []
    for level in LEVELS:
        photos = photo_things(level)
        chosen, background = next(compositions(level, 2, 1))
        bundles = [load_bundle(work / "bundles" / f"{level}{p}") for p, _ in chosen]
        for (p, t), bundle in zip(chosen, bundles, strict=True):
            photo = Image.open(work / "photos" / f"{level}{p}" / "img.png").convert("RGB").resize((256, 256))
            thing = photos[p][t]
            boxed = draw_boxes(photo, [(f"<asset{t}>", Box(*thing.box))])
            cells.append(caption_below(boxed, f"photo: <{bundle.name}.asset{t}>"))
        names = " and ".join(f"<{b.name}.asset{t}>" for b, (_, t) in zip(bundles, chosen, strict=True))
        result = synthesize(base, bundles, f"a photo of {names} {BACKGROUND_PHRASES[background]}",
                            [list(box) for box in BOXES[2]], num_images=2)  # fmt: skip
        cells += [caption_below(image.resize((256, 256), Image.Resampling.LANCZOS), f"both, {background}, seed {k}")
                  for k, image in enumerate(result.images)]  # fmt: skip
    grid(cells, 4).save(path, optimize=True)


def measure_one(work: Path, joint: int, seeds: int) -> dict[str, Any]:
    """One bundle of the things of a joint photo: its LoRA everywhere against in its boxes alone, on each background."""
    base, judge = load_base_model("toybox"), load_judge()
    rows: list[dict[str, Any]] = []
    for level in LEVELS:
        photos = photo_things(level)
        for bundles in BOXES:
            for number, (chosen, _) in enumerate(compositions(level, bundles, joint)):
                bundle = load_bundle(work / "bundles" / f"joint-{level}-{bundles}-{number}")
                things, boxes = [photos[p][t] for p, t in chosen], [list(box) for box in BOXES[bundles]]
                for background in BACKGROUNDS:
                    prompt = f"a photo of {' and '.join(bundle.tokens)} {BACKGROUND_PHRASES[background]}"
                    for place in ("everywhere", "boxes"):
                        config = replace(synthesis_preset("toybox"), lora=place)
                        result = synthesize(base, bundle, prompt, boxes, num_images=seeds, config=config)
                        rows += [{"level": level, "bundles": bundles, "number": number, "method": place, "seed": seed,
                                  "seconds": result.synthesis.seconds / seeds, **judged(judge, image, things, boxes, background)}
                                 for seed, image in enumerate(result.images)]  # fmt: skip
    return {place: summary([row for row in rows if row["method"] == place]) for place in ("everywhere", "boxes")}


def main(
    work: Annotated[Path, typer.Option(help="Bundles and pictures are kept here; a second run goes on.")] = Path("several"),
    count: Annotated[int, typer.Option(help="Compositions of each level and number of bundles.")] = 10,
    joint: Annotated[int, typer.Option(help="Of them, those that are learned from one photo as well.")] = 2,
    seeds: int = 2,
    one: Annotated[bool, typer.Option("--one", help="Where one bundle's LoRA should act, on what a run has learned.")] = False,
    sheet: Annotated[Path | None, typer.Option(help="A PNG of the first compositions.")] = None,
) -> None:
    if one:
        write_result("lora_place", measure_one(work, joint, seeds))
        return
    rows = [row for level in LEVELS for bundles in BOXES for row in measure(work, level, bundles, count, joint, seeds)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    record: dict[str, Any] = {}
    for method in methods:
        mine = [row for row in rows if row["method"] == method]
        record[method] = {"all": summary(mine)}
        for level in LEVELS:
            for bundles in BOXES:
                record[method][f"{level}, {bundles} bundles"] = summary(
                    [row for row in mine if row["level"] == level and row["bundles"] == bundles])  # fmt: skip
    with_joint = {(row["level"], row["bundles"], row["number"]) for row in rows if row["method"] == "joint"}
    for method in methods:
        record[method]["where joint was learned"] = summary(
            [row for row in rows if row["method"] == method and (row["level"], row["bundles"], row["number"]) in with_joint])
    write_result("several", record)
    if sheet:
        draw_sheet(work, sheet)


if __name__ == "__main__":
    typer.run(main)
