"""Many jobs in one process, or what one worker of a cluster does of them: each item whole or not at all, a failed one reported at
the end, and only what is missing done by a second run.

    <output>/0003-<digest>/     of item 3: the digest is of the job and of the files that it reads, bundles included

A job that names its own output is there already only if the record in it says the very same of its making.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import InputError, NotFinite
from ..io.console import OUT_OF_MEMORY
from ..io.json_text import json_text
from ..io.manifest import MANIFEST, file_digest
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
    own_place: bool = False
    """Its output is named after all that decides its result, so what stands there is that result."""


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


def items_of(jobs: Sequence[Job], output: str | Path, bundles: str | Path) -> list[Item]:
    """Each with its place below `output`. Both may be addresses, such as s3://bucket/results; a bundle at an address goes by its
    name. Raises InputError for two jobs that would write to one place.
    """
    known: dict[str, str] = {}
    found = [_placed(Item(k, job), str(output), str(bundles), known) for k, job in enumerate(jobs)]
    places: dict[str, int] = {}
    for item in found:
        place = _place(item.job)
        if place is None:
            continue
        other = places.setdefault(place if "://" in place else os.path.realpath(place), item.index)
        if other != item.index:
            raise InputError(f"jobs {other} and {item.index} both write to {place}; give each another one")
    return found


def _placed(item: Item, output: str, bundles: str, known: dict[str, str]) -> Item:
    job = item.job
    if not isinstance(job, DRAWS) or job.output:
        return item
    names = (job.bundle,) if isinstance(job, EvaluateJob) else job.bundles
    files = [f"{bundles}/{name}/{MANIFEST}" for name in names] + ([job.image, job.mask] if isinstance(job, EditJob) else [])
    for file in files:
        known.setdefault(file, file_digest(Path(file)))  # empty where nothing is, of which the job will speak
    read = [known[file] for file in files]
    digest = hashlib.sha256(json_text([__version__, job.to_json(), read], sort_keys=True).encode()).hexdigest()[:12]
    return replace(item, job=replace(job, output=f"{output.rstrip('/')}/{item.index:04d}-{digest}"), own_place=True)


def _place(job: Job) -> str | None:
    return job.output if isinstance(job, DRAWS) else None


def do_item(workshop: Workshop, item: Item, report: Report = report_nothing) -> Outcome:
    """Does it unless it is there. What is wrong with it becomes its outcome; Ctrl-C and a full disk go on."""
    try:
        there = finished(workshop, item)
        if there is not None:
            return Outcome(item.index, "there", there)
        return Outcome(item.index, "done", workshop.do(item.job, report))
    except (InputError, NotFinite) as error:
        return Outcome(item.index, "failed", {}, str(error), isinstance(error, InputError))
    except Exception as error:
        full = isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)
        told = "out of memory" if full else f"{type(error).__name__}: {error}"
        return Outcome(item.index, "failed", {}, told[:1000], False)


def finished(workshop: Workshop, item: Item) -> dict[str, Any] | None:
    """What an earlier run has left of this very item. None where nothing is there, or anything else, which the job will refuse to
    replace."""
    job = item.job
    if isinstance(job, LearnJob):
        return workshop.learned_already(job)
    if not isinstance(job, DRAWS) or not job.output or not (item.own_place or isinstance(job, SynthesizeJob)):
        return None
    folder = Path(job.output)
    path = folder / RECORDS[job.kind]
    try:
        record = json.loads(read_regular(path, MAX_RECORD_BYTES))
        written = os.stat(path).st_mtime
        images = [str(folder / (each if isinstance(each, str) else each["image"]))
                  for each in record.get("images") or record.get("candidates", [])]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not item.own_place and isinstance(job, SynthesizeJob) and not workshop.would_write(job, record, written):
        return None
    return {"folder": str(folder), "images": images, "json": str(path)}


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
