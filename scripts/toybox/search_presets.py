"""Searches the toybox's rates and attention weight on dev scenes, for each method with the same budget.

    python -m scripts.toybox.search_presets --recipe mifo --study runs/search/mifo.db
    python -m scripts.toybox.search_presets --recipe break-a-scene --study runs/search/break_a_scene.db
    python -m scripts.toybox.search_presets --recipe none --study runs/search/none.db
    python -m scripts.toybox.search_presets --recipe textual-inversion --study runs/search/textual_inversion.db
    python -m scripts.toybox.search_presets --recipe dreambooth-lora --study runs/search/dreambooth_lora.db

All else is the preset's: composites, draws, prior, and the number of steps. Textual inversion takes them all for embeddings and
DreamBooth-LoRA all for LoRA. These two and Break-A-Scene's may also choose to learn from the photo inside its masks instead of
composites, as they were published; Break-A-Scene's then with its own loss by picture, to which its weight belongs. A trial learns
two scenes of three look-alikes (toybench's first dev scenes of the levels `colors` and `patterns`), draws each asset alone on
three backgrounds, and all in boxes. The first trial of each is the preset's rates; the best three are learned again with another
seed, and the mean of both decides. Several processes may share a study. Interrupted, the same command goes on.
Writes every trial to scripts/results/search_<recipe>.json.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import optuna
import torch
import typer

from mifo.bundle.store import attach
from mifo.config import AttentionTerms, LearnConfig
from mifo.data.instance import load_instance
from mifo.learning.learn import learn
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.presets import learn_preset, synthesis_preset
from mifo.sampling.sample import sample_prompts
from mifo.toybox.examples import write_instance
from mifo.toybox.judge import judge_images, load_judge
from mifo.toybox.scoring import compare, nearest, surest
from mifo.toybox.world import BACKGROUND_PHRASES
from scripts.quality.measure_main_job import PLACES, measure_boxes
from scripts.record import write_result
from scripts.toybench.toybench_scenes import Cell, bench_scene

CELLS = (Cell("colors", 3, 0, "dev"), Cell("patterns", 3, 0, "dev"))
#: which rates each searches; all but the last two have both phases
RATES = {
    "mifo": ("embedding_rate", "lora_rate", "row_rate"),
    "break-a-scene": ("embedding_rate", "lora_rate", "row_rate"),
    "none": ("embedding_rate", "lora_rate", "row_rate"),
    "textual-inversion": ("embedding_rate",),
    "dreambooth-lora": ("lora_rate", "row_rate"),
}
ONE_PHASE = ("textual-inversion", "dreambooth-lora")
PHOTO_TOO = ("break-a-scene", *ONE_PHASE)  # may learn from the photo instead of composites
AGAIN = 3  # of the best, learned once more
RANGES = {"embedding_rate": (5e-3, 4e-2), "lora_rate": (1e-4, 8e-3), "row_rate": (5e-4, 8e-3)}
WEIGHTS = {"mifo": (0.05, 5.0), "break-a-scene": (1e-3, 1.0)}
#: where the search of the weight begins; Break-A-Scene's published 0.01 belongs to a loss by picture, and is a guess ten times as
#: large beside a loss by area
START = {"mifo": 0.5, "break-a-scene": 0.1}


def first_trials(recipe: str) -> list[dict[str, Any]]:
    """Where the search starts: our own rates, for every loss; Break-A-Scene's also from the photo, with its published weight."""
    ours = learn_preset("toybox")
    rates = {"embedding_rate": ours.embedding.learning_rate, "lora_rate": ours.lora.learning_rate,
             "row_rate": ours.lora.row_learning_rate}  # fmt: skip
    start: dict[str, Any] = {name: rates[name] for name in RATES[recipe]}
    if recipe in START:
        start["attention_weight"] = START[recipe]
    if recipe not in PHOTO_TOO:
        return [start]
    published = [{**start, "attention_weight": 1e-2, "composites": False}] if recipe == "break-a-scene" else []
    return [{**start, "composites": True}, *published]


def configured(recipe: str, values: Mapping[str, Any], seed: int = 0) -> LearnConfig:
    """The preset with another attention loss, other rates and another weight of that loss."""
    ours, theirs = learn_preset("toybox"), learn_preset("toybox", "break-a-scene")
    weight = values.get("attention_weight", 0.0)

    def terms(own: AttentionTerms, other: AttentionTerms) -> AttentionTerms:
        if recipe == "mifo":
            return replace(own, penalty_weight=weight, reward_weight=weight)
        if recipe == "break-a-scene":
            return replace(other, penalty_weight=weight)
        return replace(own, loss="none", relative_penalty_weight=0.0)

    embedding = replace(ours.embedding, learning_rate=values.get("embedding_rate", ours.embedding.learning_rate),
                        attention=terms(ours.embedding.attention, theirs.embedding.attention))  # fmt: skip
    lora = replace(ours.lora, learning_rate=values.get("lora_rate", ours.lora.learning_rate),
                   row_learning_rate=values.get("row_rate", ours.lora.row_learning_rate),
                   attention=terms(ours.lora.attention, theirs.lora.attention))  # fmt: skip
    steps = embedding.train_steps + lora.train_steps
    if recipe == "textual-inversion":
        embedding, lora = replace(embedding, train_steps=steps), replace(lora, train_steps=0)
    if recipe == "dreambooth-lora":
        embedding, lora = replace(embedding, train_steps=0), replace(lora, train_steps=steps)
    composites = values.get("composites", True)
    return replace(ours, embedding=embedding, lora=lora, composites=ours.composites if composites else theirs.composites,
                   masked_loss_by_area=composites or recipe != "break-a-scene", seed=seed)  # fmt: skip


