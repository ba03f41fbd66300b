"""Methods side by side on scenes that none of them has seen: same scenes, same seeds, same judge.

    python -m scripts.toybench.toybench --quick                                  a minute or two: does everything run
    python -m scripts.toybench.toybench --workers 2                              the comparison, 10 scenes a cell
    python -m scripts.toybench.toybench --workers 2 --methods ablations --counts 3
    python -m scripts.toybench.toybench --workers 2 --methods study --learning-seeds 3    what the attention losses are worth
    python -m scripts.toybench.toybench --workers 2 --large --scenes 4           the series with 6 and 8 instances
    python -m scripts.toybench.toybench --workers 2 --split holdout --scenes 5   the seeds that were never used for choosing
    python -m scripts.toybench.toybench --report-only                            table and figure from what is there

Every scene and method is one item, one JSON under --work; an interrupted run goes on where it was. Items whose settings or
base model have changed are measured again; the bundles beside them (under 1 MiB each) spare it the learning where only
drawing has changed.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mifo.config import to_dict
from mifo.data.instance import Instance, fit_instance, load_instance
from mifo.evaluation.attention import attention_leakage
from mifo.evaluation.cases import Case, default_cases, mask_aspects
from mifo.evaluation.measure import measure_images
from mifo.evaluation.run import draw_cases, draw_prompts
from mifo.evaluation.toybox_backend import ToyboxBackend
from mifo.io.json_text import json_text
from mifo.learning.dataset import InstanceData
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.presets import learn_preset, synthesis_preset
from mifo.toybox.examples import write_instance
from scripts.toybench.methods import METHODS, Training, choose_methods, training
from scripts.toybench.toybench_items import item_path, load_items, read_key, restore_items, save_items, write_record
from scripts.toybench.toybench_methods import trained
from scripts.toybench.toybench_scenes import COUNTS, LARGE_COUNTS, LEVELS, SPLITS, Cell, bench_scene

KEPT = "bundles"
VERSION = 1  # of what an item holds; a change measures everything again
SEED = 4_000  # of drawing; the pictures of sample k have seed SEED + k
VALUES = ("identity", "identity_margin", "right_instance", "confused", "detect_and_compare", "prompt_fit", "count_right", "ious")


@dataclass(frozen=True)
class Job:
    """Everything that one training of one scene shall be measured for."""

    cell: Cell
    training: str
    methods: tuple[str, ...]
    samples: int
    share: float
    model: str
    work: Path
    device: str
    learning_seed: int = 0


def item_key(fingerprint: str, cell: Cell, method: str, samples: int, share: float, learning_seed: int = 0) -> str:
    """Changes whenever the item would be measured differently."""
    plan = training(METHODS[method].training, seed_of(cell, learning_seed), share, cell.count)
    drawing = METHODS[method].synthesis(synthesis_preset("toybox"))
    facts = [VERSION, fingerprint, cell.seed, samples, plan.kind, to_dict(plan.config), to_dict(drawing),
             METHODS[method].boxes]  # fmt: skip
    return hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()[:20]


# --- one job ------------------------------------------------------------------------------------

_BASES: dict[tuple[str, str], BaseModel] = {}


def base_of(model: str, device: str) -> BaseModel:
    """Each process loads the base model once. A toybox trained anew, in a folder, takes the toybox's settings too."""
    if (model, device) not in _BASES:
        _BASES[model, device] = replace(load_base_model(model, device), source="toybox")
    return _BASES[model, device]


_BEFORE: dict[tuple[str, str, int], list[tuple[int, Any]]] = {}


def pictures_before(job: Job, base: BaseModel, prompts: Sequence[str]) -> list[tuple[int, Any]]:
    """What the base model itself draws for the unrelated prompts: the same for every scene, so each process draws it once."""
    key = (job.model, job.device, job.samples)
    if key not in _BEFORE:
        _BEFORE[key] = draw_prompts(base, prompts, (), synthesis_preset("toybox"), SEED, job.samples)
    return _BEFORE[key]


def run_job(job: Job) -> list[str]:
    """Learns once and measures each of the job's methods; every finished item is on disk at once. Returns their names."""
    torch.set_num_threads(1)
    base = base_of(job.model, job.device)
    scene = bench_scene(job.cell)
    plan = training(job.training, seed_of(job.cell, job.learning_seed), job.share, job.cell.count)
    (job.work / "jobs").mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=job.work / "jobs"))
    try:
        write_instance(scene, folder / "instance", 256)
        instance = load_instance(folder / "instance")
        backend = ToyboxBackend(instance, scene.things)
        data = InstanceData(fit_instance(instance, base.resolution), base)
        before = pictures_before(job, base, backend.unrelated_prompts)
        with trained(base, instance, plan, folder, backend, kept_path(job, base.fingerprint, plan)) as cost:
            for method in job.methods:
                found = measure(base, instance, backend, data, method, before, job.samples)
                key = item_key(base.fingerprint, job.cell, method, job.samples, job.share, job.learning_seed)
                path = item_path(job.work, job.cell, method, job.learning_seed)
                write_record(path, {**identity(job, method, plan), "key": key, **cost, **found})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [f"{job.cell.name} {method}" for method in job.methods]


