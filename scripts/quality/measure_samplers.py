"""How many steps each sampler needs, on the embedded model, by the judge: single things, and three cars in boxes.

    python -m scripts.quality.measure_samplers --bundle Model_ours/toy_car

The same prompts, boxes and seeds for all; as large a part of the steps is guided as the preset guides of its own.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mifo.bundle.store import attach, load_bundle
from mifo.config import SynthesisConfig, with_steps
from mifo.io.json_text import record_text
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.model.samplers import SCHEDULERS
from mifo.presets import synthesis_preset
from mifo.synthesis.synthesize import synthesize
from mifo.toybox.judge import judge_images, load_judge
from scripts.quality.measure_main_job import load_things, measure_boxes
from scripts.record import write_result
from scripts.toybox.measure_base_model import series_scenes, summarize


def draw_singles(base: BaseModel, judge: Any, config: SynthesisConfig, count: int) -> dict[str, Any]:
    """Captions of scenes with one thing, seeds from 0 on."""
    scenes, verdicts, started = series_scenes(1, False, count), [], time.monotonic()
    for seed, scene in enumerate(scenes):
        verdicts += judge_images(judge, synthesize(base, scene.caption(), None, (), config, seed).images)
    found = summarize(scenes, verdicts)
    return {name: found[name] for name in ("class_and_color", "pattern", "background")} | {
        "seconds_per_image": round((time.monotonic() - started) / count, 2)}  # fmt: skip


def main(
    bundle: Annotated[Path, typer.Option(help="Three cars, learned from example/toy_car.")],
    steps: str = "10,15,20,25,30,50",
    samplers: str = ",".join(SCHEDULERS),
    singles: int = 40,
    images: Annotated[int, typer.Option(help="With three boxes each.")] = 9,
    name: str = "samplers",
) -> None:
    """Measures and writes scripts/results/<name>.json."""
    torch.set_num_threads(1)
    base, judge, things = load_base_model("toybox"), load_judge(), load_things(Path("example/toy_car"))
    learned, preset = load_bundle(bundle), synthesis_preset("toybox")
    numbers: dict[str, Any] = {"singles": singles, "images": images, "guidance_scale": preset.guidance_scale, "rows": []}
    for count in map(int, steps.split(",")):
        for sampler in samplers.split(","):
            config = replace(with_steps(preset, count), scheduler=sampler)  # type: ignore[arg-type]
            row: dict[str, Any] = {"sampler": sampler, "steps": count, "guided_steps": config.guidance.steps}
            row["single_things"] = draw_singles(base, judge, config, singles)
            with attach(base, learned):
                found, _ = measure_boxes(base, learned, things, judge, config, images)
            row["in_boxes"] = {k: found[k] for k in ("right", "right_instance", "mean_iou", "seconds_per_image")}
            numbers["rows"].append(row)
            print(record_text(row), flush=True)
            write_result(name, numbers)
    print(write_result(name, numbers))


if __name__ == "__main__":
    typer.run(main)