def suggest(trial: optuna.Trial, recipe: str) -> dict[str, Any]:
    names = (*RATES[recipe], *(("attention_weight",) if recipe in WEIGHTS else ()))
    ranges = {name: RANGES.get(name) or WEIGHTS[recipe] for name in names}
    found: dict[str, Any] = {name: trial.suggest_float(name, low, high, log=True) for name, (low, high) in ranges.items()}
    return {**found, "composites": trial.suggest_categorical("composites", [True, False])} if recipe in PHOTO_TOO else found


def measure(base: BaseModel, judge: Any, config: LearnConfig, samples: int, images: int, cache: Path) -> dict[str, float]:
    """Means over the dev scenes. Backgrounds and prior, the same for all, are kept in `cache`."""
    right, confused, single, placed, wrong = [], [], [], [], []
    for cell in CELLS:
        scene = bench_scene(cell)
        with TemporaryDirectory(dir=cache, prefix=f"{os.getpid()}-") as work:
            write_instance(scene, Path(work) / "photo")
            bundle = learn(load_instance(Path(work) / "photo"), base, config, cache / f"{Path(work).name}-bundle")
        with attach(base, bundle):
            for index, token in enumerate(bundle.tokens):
                prompts = [f"a photo of {token} {BACKGROUND_PHRASES[place]}" for place in PLACES] * samples
                for verdict in judge_images(judge, sample_prompts(base, prompts, bundle.tokens, 1000 * index, 20)):
                    found = surest(verdict)
                    right.append(compare(found, scene.things[index]).all)
                    confused.append(nearest(found, scene.things) != index)
                    single.append(len(verdict.findings) == 1)
            boxes, _ = measure_boxes(base, bundle, list(scene.things), judge, synthesis_preset("toybox"), images)
            placed.append(boxes["right"]["percent"] / 100)
            wrong.append(boxes["wrong_instance"]["percent"] / 100)
    parts = {"right": mean(right), "confused": mean(confused), "one_thing": mean(single), "right_in_boxes": mean(placed),
             "wrong_in_boxes": mean(wrong)}  # fmt: skip
    good = parts["right"] + parts["right_in_boxes"] + 0.5 * parts["one_thing"]  # 2.5 at best
    value = good / 2.5 - (parts["confused"] + parts["wrong_in_boxes"]) / 2
    return {"value": round(value, 4), **{k: round(v, 4) for k, v in parts.items()}}


def main(
    recipe: Annotated[str, typer.Option(help=", ".join(RATES))] = "mifo",
    trials: int = 12,
    samples: Annotated[int, typer.Option(help="Pictures of each asset and background.")] = 2,
    images: Annotated[int, typer.Option(help="Pictures in boxes of each scene.")] = 4,
    sampler_seed: Annotated[int, typer.Option(help="Several processes share a study, each with its own.")] = 0,
    study: Path = Path("runs/search/mifo.db"),
    name: str | None = None,
) -> None:
    """Searches and writes scripts/results/<name>.json."""
    if recipe not in RATES:
        raise typer.BadParameter(f"{recipe} is not known; choose {', '.join(RATES)}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.manual_seed(0)
    cache = study.parent / "work"
    cache.mkdir(parents=True, exist_ok=True)
    sampler = optuna.samplers.TPESampler(seed=sampler_seed, multivariate=True, constant_liar=True)
    found = optuna.create_study(storage=f"sqlite:///{study}", study_name=recipe, direction="maximize", sampler=sampler,
                                load_if_exists=True)  # fmt: skip
    if not found.trials:
        for first in first_trials(recipe):
            found.enqueue_trial(first)
    base, judge = load_base_model("toybox"), load_judge()

    def objective(trial: optuna.Trial) -> float:
        parts = measure(base, judge, configured(recipe, suggest(trial, recipe)), samples, images, cache)
        for key, value in parts.items():
            trial.set_user_attr(key, value)
        print(recipe, trial.number, parts, trial.params, flush=True)
        return parts["value"]

    def done() -> list[optuna.trial.FrozenTrial]:
        return [t for t in found.get_trials() if t.state is optuna.trial.TrialState.COMPLETE and t.value is not None]

    found.optimize(objective, callbacks=[lambda study, _: study.stop() if len(done()) >= trials else None],
                   n_trials=None if len(done()) < trials else 0)  # fmt: skip
    best = sorted(done(), key=lambda t: -float(t.value or 0))
    records = [{"number": t.number, **t.user_attrs, **t.params} for t in best]
    for record, trial in list(zip(records, best, strict=True))[:AGAIN]:
        again = measure(base, judge, configured(recipe, trial.params, seed=1), samples, images, cache)
        record["again"], record["mean"] = again, round((record["value"] + again["value"]) / 2, 4)
        print(recipe, "again", trial.number, again, flush=True)
    records.sort(key=lambda r: -r.get("mean", r["value"] - 10))
    print(write_result(name or f"search_{recipe.replace('-', '_')}", {"recipe": recipe, "scenes": [c.name for c in CELLS],
                                                                     "trials": records}))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
