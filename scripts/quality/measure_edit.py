"""Editing on toybox, by the judge.

    python -m scripts.quality.measure_edit
    python -m scripts.quality.measure_edit --parts insert --blending-start 0 --name edit_start0      # to compare a setting
    ... --bundles output/bundles                                                             # learn once, use again

Parts: insert (each asset into drawn scenes with a free place), ranking (the best of four), reconstruction (PSNR outside the
mask), thin (masks 2 latent pixels wide), background (the learned <background> alone), seconds (the command, as a process).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from tqdm import tqdm

from mifo.boxes import Box
from mifo.bundle.instance_copy import kept_crops
from mifo.bundle.store import Bundle, attach, load_bundle
from mifo.config import EditConfig
from mifo.data.instance import load_instance, with_background
from mifo.editing.edit import EditRequest, edit
from mifo.io.sheets import caption_below, enlarge, grid
from mifo.learning.learn import learn
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.presets import edit_preset, learn_preset, synthesis_preset
from mifo.prompts import things_among
from mifo.sampling.sample import sample_prompts
from mifo.toybox.draw import BACKGROUNDS, COLORS
from mifo.toybox.judge import Verdict, judge_images, load_judge, match
from mifo.toybox.scoring import best_in_box, compare, nearest
from mifo.toybox.world import Drawing, Scene, Thing, draw_scene, random_scene
from scripts.quality.measure_main_job import load_things, measure_alone, measure_boxes
from scripts.record import share, spread, write_result

FIRST_SEED = 900_000  # scenes that neither the model nor the judge was trained on
PHOTO = 256  # pixels of a drawn picture, as of the examples
LONGER = 0.40  # the free place's longer side, as a fraction of the picture
GAP = 0.03
ALONE = ("right", "not_confused", "one_thing")  # of assets learned beside `<background>`, and without it
ALL_PARTS = "insert,ranking,reconstruction,thin,background,seconds"


def free_places(thing: Thing, scenes: int, first_seed: int = FIRST_SEED) -> list[tuple[Scene, Box]]:
    """Scenes of one or two things, and in each a place of the thing's own shape where nothing stands."""
    width, height = thing.box[2] - thing.box[0], thing.box[3] - thing.box[1]
    scale = LONGER / max(width, height)
    w, h = width * scale, height * scale
    found: list[tuple[Scene, Box]] = []
    for seed in range(first_seed, first_seed + 100 * scenes):
        scene = random_scene(seed, 1 + seed % 2)
        rng = np.random.default_rng(seed)
        for x, y in rng.uniform((0.02, 0.02), (0.98 - w, 0.98 - h), (40, 2)):
            box = (x, y, x + w, y + h)
            if all(box[2] + GAP <= o[0] or o[2] + GAP <= box[0] or box[3] + GAP <= o[1] or o[3] + GAP <= box[1]
                   for o in (t.box for t in scene.things)):  # fmt: skip
                found.append((scene, Box(*box)))
                break
        if len(found) == scenes:
            return found
    raise ValueError(f"only {len(found)} scenes have a free place")


def crops_of(bundle: Bundle) -> dict[str, Image.Image]:
    return kept_crops(bundle.folder, bundle.tokens)


def learned(example: str, base: BaseModel, folder: Path, background: bool = False, seed: int = 0) -> Bundle:
    """The example's bundle in `folder`; learned now unless it is there, with the same settings, from an earlier run."""
    instance = load_instance(Path("example") / example)
    if background:
        instance = with_background(instance)
    config = replace(learn_preset(base.family, assets=instance.count), seed=seed)
    target = folder / f"{example}{'_background' * background}{f'_seed{seed}' * (seed > 0)}"
    if target.exists():
        bundle = load_bundle(target)
        if bundle.config != config:
            raise typer.BadParameter(f"{target} was learned with other settings; move it away")
        return bundle
    words = [*[None] * (instance.count - 1), "background"] if background else None
    return learn(instance, base, config, target, initializer_words=words)


# --- parts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inserted:
    """One edit. Of several candidates `right` and `own` are of the first that was drawn, `best_*` of the one ranked best."""

    right: bool
    """Class, both colours and pattern"""
    best_right: bool
    own: tuple[bool, ...]
    """Whether the right instance stands in the mask: of each candidate, the best ranked first"""
    unranked: int
    """Which of those was drawn first"""
    difference: int
    """The largest outside the mask"""
    same_pixels: tuple[bool, ...]
    """Of each thing that was in the picture"""
    same_verdict: tuple[bool, ...]
    seconds: float
    before: Image.Image
    after: Image.Image


