"""Searches the toybox's learning preset on dev scenes with Optuna's TPE, at a fixed cost of training.

    python -m scripts.toybox.search_presets --trials 40 --study runs/search/ours.db
    python -m scripts.toybox.search_presets --recipe break-a-scene --trials 40 --study runs/search/break_a_scene.db

Each recipe gets the same trials, scenes, seeds and seconds. A trial learns two scenes of three look-alikes (toybench's
first dev scenes of the levels `colors` and `patterns`) and draws each asset alone on three backgrounds; its value is the mean
share of pictures with all looks right, minus half the share with another asset's looks, plus a quarter of the share with one
thing only. Interrupted, the same command goes on. Writes every trial to scripts/results/search_<recipe>.json.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import optuna
import torch
import typer

from mifo.bundle.store import attach
from mifo.config import LearnConfig
from mifo.data.instance import load_instance
from mifo.learning.learn import learn
from mifo.model.base import BaseModel, load_base_model
from mifo.presets import learn_preset
from mifo.sampling.sample import sample_prompts
from mifo.toybox.examples import write_instance
from mifo.toybox.judge import judge_images, load_judge
from mifo.toybox.scoring import compare, nearest, surest
from mifo.toybox.world import BACKGROUND_PHRASES
from scripts.record import write_result
from scripts.toybench.toybench_scenes import Cell, bench_scene

CELLS = (Cell("colors", 3, 0, "dev"), Cell("patterns", 3, 0, "dev"))
PLACES = ("beach", "snow", "grass")


#: Draws a step -> seconds of one step on one thread, and what a prior image adds; measured on the machine that searched.
COSTS = {1: (0.085, 0.05), 2: (0.115, 0.05), 4: (0.165, 0.05)}


def suggest(trial: optuna.Trial, recipe: str, seconds: float) -> LearnConfig:
    """The same freedom for each recipe, and for ours its own terms; steps so that training takes about `seconds`."""
    preset = learn_preset("toybox", recipe)
    draws = trial.suggest_categorical("draws", [1, 2, 4])
    share = trial.suggest_categorical("phase1_share", [0.35, 0.5, 0.65])
    every = trial.suggest_categorical("prior_every", [1, 2, 4])
    step, prior = COSTS[draws]
    steps = (round(seconds * share / step), round(seconds * (1 - share) / (step + prior / every)))
    ours = recipe == "mifo"
    weight = trial.suggest_float("attention_weight", 1e-2, 3.0, log=True)
    reward = trial.suggest_categorical("reward_share", [0.0, 0.33]) if ours else 0.0
    terms = replace(preset.embedding.attention, penalty_weight=weight)
    if ours:
        terms = replace(terms, reward_weight=weight, reward_steps=round(reward * steps[0]))
    embedding = replace(preset.embedding, train_steps=steps[0], draws=draws, attention=terms, cosine_restarts=True,
                        learning_rate=trial.suggest_float("embedding_rate", 3e-3, 3e-2, log=True))  # fmt: skip
    rate = trial.suggest_float("lora_rate", 4e-4, 5e-3, log=True)
    lora = replace(preset.lora, train_steps=steps[1], draws=draws, attention=replace(terms, reward_steps=0), learning_rate=rate,
                   row_learning_rate=trial.suggest_float("row_rate", 4e-4, 1e-2, log=True),
                   rank=trial.suggest_categorical("rank", [4, 16]))  # fmt: skip
    return replace(
        preset,
        embedding=embedding,
        lora=lora,
        prior=replace(learn_preset("toybox").prior, every_steps=every),
        placements=trial.suggest_categorical("placements", [4, 8] if ours else [0, 8]),
        locality_weight=trial.suggest_float("locality", 0.3, 3.0, log=True) if ours else 0.0,
        locality_every=2,
    )


def measure(base: BaseModel, judge: Any, config: LearnConfig, samples: int, cache: Path) -> dict[str, float]:
    """Means over the dev scenes; seconds are the processor's."""
    right, confused, single, seconds = [], [], [], 0.0
    for cell in CELLS:
        scene = bench_scene(cell)
        with TemporaryDirectory(dir=cache) as work:
            write_instance(scene, Path(work) / "photo")
            started = time.process_time()
            bundle = learn(load_instance(Path(work) / "photo"), base, config, cache / f"{Path(work).name}-bundle")
            seconds += (time.process_time() - started) / len(CELLS)
        with attach(base, bundle):
            for index, token in enumerate(bundle.tokens):
                prompts = [f"a photo of {token} {BACKGROUND_PHRASES[place]}" for place in PLACES] * samples
                for verdict in judge_images(judge, sample_prompts(base, prompts, bundle.tokens, 1000 * index, 20)):
                    found = surest(verdict)
                    right.append(compare(found, scene.things[index]).all)
                    confused.append(nearest(found, scene.things) != index)
                    single.append(len(verdict.findings) == 1)
    parts = {"right": right, "confused": confused, "one_thing": single}
    return {**{k: sum(v) / len(v) for k, v in parts.items()}, "learn_cpu_seconds": round(seconds, 1)}


def main(
    recipe: str = "mifo",
    trials: int = 40,
    seconds: Annotated[float, typer.Option(help="Of one thread, for the steps of both phases.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Of the sampler; several processes share a study, each with its own.")] = 0,
    samples: Annotated[int, typer.Option(help="Pictures of each asset and background.")] = 2,
    study: Path = Path("runs/search/mifo.db"),
    name: str | None = None,
) -> None:
    """Searches and writes scripts/results/<name>.json."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.manual_seed(0)
    study.parent.mkdir(parents=True, exist_ok=True)
    sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
    found = optuna.create_study(storage=f"sqlite:///{study}", study_name=f"{recipe} {seconds:g} s", direction="maximize",
                                sampler=sampler, load_if_exists=True)  # fmt: skip
    base, judge = load_base_model("toybox"), load_judge()

    def objective(trial: optuna.Trial) -> float:
        with TemporaryDirectory() as work:
            parts = measure(base, judge, suggest(trial, recipe, seconds), samples, Path(work))
        for key, value in parts.items():
            trial.set_user_attr(key, value)
        value = parts["right"] - 0.5 * parts["confused"] + 0.25 * parts["one_thing"]
        print(trial.number, f"{value:.3f}", parts, trial.params, flush=True)
        return value

    done = sum(t.state is optuna.trial.TrialState.COMPLETE for t in found.trials)
    found.optimize(objective, n_trials=max(0, trials - done))
    records = [{"number": t.number, "value": t.value, **t.params, **t.user_attrs} for t in found.trials if t.value is not None]
    best = sorted(records, key=lambda r: -r["value"])
    print(write_result(name or f"search_{recipe}", {"seconds": seconds, "scenes": [c.name for c in CELLS], "trials": best}))


if __name__ == "__main__":
    typer.run(main)
