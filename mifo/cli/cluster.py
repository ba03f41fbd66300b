"""`mifo cluster`: the jobs of a file on several workers, by Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..io.console import Job, waiting
from ..io.files import check_writable
from .app import app
from .batch import end_batch, say_outcome
from .job import job_command
from .options import path_argument
from .parts import import_libraries

if TYPE_CHECKING:
    from ..jobs.batch import Outcome

cluster = typer.Typer(help="Do the jobs of a file on several GPUs or machines, by Ray.", no_args_is_help=True)
app.add_typer(cluster, name="cluster")

JobFile = Annotated[Path, path_argument("A JSON object a line, as --batch-file of synthesize reads it.")]
Output = Annotated[str, typer.Option("--output-path", help="A folder, or an address such as s3://bucket/results.")]
Bundles = Annotated[str, typer.Option("--output-dir", help="Where the bundles lie: a folder, or an address.")]
Count = Annotated[int, typer.Option("--workers", min=1, max=10_000, help="Processes, each with a base model of its own.")]
Gpus = Annotated[float, typer.Option("--gpus", min=0, max=64, help="GPUs of each worker; 0.5 puts two on one.")]
Threads = Annotated[int, typer.Option(min=1, max=1024, help="CPU threads of each worker.")]
Address = Annotated[str | None, typer.Option(help="auto, ray://HOST:10001, ...; by default a cluster on this machine.")]


def _run(job: Job, kind: str, jobs: Path, output: str, bundles: str, workers: int, gpus: float, threads: int,
         address: str | None) -> None:  # fmt: skip
    from ..jobs.job import read_jobs

    read = read_jobs(jobs, kind)
    if other := next((each.kind for each in read if each.kind != kind), None):
        raise InputError(f"{jobs} has a job to {other}; this command does jobs to {kind}")
    import_libraries()
    from ..cluster.run import Workers, connect, run
    from ..cluster.storage import is_remote
    from ..jobs.batch import in_order, items_of

    for place in (output, bundles):
        if not is_remote(place):
            check_writable(Path(place))
    output, bundles = (place if is_remote(place) else str(Path(place).resolve()) for place in (output, bundles))
    items = items_of(read, output, bundles)
    spread = Workers(workers, gpus, threads=threads, address=address)
    with waiting("starting the workers"):
        connect(spread)
    outcomes: list[Outcome] = []
    job.hint = lambda: f"; {len(outcomes)} of {len(items)} jobs are behind: the same command goes on from there"
    for outcome in run(in_order(items), spread, bundles):
        outcomes.append(outcome)
        say_outcome(job, outcome)
    end_batch(items, outcomes)


@job_command(cluster, "mifo cluster synthesize jobs.jsonl --workers 2 --output-path output/posters")
def synthesize(job: Job, jobs: JobFile, output: Output = "output/cluster", bundles: Bundles = "Model_ours", workers: Count = 2,
               gpus: Gpus = 0.0, threads: Threads = 1, address: Address = None) -> None:  # fmt: skip
    """Draw the pictures that a file asks for."""
    _run(job, "synthesize", jobs, output, bundles, workers, gpus, threads, address)


@job_command(cluster, "mifo cluster learn photos.jsonl --workers 8 --gpus 1")
def learn(job: Job, jobs: JobFile, bundles: Bundles = "Model_ours", workers: Count = 2, gpus: Gpus = 0.0,
          threads: Threads = 1, address: Address = None) -> None:  # fmt: skip
    """Learn the instance folders that a file names."""
    _run(job, "learn", jobs, "output/cluster", bundles, workers, gpus, threads, address)


@job_command(cluster, "mifo cluster evaluate bundles.jsonl --workers 2")
def evaluate(job: Job, jobs: JobFile, output: Output = "output/cluster", bundles: Bundles = "Model_ours", workers: Count = 2,
             gpus: Gpus = 0.0, threads: Threads = 1, address: Address = None) -> None:  # fmt: skip
    """Measure the bundles that a file names."""
    _run(job, "evaluate", jobs, output, bundles, workers, gpus, threads, address)