def insert(base: BaseModel, bundle: Bundle, things: list[Thing], index: int, scene: Scene, box: Box, judge: Any,
           config: EditConfig, seed: int, candidates: int) -> Inserted:  # fmt: skip
    """`<asset_index>` into a scene's free place. The bundle must be attached."""
    drawing = draw_scene(scene, PHOTO)
    mask = box.rasterize(PHOTO, PHOTO)
    prompt = f"a photo of {bundle.tokens[index]}"
    result = edit(base, EditRequest(drawing.image, mask, prompt, bundle.tokens, crops=crops_of(bundle)), config, seed, candidates)
    images = [result.edited_image(c) for c in range(candidates)]
    before, *after = judge_images(judge, [drawing.image, *images])
    unranked = min(range(candidates), key=lambda c: result.candidates[c].seed)

    def right(verdict: Verdict) -> bool:
        found, iou = best_in_box(verdict, box)
        return compare(found, things[index]).all and iou > 0.1

    return Inserted(
        right(after[unranked]), right(after[0]), tuple(_is_instance(v, box, things, index) for v in after), unranked,
        _outside(drawing, images[unranked], mask),
        tuple(_same_thing(drawing, images[unranked], i) for i in range(len(scene.things))),
        tuple(_same_verdicts(before, after[unranked], scene)), result.seconds, drawing.image, images[0],
    )  # fmt: skip


def measure_insert(base: BaseModel, bundles: Sequence[Bundle], things: list[Thing], judge: Any, config: EditConfig, scenes: int,
                   first: int, candidates: int = 1) -> tuple[dict[str, Any], list[Image.Image]]:  # fmt: skip
    """`<asset_i>` into the free places: the first and the best candidate, and what became of the rest of the picture.

    `bundles`: of several learning runs of the same things.
    """
    runs: list[list[Inserted]] = []
    cells: list[Image.Image] = []
    for bundle in bundles:
        edits = []
        with attach(base, bundle):
            for index, token in enumerate(bundle.tokens):
                for k, (scene, box) in enumerate(tqdm(free_places(things[index], scenes, FIRST_SEED + first), desc=token)):
                    seed = first + 1000 * index + k
                    made = insert(base, bundle, things, index, scene, box, judge, config, seed, candidates)
                    edits.append(made)
                    if k < 3 and not runs:
                        cells += [caption_below(enlarge(made.before, 192), f"{token}, seed {k}"), enlarge(made.after, 192)]
        runs.append(edits)
    every = [each for edits in runs for each in edits]
    numbers: dict[str, Any] = {
        "right_instance": share([e.own[e.unranked] for e in every]), "class_colors_pattern": share([e.right for e in every]),
        "class_colors_pattern_by_run": [share([e.right for e in edits])["percent"] for edits in runs],
    }  # fmt: skip
    if candidates > 1:
        numbers |= {"class_colors_pattern_best_ranked": share([e.best_right for e in every]),
                    "right_instance_best_ranked": share([e.own[0] for e in every]),
                    "right_instance_all_candidates": share([hit for e in every for hit in e.own])}  # fmt: skip
    return {
        **numbers, "candidates": candidates, "max_difference_outside": max(e.difference for e in every),
        "objects_unchanged_pixels": share([same for e in every for same in e.same_pixels]),
        "objects_unchanged_judge": share([same for e in every for same in e.same_verdict]),
        "seconds": spread([e.seconds for e in every]),
    }, cells  # fmt: skip


def _is_instance(verdict: Verdict, box: Box, things: list[Thing], index: int) -> bool:
    found, iou = best_in_box(verdict, box)
    return nearest(found, things) == index and iou > 0.1


def _outside(drawing: Drawing, image: Image.Image, mask: np.ndarray[Any, Any]) -> int:
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(drawing.image))
    return int(difference[~mask].max())


def _same_thing(drawing: Drawing, image: Image.Image, index: int) -> bool:
    inside = np.asarray(drawing.masks[index]) > 0
    return bool((np.asarray(image)[inside] == np.asarray(drawing.image)[inside]).all())


def _same_verdicts(before: Verdict, after: Verdict, scene: Scene) -> list[bool]:
    """Of the things that the judge finds before the edit: does it say the same class and main colour after it."""
    pairs = zip(match(before.findings, scene.things), match(after.findings, scene.things), strict=True)
    return [b is not None and a is not None and (a.class_name, a.main) == (b.class_name, b.main) for b, a in pairs if b]


