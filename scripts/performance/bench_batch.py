"""Throughput of jobs on the toybox: separate processes, one process, one and two workers of a local Ray cluster; and a simulation
of the workers over the measured times, held against what two of them did.

    python -m scripts.performance.bench_batch --bundle Model_ours/toy_car

Side by side in one run, on one machine, one thread each: 20 jobs over 4 bundles as 20 processes, as one, and as one with a job of
five pictures for each bundle; two processes that know nothing of each other, as the most that this machine allows; 40 jobs
on 1 and 2 workers, in turn. The simulation's times are those of 10 jobs that two workers did before: two that work at once slow
each other.
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from mifo.io.json_text import json_text
from mifo.jobs.batch import items_of
from mifo.jobs.job import SynthesizeJob
from scripts.record import write_result

ROOT = Path(__file__).resolve().parents[2]
BOXES = "[[0.05, 0.3, 0.45, 0.7], [0.55, 0.3, 0.95, 0.7]]"
SEED = 0
RUNS = 200  # of the simulation


def jobs_of(count: int, bundles: int, steps: int | None) -> list[SynthesizeJob]:
    return [SynthesizeJob("a photo of <asset0> and <asset1> on the grass", (f"b{k % bundles}",), BOXES, seed=k, steps=steps)
            for k in range(count)]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def separate(place: Path, jobs: list[SynthesizeJob]) -> list[float]:
    """Seconds of each process."""
    seconds = []
    for k, job in enumerate(jobs):
        more = ["--steps", str(job.steps)] if job.steps else []
        started = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "cli.py"), "synthesize", job.bundles[0], "--prompt", job.prompt, "--boxes",
                        BOXES, "--seed", str(job.seed), "--output-path", str(place / "separate" / f"{k:04d}"), *more],
                       cwd=place, env=environment(), check=True, capture_output=True)  # fmt: skip
        seconds.append(time.perf_counter() - started)
    return seconds


def grouped(count: int, bundles: int, steps: int | None) -> list[SynthesizeJob]:
    """As many pictures as `jobs_of`, as one job a bundle, whose pictures are drawn in one batch."""
    prompt, each = "a photo of <asset0> and <asset1> on the grass", count // bundles
    return [SynthesizeJob(prompt, (f"b{k}",), BOXES, num_images=each, steps=steps) for k in range(bundles)]


def together(place: Path, jobs: list[SynthesizeJob], name: str) -> float:
    """Seconds of one process that does all."""
    started = time.perf_counter()
    assert begin(place, jobs, name).wait() == 0
    return time.perf_counter() - started


def begin(place: Path, jobs: list[SynthesizeJob], name: str) -> subprocess.Popen[bytes]:
    file = place / f"{name}.jsonl"
    file.write_text("".join(json_text(job.to_json()) + "\n" for job in jobs))
    return subprocess.Popen([sys.executable, str(ROOT / "cli.py"), "synthesize", "--batch-file", str(file), "--output-path",
                             str(place / name)], cwd=place, env=environment(), stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)  # fmt: skip


def drawing_seconds(place: Path, *names: str) -> float:
    """Median of the pictures that these processes drew."""
    records = [path for name in names for path in (place / name).glob("*/synthesis.json")]
    return float(np.median([json.loads(path.read_text())["seconds"] for path in records]))


def side_by_side(place: Path, jobs: list[SynthesizeJob]) -> float:
    """How many times as much two processes draw that know nothing of each other as one: what the machine allows any scheduler."""
    half = len(jobs) // 2
    together(place, jobs[:half], "alone")
    pair = [begin(place, part, name) for part, name in ((jobs[:half], "left"), (jobs[half:], "right"))]
    assert [process.wait() for process in pair] == [0, 0]
    return 2 * drawing_seconds(place, "alone") / drawing_seconds(place, "left", "right")


def clustered(place: Path, jobs: list[SynthesizeJob], workers: int, name: str) -> tuple[float, float, list[float]]:
    """(seconds until the first job was done, seconds from then to the last, seconds of each drawing)."""
    from mifo.cluster.run import Workers, connect, run

    ray = connect(Workers(workers))
    items = items_of(jobs, place / name, place / "Model_ours")
    started, ends, drawn = time.perf_counter(), [], []
    for outcome in run(items, Workers(workers), str(place / "Model_ours")):
        assert outcome.state == "done", outcome
        ends.append(time.perf_counter() - started)
        drawn.append(float(outcome.result["seconds"]))
    ray.shutdown()
    warm = ends[workers - 1]  # every worker has loaded its base model and done one job, or nearly
    return warm, ends[-1] - warm, drawn


def same_pictures(place: Path, *folders: str) -> bool:
    def pictures(folder: str) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (place / folder).glob("*/[0-9]*.png")}

    first, *others = map(pictures, folders)
    return all(first[name] == other[name] for other in others for name in first.keys() & other.keys())


def simulate(times: list[float], jobs: int, workers: int, lost_a_job: float = 0.0, restart: float = 0.0) -> dict[str, float]:
    """Seconds that `jobs` take on `workers` that each draw a job's time from `times`; a job's worker is lost with that chance,
    and is back after `restart` seconds. Median and 95 % of RUNS simulations, from one seed."""
    rng, found = np.random.default_rng(SEED), []
    for _ in range(RUNS):
        free = [0.0] * workers
        for _ in range(jobs):
            start = heapq.heappop(free)
            while rng.random() < lost_a_job:
                start += float(rng.choice(times)) / 2 + restart
            heapq.heappush(free, start + float(rng.choice(times)))
        found.append(max(free))
    low, median, high = np.percentile(found, (2.5, 50, 97.5))
    return {"seconds": round(float(median), 1), "low": round(float(low), 1), "high": round(float(high), 1)}


def main(
    bundle: Annotated[Path, typer.Option(help="A learned toybox bundle of at least two things.")] = Path("Model_ours/toy_car"),
    jobs: int = 20,
    cluster_jobs: int = 40,
    rounds: Annotated[int, typer.Option(help="Of one worker and two.")] = 2,
    steps: Annotated[int | None, typer.Option(help="By default the preset's.")] = None,
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="mifo-bench-") as holder:
        place = Path(holder)
        for k in range(4):
            shutil.copytree(bundle, place / "Model_ours" / f"b{k}")
        asked = jobs_of(jobs, 4, steps)
        one_by_one = separate(place, asked)
        at_once = together(place, asked, "together")
        in_batches = together(place, grouped(jobs, 4, steps), "grouped")
        machine = side_by_side(place, asked)
        many = jobs_of(cluster_jobs, 4, steps)
        _, _, beside = clustered(place, jobs_of(10, 4, steps), 2, "before")
        names, one, two = [], [], []
        for k in range(rounds):
            one.append(clustered(place, many, 1, f"one{k}"))
            two.append(clustered(place, many, 2, f"two{k}"))
            names += [f"one{k}", f"two{k}"]
            print(k, one[-1][:2], two[-1][:2], flush=True)
        same = same_pictures(place, "separate", "together", *names)
    cold1, warm1, cold2, warm2 = (float(np.median([run[part] for run in runs])) for runs in (one, two) for part in (0, 1))
    times = [t for run in one for t in run[2]]
    times_2 = [t for run in two for t in run[2]]
    each1, each2 = warm1 / (cluster_jobs - 1), warm2 / (cluster_jobs - 2)
    overhead = each1 - float(np.mean(times))  # of each job beside drawing: reading, writing, lending
    predicted = simulate([t + overhead for t in beside], cluster_jobs - 2, 2)
    write_result("scale", {
        "jobs": jobs, "bundles": 4, "steps": steps,
        "separate_processes_seconds": round(sum(one_by_one), 1), "separate_median": round(float(np.median(one_by_one)), 2),
        "one_process_seconds": round(at_once, 1), "ratio": round(sum(one_by_one) / at_once, 2),
        "one_process_four_jobs_seconds": round(in_batches, 1), "ratio_four_jobs": round(sum(one_by_one) / in_batches, 2),
        "cluster_jobs": cluster_jobs, "drawing_median": round(float(np.median(times)), 2), "beside_drawing": round(overhead, 2),
        "drawing_median_2_workers": round(float(np.median(times_2)), 2), "scaling_of_two_plain_processes": round(machine, 2),
        "workers": {"1": {"first_job": round(cold1, 1), "jobs_a_minute": round(60 / each1, 2)},
                    "2": {"first_job": round(cold2, 1), "jobs_a_minute": round(60 / each2, 2)}},
        "scaling_1_to_2": round(each1 / each2, 2),
        "same_bytes": same,
        "rounds": [{"1": round(60 * (cluster_jobs - 1) / a[1], 2), "2": round(60 * (cluster_jobs - 2) / b[1], 2)}
                   for a, b in zip(one, two, strict=True)],
        "simulated_2_workers": predicted, "measured_2_workers": round(warm2, 1),
        "off": round(predicted["seconds"] / warm2 - 1, 3),
        "what_if": {f"{n} workers, 1 in 100 lost, 30 s back": simulate(times, 1000, n, 0.01, 30.0) for n in (2, 8)},
    })  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
