"""`synthesize --batch-file`: many jobs in one process."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..io.console import Bar, Job, say
from ..io.files import check_writable
from ..io.outputs import PLACE
from .parts import import_libraries

if TYPE_CHECKING:
    from ..jobs.batch import Item, Outcome
    from ..jobs.workshop import Report

SHOWN = 20  # failures that are named at the end


def draw_batch(job: Job, batch_file: Path, output_path: Path | None, bundles: Path, device: str, precision: str) -> None:
    """Each job's result as soon as it is done, with --json a line each; failures at the end, and in the exit status."""
    from ..jobs.job import read_jobs

    output = output_path or PLACE / batch_file.stem
    jobs = read_jobs(batch_file)
    check_writable(output)
    import_libraries()
    from ..jobs.batch import do_all, items_of
    from ..jobs.workshop import Workshop

    items = items_of(jobs, output, bundles)
    workshop = Workshop(bundles, device=device, precision=precision)
    outcomes: list[Outcome] = []
    job.hint = lambda: f"; {len(outcomes)} of {len(items)} jobs are behind: the same command goes on from there"
    with Bar() as bar:
        def report(index: int) -> Report:
            return lambda what, done, total, values: bar.part(f"job {index}, {what}", done, total)

        for outcome in do_all(workshop, items, report):
            outcomes.append(outcome)
            say_outcome(job, outcome)
    end_batch(items, outcomes)


def say_outcome(job: Job, outcome: Outcome) -> None:
    job.json(outcome.to_json())
    if outcome.state == "failed":
        say(f"job {outcome.index} failed: {outcome.error}")
    else:
        job.text(f"job {outcome.index}: {outcome.result['folder']}" + (" (was there)" if outcome.state == "there" else ""))


def end_batch(items: list[Item], outcomes: list[Outcome]) -> None:
    """Says how many came out, and ends the command with a status where some did not."""
    states = Counter(outcome.state for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    say(f"{states['done']} done, {states['there']} were there, {len(failed)} failed, of {len(items)} jobs")
    if failed:
        say(*(f"  {outcome.index}: {outcome.error}" for outcome in failed[:SHOWN]), "the same command tries only these again")
        raise typer.Exit(2 if all(outcome.wrong_input for outcome in failed) else 1)