def measure_reconstruction(base: BaseModel, config: EditConfig, scenes: int) -> dict[str, Any]:
    """PSNR outside the mask at the model's own resolution, where nothing is scaled; plain base model."""
    thing = random_scene(FIRST_SEED, 1).things[0]
    settings: dict[str, dict[str, Any]] = {
                "none": {"background": "none"},
                "optimization_weights": {"background": "optimization", "optimize": "weights"},
                "optimization_latents": {"background": "optimization", "optimize": "latents"}}  # fmt: skip
    numbers: dict[str, list[float]] = {name: [] for name in settings}
    for k, (scene, box) in enumerate(tqdm(free_places(thing, scenes), desc="reconstruction")):
        drawing = draw_scene(scene, base.resolution)
        mask = box.rasterize(base.resolution, base.resolution)
        for name, changes in settings.items():
            result = edit(base, EditRequest(drawing.image, mask, "a photo of a red car"), replace(config, **changes), k)
            numbers[name].append(_psnr_outside(drawing.image, result.edited_image(0), mask))
    means = {name: round(float(np.mean(values)), 2) for name, values in numbers.items()}
    gains = {f"{name}_gain_db": round(means[name] - means["none"], 2) for name in settings if name != "none"}
    return {"psnr_outside_db": means, **gains, "scenes": scenes, "steps": config.reconstruction_steps}


def _psnr_outside(before: Image.Image, after: Image.Image, mask: np.ndarray[Any, Any]) -> float:
    error = ((np.asarray(before).astype(float) - np.asarray(after)) ** 2)[~mask].mean()
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


