"""The main job on toy_car, by the judge: learn, draw each car alone, draw all three in their boxes.

    python -m scripts.quality.measure_main_job
    python -m scripts.quality.measure_main_job --instance shelf --name main_job_shelf
    python -m scripts.quality.measure_main_job --recipes mifo,no-attention-loss-tuned,break-a-scene-tuned --runs 3
    python -m scripts.quality.measure_main_job --recipes mifo --seeds 1 --images 12 --beside-busy --name learn_seconds_busy

Runs side by side: this project, Break-A-Scene's recipe, and this project without box control.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mifo.boxes import Layout, parse_layout
from mifo.bundle.store import Bundle, attach
from mifo.config import LearnConfig, SynthesisConfig
from mifo.data.instance import load_instance
from mifo.io.json_text import json_text, record_text
from mifo.io.sheets import caption_below, draw_boxes, enlarge, grid
from mifo.learning.learn import learn
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.presets import learn_preset, scale_steps, synthesis_preset
from mifo.sampling.sample import sample_prompts
from mifo.synthesis.synthesize import synthesize
from mifo.toybox.judge import Finding, Verdict, judge_images, load_judge
from mifo.toybox.scoring import best_in_box, compare, nearest, surest
from mifo.toybox.world import BACKGROUND_PHRASES, Thing
from scripts.record import share, spread, write_result
from scripts.toybench.methods import training

PLACES = ("beach", "snow", "grass")
#: three arrangements for the boxes; each is used with every place
ARRANGEMENTS = (
    ((0.04, 0.08), (0.54, 0.32), (0.10, 0.64)),
    ((0.54, 0.06), (0.06, 0.38), (0.54, 0.68)),
    ((0.06, 0.66), (0.06, 0.10), (0.54, 0.38)),
)
LONGER_SIDE = 0.40  # fraction of the picture: what three things in one scene of the world measure


def load_things(folder: Path) -> list[Thing]:
    """The ground truth beside an example instance."""
    return [Thing(**{**t, "box": tuple(t["box"])}) for t in json.loads((folder / "truth.json").read_text())["things"]]


def arrangement(things: list[Thing], corners: tuple[tuple[float, float], ...]) -> list[list[float]]:
    """A box per thing, of the thing's own shape, at given top left corners."""
    boxes = []
    for thing, (x, y) in zip(things, corners, strict=False):
        w, h = thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]
        scale = LONGER_SIDE / max(w, h)
        boxes.append([x, y, min(1.0, x + w * scale), min(1.0, y + h * scale)])
    return boxes


def recipe_config(family: str, name: str, assets: int = 3) -> LearnConfig:
    """A recipe of the product, or a method of toybench."""
    return learn_preset(family, name, assets) if name in ("mifo", "break-a-scene") else training(name, 0, count=assets).config


def measure_alone(base: BaseModel, bundle: Bundle, things: list[Thing], judge: Any,
                  seeds: int) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
    """'a photo of <asset_i> PLACE' on three backgrounds: is it the right thing, is it ever another of them."""
    right, classes, colors, patterns, own, places, single, images = [], [], [], [], [], [], [], []
    either_order = []
    for index, token in enumerate(bundle.tokens):
        for place in PLACES:
            prompts = [f"a photo of {token} {BACKGROUND_PHRASES[place]}"] * seeds
            drawn = sample_prompts(base, prompts, bundle.tokens, 1000 * index, steps=25)
            images.append(drawn[0])
            for verdict in judge_images(judge, drawn):
                found = surest(verdict)
                look = compare(found, things[index])
                right.append(look.all)
                classes.append(look.class_name)
                colors.append(look.colors)
                patterns.append(look.pattern)
                either_order.append(looks_right_in_either_order(found, things[index]))
                own.append(nearest(found, things) == index)
                places.append(verdict.background == place)
                single.append(len(verdict.findings) == 1)
    return {
        "right": share(right), "right_colors_in_either_order": share(either_order), "class": share(classes),
        "colors": share(colors), "pattern": share(patterns),
        "not_confused": share(own), "background": share(places), "one_thing": share(single),
    }, images  # fmt: skip


def looks_right_in_either_order(found: Finding | None, thing: Thing) -> bool:
    """As `right`, but red and white stripes may be white and red ones: on small pictures their order is hard to see."""
    swapped = replace(thing, main=thing.second, second=thing.main)
    return compare(found, thing).all or (thing.pattern != "plain" and compare(found, swapped).all)


