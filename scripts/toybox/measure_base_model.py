"""How well the base model draws what a prompt says, by the judge.

    python -m scripts.toybox.measure_base_model --images 400

Prompts are the full captions of held-out scenes, so prompts and seeds are fixed by this file.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm import tqdm

from mifo.io.sheets import caption_below, enlarge, grid
from mifo.model.load_base import load_base_model
from mifo.sampling.sample import sample_prompts
from mifo.toybox.judge import Verdict, judge_images, load_judge
from mifo.toybox.scoring import main_color_and_class, surest
from mifo.toybox.world import Scene, Thing, random_scene
from scripts.record import share, write_result

FIRST_SEED = 800_000
BATCH = 20
#: name -> (things in the scene, pattern of the first thing or None for any)
SERIES = {"single_plain_or_patterned": (1, False), "single_patterned": (1, True), "two_objects": (2, False),
          "three_objects": (3, False)}  # fmt: skip


def series_scenes(count: int, patterned: bool, images: int) -> list[Scene]:
    """Held-out scenes, in order of their seeds."""
    scenes: list[Scene] = []
    seed = FIRST_SEED + 100_000 * count + 50_000 * patterned
    while len(scenes) < images:
        scene = random_scene(seed, count)
        seed += 1
        if len(scene.things) == count and (not patterned or scene.things[0].pattern != "plain"):
            scenes.append(scene)
    return scenes


def pair_findings(verdict: Verdict, things: tuple[Thing, ...]) -> bool:
    """Whether each asked thing is there in class and main colour; places are the model's own choice."""
    free = sorted(verdict.findings, key=lambda f: -f.score)
    for thing in things:
        hit = next((f for f in free if main_color_and_class(f, thing)), None)
        if hit is None:
            return False
        free.remove(hit)
    return True


def main(
    images: Annotated[int, typer.Option(help="Pictures per series.")] = 400,
    steps: int = 25,
    model_path: str = "toybox",
    sheet: Annotated[Path | None, typer.Option(help="Write the first pictures of each series here.")] = None,
    name: str = "base_model",
    device: str = "cpu",
) -> None:
    """Measures and writes scripts/results/<name>.json."""
    base, judge = load_base_model(model_path, device), load_judge()
    numbers: dict[str, Any] = {"model": model_path, "images_per_series": images, "steps": steps}
    cells = []
    for label, (count, patterned) in SERIES.items():
        started = time.monotonic()
        scenes = series_scenes(count, patterned, images)
        verdicts = []
        for first in tqdm(range(0, images, BATCH), desc=label):
            batch = scenes[first : first + BATCH]
            drawn = sample_prompts(base, [s.caption() for s in batch], [], first, steps)
            verdicts += judge_images(judge, drawn)
            if first == 0:
                cells += [caption_below(enlarge(i, 256), s.caption()[11:], 10) for i, s in zip(drawn[:8], batch, strict=False)]
        numbers[label] = summarize(scenes, verdicts)
        numbers[label]["seconds_per_image"] = round((time.monotonic() - started) / images, 2)
        print(label, numbers[label])
    if sheet:
        grid(cells, columns=8).save(sheet)
    print(write_result(name, numbers, device))


def summarize(scenes: list[Scene], verdicts: list[Any]) -> dict[str, Any]:
    """Class and colour, background, pattern, and the count of things."""
    right = [pair_findings(v, s.things) for s, v in zip(scenes, verdicts, strict=True)]
    result = {
        "class_and_color": share(right),
        "background": share([v.background == s.background for s, v in zip(scenes, verdicts, strict=True)]),
        "count": share([len(v.findings) == len(s.things) for s, v in zip(scenes, verdicts, strict=True)]),
    }
    if len(scenes[0].things) == 1:
        tops = [surest(v) for v in verdicts]
        asked = [s.things[0] for s in scenes]
        result["class"] = share([t is not None and t.class_name == a.class_name for t, a in zip(tops, asked, strict=True)])
        pairs = [(t, a) for t, a in zip(tops, asked, strict=True) if a.pattern != "plain"]
        result["pattern"] = share([t is not None and t.pattern == thing.pattern for t, thing in pairs])
    return result


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