def measure_thin(base: BaseModel, config: EditConfig, scenes: int, dilation: int,
                 first: int) -> tuple[dict[str, Any], list[Image.Image]]:  # fmt: skip
    """Bars 2 latent pixels wide on empty backgrounds, asked to be a balloon of one colour: is that the colour of most of it.

    With dilation, without it, and the candidate that ranks best of four, with it.
    """
    side, width = base.resolution, 2 * base.vae_factor
    hits: dict[tuple[int, int], list[bool]] = {(dilation, 1): [], (0, 1): [], (dilation, 4): []}
    cells = []
    for k in tqdm(range(first, first + scenes), desc="thin"):
        color = list(COLORS)[k % len(COLORS)]
        image = draw_scene(Scene((), BACKGROUNDS[k % len(BACKGROUNDS)], k), side).image
        mask = np.zeros((side, side), bool)
        start = (5 * k) % (side // base.vae_factor // 2) * base.vae_factor + side // 8
        mask[side // 8 : -side // 8, start : start + width] = True
        mask = mask.T if k % 2 else mask
        for (grown, candidates), found in hits.items():
            settings = replace(config, mask_dilation=grown)
            result = edit(base, EditRequest(image, mask, f"a photo of a {color} balloon"), settings, k, candidates)
            after = np.asarray(result.edited_image(0))
            found.append(named_color(after[mask]) == color)
            if k < first + 6:
                cells.append(caption_below(enlarge(result.edited_image(0), 192), f"{color}, dilation {grown}"))
    dilated, without, best = hits.values()
    return {"right_color_dilated": share(dilated), "right_color_without": share(without), "right_color_best_of_4": share(best),
            "dilation": dilation}, cells  # fmt: skip


def named_color(pixels: np.ndarray[Any, Any]) -> str:
    """(N, 3) -> the world's colour that is nearest to the median."""
    middle = np.median(pixels.astype(float), axis=0)
    return min(COLORS, key=lambda name: float(((np.array(COLORS[name]) - middle) ** 2).sum()))


def measure_background(base: BaseModel, bundle: Bundle, plain: Bundle, things: list[Thing], judge: Any,
                       samples: int) -> tuple[dict[str, Any], list[Image.Image]]:  # fmt: skip
    """`<background>` alone, and what learning it leaves of the assets; `plain` was learned without it."""
    with attach(base, plain):
        without, _ = measure_alone(base, plain, things, judge, max(1, samples // 6))
    assets = replace(bundle, tokens=things_among(bundle.tokens))
    with attach(base, bundle):
        alone, _ = measure_alone(base, assets, things, judge, max(1, samples // 6))
        boxes, _ = measure_boxes(base, assets, things, judge, synthesis_preset(base.family), max(1, samples // 2))
        images = sample_prompts(base, ["a photo of <background>"] * samples, bundle.tokens, 0, steps=25)
    verdicts = judge_images(judge, images)
    wanted = judge_images(judge, [load_instance(Path("example") / bundle.name.removesuffix("_background")).image])[0].background
    cells = [caption_below(enlarge(i, 192), f"{bundle.name}") for i in images[:6]]
    return {"no_object": share([not v.findings for v in verdicts]),
            "same_background": share([v.background == wanted for v in verdicts]),
            "assets_alone": {k: alone[k] for k in ALONE}, "assets_alone_without_it": {k: without[k] for k in ALONE},
            "assets_in_boxes": {k: boxes[k] for k in ("right_instance", "wrong_instance")}}, cells  # fmt: skip


def measure_seconds(bundle: Bundle, folder: Path, repeats: int = 3) -> dict[str, Any]:
    """Wall time of the command as a process, loading included; and of one with four candidates."""
    drawing = draw_scene(random_scene(FIRST_SEED, 1), PHOTO)
    drawing.image.save(folder / "img.png")
    Image.fromarray(Box(0.5, 0.5, 0.9, 0.8).rasterize(PHOTO, PHOTO).astype(np.uint8) * 255).save(folder / "mask.png")
    command = [sys.executable, "cli.py", "edit", str(bundle.folder), "--init-image", str(folder / "img.png"), "--mask",
               str(folder / "mask.png"), "--prompt", "a photo of <asset0>"]  # fmt: skip
    numbers = {}
    for name, more in (("one", []), ("four_candidates", ["--batch-size", "4"])):
        values = []
        for repeat in range(repeats):  # a command replaces no earlier output, so each has its own
            output = folder / f"{bundle.name}-{name}-{repeat}"
            started = time.monotonic()
            subprocess.run([*command, "--output-path", str(output), *more], check=True, capture_output=True)
            values.append(time.monotonic() - started)
        numbers[name] = spread(values)
    return numbers


# --- the command --------------------------------------------------------------------------------


def main(
    scenes: Annotated[int, typer.Option(help="Per asset and series; the bars ask for 24.")] = 24,
    parts: str = ALL_PARTS,
    instances: str = "toy_car,shelf",
    model_path: str = "toybox",
    blending_start: float | None = None,
    guidance: bool | None = None,
    box_inset: float | None = None,
    dilation: Annotated[int, typer.Option(help="Latent pixels, for thin masks.")] = 4,
    name: str = "edit",
    bundles: Annotated[Path | None, typer.Option(help="Keep what is learned here, and use what is there.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Learning runs of each photo, to insert from.")] = 1,
    first_seed: Annotated[int, typer.Option(help="Of the scenes; settings are chosen on others than those reported.")] = 0,
    sheet: Annotated[Path | None, typer.Option(help="Write some of the pictures here.")] = None,
) -> None:
    """Measures and writes scripts/results/<name>.json."""
    base, judge, chosen = load_base_model(model_path), load_judge(), parts.split(",")
    config = edit_preset(base.family)
    if blending_start is not None:
        config = replace(config, blending_start_percentage=blending_start)
    if guidance is not None:
        config = replace(config, guidance=replace(config.guidance, enabled=guidance))
    if box_inset is not None:
        config = replace(config, box_inset=box_inset)
    numbers: dict[str, Any] = {"model": model_path, "scenes": scenes, "learning_runs": runs,
                               "blending_start": config.blending_start_percentage,
                               "guidance": config.guidance.enabled, "box_inset": config.box_inset}  # fmt: skip
    cells: list[Image.Image] = []
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kept = bundles or work
        for example in instances.split(","):
            entry: dict[str, Any] = {}
            things = load_things(Path("example") / example)
            bundle = learned(example, base, kept) if {"insert", "ranking", "background", "seconds"} & set(chosen) else None
            if bundle and "insert" in chosen:
                several = [bundle, *(learned(example, base, kept, seed=run) for run in range(1, runs))]
                entry["insert"], shown = measure_insert(base, several, things, judge, config, scenes, first_seed)
                cells += shown
            if bundle and "ranking" in chosen:
                entry["ranking"], _ = measure_insert(base, [bundle], things, judge, config, max(1, scenes // 3),
                                                     first_seed, candidates=4)  # fmt: skip
            if bundle and "background" in chosen:
                whole = learned(example, base, kept, background=True)
                entry["background"], shown = measure_background(base, whole, bundle, things, judge, scenes)
                cells += shown
            if bundle and "seconds" in chosen:
                entry["seconds_of_the_command"] = measure_seconds(bundle, work)
            numbers[example] = entry
            print(example, entry)
        if "reconstruction" in chosen:
            numbers["reconstruction"] = measure_reconstruction(base, config, max(1, scenes // 2))
            print(numbers["reconstruction"])
        if "thin" in chosen:
            numbers["thin"], shown = measure_thin(base, config, scenes, dilation, first_seed)
            cells += shown
            print(numbers["thin"])
    if sheet and cells:
        grid(cells, columns=6).save(sheet)
    print(write_result(name, numbers))


if __name__ == "__main__":
    typer.run(main)