def measure_boxes(base: BaseModel, bundle: Bundle, things: list[Thing], judge: Any, config: SynthesisConfig, images: int,
                  with_boxes: bool = True) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
    """All assets in one picture, each asked for in its box."""
    right: list[bool] = []
    instance: list[bool] = []
    foreign: list[bool] = []
    ious: list[float] = []
    counts, places, seconds, kept = [], [], [], []
    for k in range(images):
        place = PLACES[k % len(PLACES)]
        corners = ARRANGEMENTS[(k // len(PLACES)) % len(ARRANGEMENTS)]
        layout = parse_layout(json_text(arrangement(things, corners)), bundle.tokens)
        prompt = f"a photo of {' and '.join(bundle.tokens)} {BACKGROUND_PHRASES[place]}"
        result = synthesize(base, prompt, layout if with_boxes else None, bundle.tokens, config, 5000 + k)
        seconds.append(result.seconds)
        verdict = judge_images(judge, result.images)[0]
        counts.append(len(verdict.findings) == len(things))
        places.append(verdict.background == place)
        _score_boxes(verdict, layout, things, right, instance, foreign, ious)
        if k < 6:
            kept.append(draw_boxes(enlarge(result.images[0], 192), layout))
    return {
        "right": share(right), "right_instance": share(instance), "wrong_instance": share(foreign),
        "mean_iou": round(sum(ious) / len(ious), 3), "count": share(counts), "background": share(places),
        "seconds_per_image": spread(seconds),
    }, kept  # fmt: skip


def _score_boxes(verdict: Verdict, layout: Layout, things: list[Thing], right: list[bool], instance: list[bool],
                 foreign: list[bool], ious: list[float]) -> None:  # fmt: skip
    """A box without any finding counts 0 IoU and no instance."""
    for index, (_, box) in enumerate(layout):
        found, iou = best_in_box(verdict, box)
        closest = nearest(found, things)
        right.append(compare(found, things[index]).all and iou > 0.1)
        instance.append(closest == index and iou > 0.1)
        foreign.append(closest is not None and closest != index and iou > 0.1)
        ious.append(iou)


def pooled(entries: list[Any]) -> Any:
    """The same numbers of several runs together: shares of all their pictures, means of all else; `spread` is over the runs."""
    first = entries[0]
    if isinstance(first, dict) and "percent" in first:
        hits = sum(round(entry["percent"] * entry["of"] / 100) for entry in entries)
        return share([True] * hits + [False] * (sum(entry["of"] for entry in entries) - hits))
    if isinstance(first, dict) and "median" in first:
        return spread([entry["median"] for entry in entries])
    if isinstance(first, dict):
        return {key: pooled([entry[key] for entry in entries]) for key in first}
    return round(sum(entries) / len(entries), 3)


def main(
    instance: str = "toy_car",
    model_path: str = "toybox",
    seeds: Annotated[int, typer.Option(help="Per asset and background; the bars ask for 8.")] = 8,
    images: Annotated[int, typer.Option(help="Pictures with boxes; the bars ask for 24.")] = 24,
    recipes: str = "mifo,break-a-scene",
    step_factor: Annotated[float, typer.Option(help="So many times the recipe's steps.")] = 1.0,
    runs: Annotated[int, typer.Option(help="Learning runs of each recipe, of the seeds from 0 on.")] = 1,
    processes: Annotated[int, typer.Option(help="Runs at a time; with more than one, seconds are beside other work.")] = 1,
    beside_busy: Annotated[bool, typer.Option(help="Beside another process that keeps one core busy.")] = False,
    name: str = "main_job",
    sheet: Path | None = None,
) -> None:
    """Measures and writes scripts/results/<name>.json. Numbers are of all runs together; `each_run` has them apart."""
    numbers: dict[str, Any] = {"instance": instance, "model": model_path, "runs": runs, "step_factor": step_factor,
                               "processes": processes, "beside_busy": beside_busy}  # fmt: skip
    cells = []
    asked = [(recipe, run) for recipe in recipes.split(",") for run in range(runs)]
    work = Path(tempfile.mkdtemp())
    beside = busy_core() if beside_busy else nullcontext()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool, beside:
        started = [pool.submit(measure_one, instance, model_path, recipe, step_factor, run, seeds, images, work)
                   for recipe, run in asked]  # fmt: skip
        for (recipe, run), future in zip(asked, started, strict=True):
            entry, shown = future.result()
            if run == 0:
                cells += shown
            each = [*numbers.get(recipe, {}).get("each_run", []), entry]
            numbers[recipe] = {**pooled(each), "each_run": each}
            print(recipe, run, record_text(entry, indent=1), flush=True)
            write_result(name, numbers)
    if sheet:
        grid(cells, columns=9).save(sheet)
    shutil.rmtree(work)
    print(write_result(name, numbers))


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process that computes for as long as the block lasts."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            other.kill()


def measure_one(instance: str, model_path: str, recipe: str, step_factor: float, run: int, seeds: int, images: int,
                work: Path) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
    """One learning run and its pictures; and some of them to look at."""
    folder = Path("example") / instance
    things, judge, base = load_things(folder), load_judge(), load_base_model(model_path)
    started = time.monotonic()
    config = replace(scale_steps(recipe_config(base.family, recipe, len(things)), step_factor), seed=run)
    bundle = learn(load_instance(folder), base, config, work / f"{recipe}-{run}")
    size = sum(p.stat().st_size for p in bundle.folder.rglob("*") if p.is_file()) / 2**20
    entry: dict[str, Any] = {"learn_seconds": round(time.monotonic() - started, 1), "bundle_mib": round(size, 2)}
    entry |= {key: bundle.metadata[key] for key in ("peak_gib", "attention_inside_mask")}
    control = synthesis_preset(base.family)
    with attach(base, bundle):
        entry["alone"], alone = measure_alone(base, bundle, things, judge, seeds)
        entry["in_boxes"], placed = measure_boxes(base, bundle, things, judge, control, images)
        plain = replace(control, bounded=False, guidance=replace(control.guidance, enabled=False))
        entry["without_box_control"], free = measure_boxes(base, bundle, things, judge, plain, images, False)
    shown = [caption_below(enlarge(i, 192), f"{recipe}: alone") for i in alone[:9]]
    shown += [caption_below(i, f"{recipe}: boxes") for i in placed]
    return entry, shown + [caption_below(i, f"{recipe}: no boxes") for i in free[:3]]


if __name__ == "__main__":
    typer.run(main)
