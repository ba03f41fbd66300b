"""Stable Diffusion XL's whole path by what it draws: the embedded model in XL's layout, by the judge.

    python -m scripts.quality.measure_toybox_xl

Single things as the model draws them; then three look-alike cars learned, drawn alone and in their boxes.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mifo.bundle.store import attach
from mifo.config import LearnConfig
from mifo.data.instance import load_instance
from mifo.learning.learn import learn
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.presets import learn_preset, synthesis_preset
from mifo.sampling.sample import sample_prompts
from mifo.toybox.judge import judge_images, load_judge
from scripts.quality.measure_main_job import load_things, measure_alone, measure_boxes
from scripts.record import write_result
from scripts.toybox.make_toybox_xl import QUIET, write_toybox_xl
from scripts.toybox.measure_base_model import series_scenes, summarize


def load_toybox_xl(folder: Path) -> BaseModel:
    """With the embedded model's settings, which are made for pictures of its size."""
    return replace(load_base_model(str(folder)), source="toybox")


def learn_config() -> LearnConfig:
    """The embedded model's, with rates for token embeddings that are smaller by QUIET."""
    config = learn_preset("toybox")
    return replace(config, embedding=replace(config.embedding, learning_rate=QUIET * config.embedding.learning_rate),
                   lora=replace(config.lora, row_learning_rate=QUIET * config.lora.row_learning_rate))  # fmt: skip


def main(
    single: Annotated[int, typer.Option(help="Pictures of single things.")] = 100,
    seeds: Annotated[int, typer.Option(help="Of each car alone, per background.")] = 4,
    images: Annotated[int, typer.Option(help="Pictures with three boxes.")] = 12,
    name: str = "toybox_xl",
) -> None:
    """Measures and writes scripts/results/<name>.json."""
    things, judge, example = load_things(Path("example/toy_car")), load_judge(), load_instance(Path("example/toy_car"))
    with tempfile.TemporaryDirectory() as work:
        base = load_toybox_xl(write_toybox_xl(Path(work) / "toybox-xl"))
        scenes = series_scenes(1, False, single)
        verdicts = []
        for first in range(0, single, 20):
            drawn = sample_prompts(base, [s.caption() for s in scenes[first : first + 20]], [], first, 25)
            verdicts += judge_images(judge, drawn)
        numbers: dict[str, Any] = {"instance": "toy_car", "single_things": summarize(scenes, verdicts)}
        started = time.monotonic()
        bundle = learn(example, base, learn_config(), Path(work) / "toy_car")
        numbers |= {"learn_seconds": round(time.monotonic() - started, 1), "widths": list(bundle.widths)}
        with attach(base, bundle):
            numbers["alone"], _ = measure_alone(base, bundle, things, judge, seeds)
            numbers["in_boxes"], _ = measure_boxes(base, bundle, things, judge, synthesis_preset("toybox"), images)
    print(write_result(name, numbers))


if __name__ == "__main__":
    typer.run(main)
