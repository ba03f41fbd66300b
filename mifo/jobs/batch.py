"""Many jobs in one process, or what one worker of a cluster does of them: each item whole or not at all, a failed one reported at
the end, and only what is missing done by a second run.

    <output>/<item>/        item 3 is 0003-<digest of the job and of what it reads>, unless the job names its own output
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, NotFinite
from ..io.console import OUT_OF_MEMORY
from ..io.json_text import json_text
from ..io.read_files import read_regular
from .job import EditJob, EvaluateJob, Job, LearnJob, SynthesizeJob
from .workshop import Report, Workshop, report_nothing

DRAWS = (SynthesizeJob, EditJob, EvaluateJob)
RECORDS = {"synthesize": "synthesis.json", "edit": "edit.json", "evaluate": "evaluation.json"}
MAX_RECORD_BYTES = 1 << 26


@dataclass(frozen=True)
class Item:
    """One job of a batch."""

    index: int
    job: Job

    def to_json(self) -> dict[str, Any]:
        return {"index": self.index, "job": self.job.to_json()}


@dataclass(frozen=True)
class Outcome:
    """What became of an item."""

    index: int
    state: str
    """'done', 'there' (an earlier run did it) or 'failed'"""
    result: dict[str, Any]
    error: str | None = None
    wrong_input: bool = True
    """Of a failed one: whether its input was at fault."""

    def to_json(self) -> dict[str, Any]:
        """One line of what the command prints."""
        return {"item": self.index, "state": self.state, **({"error": self.error} if self.error else self.result)}


def items_of(jobs: Sequence[Job], output: str | Path) -> list[Item]:
    """Each with its place below `output`, a folder or an address such as s3://bucket/results.

    Raises InputError for two jobs that would write to one place.
    """
    found = [Item(k, _with_output(job, output, k)) for k, job in enumerate(jobs)]
    places: dict[str, int] = {}
    for item in found:
        place = _place(item.job)
        if place is None:
            continue
        other = places.setdefault(place if "://" in place else os.path.realpath(place), item.index)
        if other != item.index:
            raise InputError(f"jobs {other} and {item.index} both write to {place}; give each another one")
    return found


def _with_output(job: Job, output: str | Path, index: int) -> Job:
    if not isinstance(job, DRAWS) or job.output:
        return job
    digest = hashlib.sha256(json_text(job.to_json(), sort_keys=True).encode()).hexdigest()[:12]
    return replace(job, output=f"{str(output).rstrip('/')}/{index:04d}-{digest}")


def _place(job: Job) -> str | None:
    return job.output if isinstance(job, DRAWS) else None


def do_item(workshop: Workshop, item: Item, report: Report = report_nothing) -> Outcome:
    """Does it unless it is there. What is wrong with it becomes its outcome; Ctrl-C and a full disk go on."""
    try:
        there = finished(item.job)
        if there is not None:
            return Outcome(item.index, "there", there)
        return Outcome(item.index, "done", workshop.do(item.job, report))
    except (InputError, NotFinite) as error:
        return Outcome(item.index, "failed", {}, str(error), isinstance(error, InputError))
    except Exception as error:
        full = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
        told = "out of memory" if full else f"{type(error).__name__}: {error}"
        return Outcome(item.index, "failed", {}, told[:1000], False)


def finished(job: Job) -> dict[str, Any] | None:
    """What an earlier run of the same job has left, if it is just that: the folder's record says the same of its making.

    None where nothing is there, or something else, which the job will refuse to replace.
    """
    if isinstance(job, LearnJob) or not isinstance(job, DRAWS) or not job.output:
        return None
    folder = Path(job.output)
    try:
        record = json.loads(read_regular(folder / RECORDS[job.kind], MAX_RECORD_BYTES))
        if isinstance(job, EvaluateJob):
            return {"folder": str(folder), "json": str(folder / RECORDS[job.kind])}
        names = record.get("bundles") or ([record["bundle"]] if record.get("bundle") else [])
        count = 1 if isinstance(job, SynthesizeJob) and job.best_of else job.num_images
        same = names == [Path(name).name for name in job.bundles] and record["batch_size"] == count
        if isinstance(job, SynthesizeJob) and not job.best_of:
            same = same and record["seed"] == job.seed
        if not same or (len(names) < 2 and record["prompt"] != job.prompt):
            return None
        images = [str(folder / (each if isinstance(each, str) else each["image"]))
                  for each in record.get("images") or record.get("candidates", [])]  # fmt: skip
        return {"folder": str(folder), "images": images, "json": str(folder / RECORDS[job.kind])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def in_order(items: Sequence[Item]) -> list[Item]:
    """Jobs of one base model, and of one bundle, behind each other: nothing is loaded twice."""

    def key(item: Item) -> tuple[str, str, str]:
        job = item.job
        bundles = (job.bundle,) if isinstance(job, EvaluateJob) else getattr(job, "bundles", ())
        return getattr(job, "model", None) or "", "\0".join(bundles), f"{item.index:09d}"

    return sorted(items, key=key)


def do_all(workshop: Workshop, items: Sequence[Item], report: Callable[[int], Report] | None = None) -> Iterator[Outcome]:
    """One outcome after the other, in the order in which they are done."""
    for item in in_order(items):
        yield do_item(workshop, item, report(item.index) if report else report_nothing)
