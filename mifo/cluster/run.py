"""A batch on a Ray cluster: an actor for each GPU (or part of one, or a core), each with its own base model and bundles.

Ray starts the actors, moves them, and begins a call again when its worker is lost; what is written is whole or not there, so a
call that is begun again finds what its predecessor has finished. Nothing here schedules anything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle.shelf import check_name
from ..errors import InputError
from ..jobs.batch import DRAWS, Item, Outcome, do_item
from ..jobs.job import EvaluateJob, LearnJob
from ..jobs.workshop import Workshop
from .storage import check_place, fetch, is_remote, is_whole, put

IN_FLIGHT = 2  # calls for each worker: one that runs and one that waits, so that none idles and the queue stays with us
RETRIES = 3  # of a call whose worker was lost


@dataclass(frozen=True)
class Workers:
    """How the work is spread."""

    count: int = 2
    gpus: float = 0.0
    """Of each worker; 0.5 puts two on one GPU."""
    cpus: float = 1.0
    threads: int = 1
    """PyTorch's, in each worker."""
    address: str | None = None
    """'auto', ray://..., or None for a cluster on this machine that ends with the run."""


class Worker:
    """What runs in an actor: a workshop, and copies of the bundles that it was asked for."""

    def __init__(self, bundles: str, threads: int, device: str = "", precision: str = "auto"):
        import torch

        torch.set_num_threads(threads)
        self.bundles = bundles
        self._holder = tempfile.TemporaryDirectory(prefix="mifo-worker-")
        own = Path(self._holder.name) if is_remote(bundles) else Path(bundles)
        self.workshop = Workshop(own, device=device, precision=precision)

    def process(self) -> int:
        """Its number on its machine."""
        import os

        return os.getpid()

    def do(self, item: Item) -> Outcome:
        """The item's outcome; its results are at its output, whole."""
        try:
            self._fetch_bundles(item)
            if isinstance(item.job, LearnJob):
                return self._learn(item, item.job)
            place = item.job.output if isinstance(item.job, DRAWS) else None
            if place is None or not is_remote(place):
                return do_item(self.workshop, item)
            if item.own_place and is_whole(place):
                return Outcome(item.index, "there", {"folder": place})
            check_place(place)
            with tempfile.TemporaryDirectory(prefix="mifo-item-") as holder:
                local = Path(holder) / "item"
                outcome = do_item(self.workshop, replace(item, job=replace(item.job, output=str(local))))  # type: ignore[call-arg]
                if outcome.state == "failed":
                    return outcome
                put(local, place)
                return replace(outcome, result={"folder": place})
        except InputError as error:
            return Outcome(item.index, "failed", {}, str(error))

    def _fetch_bundles(self, item: Item) -> None:
        if not is_remote(self.bundles):
            return
        names = (item.job.bundle,) if isinstance(item.job, EvaluateJob) else getattr(item.job, "bundles", ())
        for name in names:
            if not (self.workshop.bundles / name).exists():
                fetch(f"{self.bundles.rstrip('/')}/{name}", self.workshop.bundles / name)

    def _learn(self, item: Item, job: LearnJob) -> Outcome:
        """At an address nothing is replaced: the bundle of that name there is what was asked for, or the job fails."""
        if not is_remote(self.bundles):
            return do_item(self.workshop, item)
        name = check_name(job.name or Path(job.instance).name)
        place, own = f"{self.bundles.rstrip('/')}/{name}", self.workshop.bundles / name
        if is_whole(place):
            if not own.exists():
                fetch(place, own)
            there = None if job.overwrite else self.workshop.learned_already(job)
            if there is None:
                raise InputError(f"{place} has a bundle that was learned from another photo or otherwise; nothing is replaced "
                                 "at an address, so choose another name, or move it away")  # fmt: skip
            return Outcome(item.index, "there", _at(place, there))
        check_place(place)
        outcome = do_item(self.workshop, item)
        if outcome.state == "failed":
            return outcome
        put(own, place)
        return replace(outcome, result=_at(place, outcome.result))


def _at(place: str, result: dict[str, Any]) -> dict[str, Any]:
    """What was learned, with where it lies now."""
    return {**result, "folder": place, "images": [f"{place}/{Path(image).name}" for image in result["images"]]}


def run(items: Sequence[Item], workers: Workers, bundles: str, device: str = "", precision: str = "auto") -> Iterator[Outcome]:
    """Outcomes as they come. Raises InputError where there is no Ray, or no cluster at the address."""
    ray = connect(workers)
    options: dict[str, Any] = {"num_cpus": workers.cpus, "max_restarts": -1, "max_task_retries": RETRIES}
    if workers.gpus:
        options["num_gpus"] = workers.gpus
    made = ray.remote(Worker).options(**options)
    actors = [made.remote(bundles, workers.threads, device, precision) for _ in range(min(workers.count, max(1, len(items))))]
    waiting, flying = list(items)[::-1], {}
    try:
        for actor in actors * IN_FLIGHT:
            if waiting:
                item = waiting.pop()
                flying[actor.do.remote(item)] = actor, item
        while flying:
            (done,), _ = ray.wait(list(flying), num_returns=1)
            actor, item = flying.pop(done)
            if waiting:  # before the result is looked at: the worker need not wait for us
                following = waiting.pop()
                flying[actor.do.remote(following)] = actor, following
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().split("\n")[-1][:300]
                yield Outcome(item.index, "failed", {}, f"its worker was lost {RETRIES + 1} times ({reason})", False)
    finally:
        for actor in actors:
            ray.kill(actor)


def connect(workers: Workers) -> Any:
    """Ray, connected. A cluster that runs here already is used where no address is given and this process is in it."""
    try:
        import ray
    except ImportError:
        raise InputError("a cluster needs Ray; pip install 'mifo[cluster]' adds it") from None
    if ray.is_initialized():
        return ray
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    if workers.address is None:
        ray.init(num_cpus=max(1, int(workers.count * workers.cpus)), _system_config={"enable_metrics_collection": False}, **quiet)
        return ray
    try:
        ray.init(address=workers.address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"there is no Ray cluster at {workers.address[:100]} ({str(error)[:200]}); start one with 'ray start', "
                         "or leave --address out") from None  # fmt: skip
    return ray