def kept_path(job: Job, fingerprint: str, plan: Training) -> Path:
    """Where the bundle that this training of this scene leaves is kept; no longer found once it would be another."""
    facts = [VERSION, fingerprint, job.cell.seed, to_dict(plan.config)]
    digest = hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()[:20]
    return job.work / KEPT / f"{job.cell.name}-{digest}"


def identity(job: Job, method: str, plan: Training) -> dict[str, Any]:
    cell = job.cell
    return {"method": method, "level": cell.level, "count": cell.count, "scene": cell.name, "split": cell.split,
            "learning_seed": job.learning_seed, "samples": job.samples, "share_of_steps": job.share,
            "training": plan.kind}  # fmt: skip


def measure(base: BaseModel, instance: Instance, backend: ToyboxBackend, data: InstanceData, name: str,
            before: Sequence[tuple[int, Any]], samples: int) -> dict[str, Any]:  # fmt: skip
    """Pictures of each asset alone and of all in boxes, attention leakage, and drift on unrelated prompts."""
    method = METHODS[name]
    config = method.synthesis(synthesis_preset("toybox"))
    tokens = instance.tokens
    cases = default_cases(tokens, mask_aspects(instance))
    together = [c for c in cases if c.layout]
    drawn_cases = together if method.only_boxes else cases
    started = time.monotonic()
    if method.boxes:
        pictures = draw_cases(base, drawn_cases, tokens, config, SEED, samples)
    else:  # drawn without boxes, yet measured against them
        free = draw_cases(base, [Case(c.prompt, None) for c in drawn_cases], tokens, config, SEED, samples)
        pictures = [replace(p, case=drawn_cases[k // samples]) for k, p in enumerate(free)]
    seconds = time.monotonic() - started
    records = measure_images(pictures, backend, tokens)
    found: dict[str, Any] = {"pictures": len(pictures), "draw_seconds": round(seconds, 1)}
    for kind in ("alone", "in_boxes"):
        values: dict[str, list[float]] = defaultdict(list)
        for record in (r for r in records if r["in_boxes"] == (kind == "in_boxes")):
            for value_name in VALUES:
                value = record.get(value_name)
                values[value_name] += [float(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
        found[kind] = dict(values)
    outside, in_others = attention_leakage(base, data, tokens, learn_preset("toybox").lora.attention)
    found["attention_outside"], found["attention_in_others"] = (round(float(np.mean(v)), 4) for v in (outside, in_others))
    if not method.only_boxes:
        after = draw_prompts(base, backend.unrelated_prompts, tokens, synthesis_preset("toybox"), SEED, samples)
        pairs = zip(*(backend.see([image for _, image in drawn]) for drawn in (before, after)), strict=True)
        found["drift"] = round(float(np.mean([backend.distance(a, b) for a, b in pairs])), 4)
    return found


# --- all jobs -----------------------------------------------------------------------------------


def plan_jobs(cells: Sequence[Cell], methods: Sequence[str], samples: int, share: float, model: str, work: Path, device: str,
              fingerprint: str, learning_seeds: int = 1) -> tuple[list[Job], int]:  # fmt: skip
    """Jobs for what is not there yet, and how many items there are already. Seed by seed and scene by scene over all cells, so
    that an early table covers everything."""
    jobs, there = [], 0
    for seed, cell in ((seed, cell) for seed in range(learning_seeds) for cell in cells):
        waiting: dict[str, list[str]] = defaultdict(list)
        for method in methods:
            path = item_path(work, cell, method, seed)
            if read_key(path) == item_key(fingerprint, cell, method, samples, share, seed):
                there += 1
            else:
                waiting[METHODS[method].training].append(method)
        jobs += [Job(cell, name, tuple(found), samples, share, model, work, device, seed) for name, found in waiting.items()]
    return jobs, there


def seed_of(cell: Cell, learning_seed: int) -> int:
    """What a run learns with: another one for each scene, and for each learning seed."""
    return cell.seed % 1000 + 1000 * learning_seed


def run_all(jobs: Sequence[Job], workers: int, report: Callable[[list[str]], None]) -> list[str]:
    """Runs the jobs and returns what went wrong; one job's failure stops no other."""
    failures: list[str] = []
    if workers == 1:
        for job in jobs:
            try:
                report(run_job(job))
            except Exception:
                failures.append(f"{job.cell.name} {job.training}: {traceback.format_exc()}")
        return failures
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(run_job, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                job = waiting[done]
                if error := done.exception():
                    failures.append(f"{job.cell.name} {job.training}: {error!r}")
                else:
                    report(done.result())
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def main(
    quick: Annotated[bool, typer.Option(help="One scene, two methods, a tenth of the steps: does everything run.")] = False,
    split: Annotated[str, typer.Option(help="dev, or holdout: the third of the seeds that choices never see.")] = "dev",
    methods: Annotated[str, typer.Option(help="main, tuned, published, our-rates, ablations, study, all, or names.")] = "main",
    levels: str = ",".join(LEVELS),
    counts: str = ",".join(map(str, COUNTS)),
    large: Annotated[bool, typer.Option(help="The series with 6 and 8 instances instead.")] = False,
    scenes: Annotated[int, typer.Option(min=1, max=300, help="Per level and count.")] = 10,
    samples: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 2,
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Of the training steps.")] = 1.0,
    learning_seeds: Annotated[int, typer.Option(min=1, help="Learning runs of each method on each scene.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 1,
    model_path: str = "toybox",
    device: str = "cpu",
    work: Annotated[Path, typer.Option(help="Where items are kept.")] = Path("runs/toybench"),
    items_file: Annotated[Path | None, typer.Option(help="All items in one small file: read before, written after, so that a "
                                                         "comparison goes on on another machine.")] = None,
    name: Annotated[str | None, typer.Option(help="Of scripts/results/NAME.json; by default from split and size.")] = None,
    paired: Annotated[bool, typer.Option(help="Report each method against mifo on the scenes that the two have.")] = False,
    report_only: bool = False,
) -> None:
    """Runs what is missing, then writes scripts/results/<name>.json and <name>.png from all items of this split."""
    from scripts.toybench.toybench_report import write_report

    if quick:
        levels, counts, scenes, samples, share = "patterns", "2", 1, 1, 0.1
        methods = "mifo,break-a-scene" if methods == "main" else methods
        work = work / "quick"
    if large:
        counts = ",".join(map(str, LARGE_COUNTS))
    try:
        chosen = choose_methods(methods)
        cells = [Cell(level, int(count), index, split) for index in range(scenes) for level in levels.split(",")
                 for count in counts.split(",")]  # fmt: skip
        for cell in cells:
            bench_scene(cell)
        if split not in SPLITS:
            raise KeyError(split)
    except (KeyError, ValueError) as error:
        raise typer.BadParameter(f"{error} is not known; methods are {', '.join(METHODS)}; levels {', '.join(LEVELS)}; counts "
                                 f"{COUNTS + LARGE_COUNTS}; splits {', '.join(SPLITS)}") from None  # fmt: skip
    if items_file is not None and items_file.exists():
        try:
            print(f"{restore_items(items_file, work)} items come from {items_file}")
        except ValueError as error:
            raise typer.BadParameter(f"{error}; give another name, or that of a file which --items-file has written") from None
    failures: list[str] = []
    fingerprint = base_of(model_path, device).fingerprint
    if not report_only:
        jobs, there = plan_jobs(cells, chosen, samples, share, model_path, work, device, fingerprint, learning_seeds)
        total, done, started = sum(len(j.methods) for j in jobs), 0, time.monotonic()
        print(f"{there} items are there, {total} to measure in {len(jobs)} jobs")

        def report(names: list[str]) -> None:
            nonlocal done
            done += len(names)
            left = (time.monotonic() - started) / done * (total - done)
            print(f"{done}/{total} {', '.join(names)}; about {left / 60:.0f} min left", flush=True)

        failures = run_all(jobs, workers, report)

    def key_of(cell: Cell, method: str, seed: int) -> str:
        return item_key(fingerprint, cell, method, samples, share, seed)

    items = load_items(work, chosen, cells, key_of, learning_seeds, paired)
    label = name or f"toybench{'_quick' if quick else ''}{'_large' if large else ''}{'_holdout' if split == 'holdout' else ''}"
    if items:
        facts = {"split": split, "samples": samples, "learning_seeds": learning_seeds, "workers": workers, "model": model_path,
                 "paired": paired}  # fmt: skip
        if items_file is not None:
            save_items(items_file, load_items(work, chosen, cells, key_of, learning_seeds, paired=True))
        print(write_report(label, items, facts, device))
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    raise typer.Exit(1 if failures or not items else 0)


if __name__ == "__main__":
    typer.run(main)
