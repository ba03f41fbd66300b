"""Jobs as plain data, and their list in a file."""

from __future__ import annotations

import inspect
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from _tiny import copy_bundle, load_base, write_instance

from mifo import api
from mifo.config import LearnConfig, MemoryConfig, SynthesisConfig
from mifo.errors import InputError
from mifo.jobs.job import EditJob, EvaluateJob, LearnJob, SynthesizeJob, read_job, read_jobs
from mifo.jobs.store import CANCELLED, DONE, FAILED, MAX_ATTEMPTS, QUEUED, RUNNING, JobStore, QueueFull
from mifo.jobs.workshop import Workshop
from mifo.presets import learn_preset

BOXES = '[[0, 0, 0.5, 1]]'


@pytest.mark.parametrize("job", [
    SynthesizeJob("a <asset0>", ("desk", "shelf"), BOXES, 3, 2, None, 20, 2.0, "blurry", 128, 64, "toybox", "out"),
    SynthesizeJob("a car"), EditJob("a <asset0>", "street.png", "mask.png", ("desk",)), LearnJob("photos/desk"),
    LearnJob("photos/desk", "d", "sd2.1", 7, True, 10, 5, 12.0, True), EvaluateJob("desk", 2),
])  # fmt: skip
def test_a_job_is_read_as_it_was_written(job: Any) -> None:
    assert read_job(json.loads(json.dumps(job.to_json()))) == job


def test_a_single_name_and_plain_boxes_are_understood() -> None:
    job = read_job({"bundles": "desk", "prompt": "a <asset0>", "boxes": [[0, 0, 0.5, 1]]})
    assert job == SynthesizeJob("a <asset0>", ("desk",), "[[0, 0, 0.5, 1]]")


@pytest.mark.parametrize(("data", "said"), [
    ([], "expected an object"), ({"bundles": ["a"]}, "has no prompt"), ({"prompt": "x", "sead": 1}, "unknown keys"),
    ({"prompt": "x", "seed": -1}, "seed is -1"), ({"prompt": "x", "kind": "synthesise"}, "did you mean 'synthesize'"),
    ({"kind": "edit", "prompt": "x"}, "no image, no mask"), ({"prompt": "x", "num_images": 10**9}, "num_images"),
    ({"prompt": "x", "contrast_scale": 11}, "contrast_scale is 11"),
    ({"prompt": 7}, "prompt is 7"), ({"prompt": "x", "bundles": [1]}, "bundles"), ({"kind": 3}, "of the kind 3"),
])  # fmt: skip
def test_what_is_wrong_is_named(data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_job(data)


def test_a_file_of_jobs_names_its_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "seed": 2}\n')
    assert read_jobs(path) == [SynthesizeJob("a"), SynthesizeJob("b", seed=2)]
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(InputError, match="line 2 is no JSON"):
        read_jobs(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="has no jobs"):
        read_jobs(path)
    with pytest.raises(InputError, match="there is no file"):
        read_jobs(tmp_path / "other.jsonl")


def test_a_job_waits_runs_and_ends(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    first, second = store.add(SynthesizeJob("a"), "me"), store.add(SynthesizeJob("b"))
    taken = store.take()
    assert taken and taken.id == first and taken.state == RUNNING and taken.job == SynthesizeJob("a")
    assert not store.report(first, "denoising", 1, 20, {"loss": float("nan")})
    assert store.get(first).progress["done"] == 1  # type: ignore[union-attr, index]
    store.stop(first)
    assert store.report(first, "denoising", 2, 20, {})
    store.finish(first, CANCELLED)
    store.finish(second, DONE, {"images": ["x.png"]})
    assert [(e.id, e.state) for e in store.entries()] == [(second, DONE), (first, CANCELLED)]
    assert [e.id for e in store.entries(owner="me")] == [first] and store.get(99) is None


def test_a_job_that_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    number = store.add(SynthesizeJob("a"))
    store.stop(number)
    assert store.get(number).state == CANCELLED and store.take() is None  # type: ignore[union-attr]


def test_what_a_lost_worker_left_is_done_again_but_not_for_ever(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    number = store.add(SynthesizeJob("a"))
    for _ in range(MAX_ATTEMPTS - 1):
        assert store.take()
        store.recover()
        assert store.get(number).state == QUEUED  # type: ignore[union-attr]
    assert store.take()
    store.recover()
    entry = store.get(number)
    assert entry and entry.state == FAILED and "ask for less" in str(entry.error)


def test_what_a_worker_gave_back_counts_for_nothing(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    number = store.add(SynthesizeJob("a"))
    for _ in range(2 * MAX_ATTEMPTS):
        assert store.take()
        store.put_back(number)
    store.recover()
    assert store.take() and store.get(number).ended is None  # type: ignore[union-attr]


def test_jobs_are_found_by_what_they_say(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    wanted = [store.add(job) for job in (EvaluateJob("desk"), EvaluateJob("shelf"), SynthesizeJob("a"), EvaluateJob("desk"))]
    assert [e.id for e in store.entries(kind="evaluate", bundle="desk")] == [wanted[3], wanted[0]]
    assert [e.id for e in store.entries((QUEUED,), limit=1, kind="synthesize")] == [wanted[2]]


def test_a_full_queue_takes_no_more(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    store.add(SynthesizeJob("a"), most_queued=1)
    with pytest.raises(QueueFull, match="try again later"):
        store.add(SynthesizeJob("b"), most_queued=1)


def test_every_job_is_taken_once_however_many_take(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite3")
    numbers = [store.add(SynthesizeJob(str(k))) for k in range(40)]
    taken: list[int] = []

    def work() -> None:
        own = JobStore(tmp_path / "jobs.sqlite3")
        while entry := own.take():
            taken.append(entry.id)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == numbers


def test_a_file_that_is_no_list_of_jobs_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    path.write_text("somebody's notes")
    with pytest.raises(InputError, match="cannot hold the list of jobs"):
        JobStore(path)
    assert path.read_text() == "somebody's notes"


def test_a_learn_job_asks_for_the_steps_that_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LearnConfig] = []

    def learn(instance: Any, base: Any, target: Any, config: LearnConfig, **options: Any) -> None:
        asked.append(config)
        raise InputError("enough")

    monkeypatch.setattr("mifo.api.learn", learn)
    photo, shop = str(write_instance(tmp_path / "cups")), Workshop(tmp_path)
    shop._base = ("tiny", MemoryConfig()), load_base()
    monkeypatch.setattr("mifo.jobs.workshop.family_of", lambda model: "toybox")
    for job in (LearnJob(photo, model="tiny", step_factor=3), LearnJob(photo, model="tiny", step_factor=3, phase2_train_steps=7)):
        with pytest.raises(InputError, match="enough"):
            shop.do(job)
    preset = learn_preset("toybox")
    assert [c.embedding.train_steps for c in asked] == [3 * preset.embedding.train_steps] * 2
    assert [c.lora.train_steps for c in asked] == [3 * preset.lora.train_steps, 7]


def test_a_job_that_says_no_more_is_the_call_that_says_no_more() -> None:
    """Of the Python API, whose defaults are the commands' too."""
    seeds = {api.learn: LearnConfig().seed}  # which has its seed from the settings
    for job, call in ((SynthesizeJob("a"), api.synthesize), (EditJob("a", "i", "m"), api.edit), (LearnJob("p"), api.learn)):
        defaults = {name: p.default for name, p in inspect.signature(call).parameters.items()}
        assert job.seed == seeds.get(call, defaults["seed"]), call
        assert getattr(job, "num_images", 1) == defaults.get("num_images", 1), call
        assert getattr(job, "overwrite", False) == defaults.get("overwrite", False), call


def test_the_contrast_has_the_same_bounds_for_all_who_ask() -> None:
    for wrong in (-1, 11):
        with pytest.raises(InputError, match=f"contrast_scale is {wrong}"):
            SynthesisConfig(contrast_scale=wrong)
        with pytest.raises(InputError, match=f"contrast_scale is {wrong}"):
            SynthesizeJob("a", contrast_scale=wrong)


def test_a_workshop_reads_a_bundle_once_and_again_when_it_was_learned_again(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path / "bundles", "desk")
    workshop = Workshop(tmp_path / "bundles", tmp_path / "output")
    first = workshop.bundle("desk")
    assert workshop.bundle("desk") is first
    record = folder / "bundle.json"
    written = record.stat().st_mtime
    os.utime(record, (written + 5, written + 5))
    assert workshop.bundle("desk") is not first


@pytest.mark.parametrize("job", [
    SynthesizeJob("a photo of <asset0>", ("desk",), output="mine"),
    EditJob("a photo of <asset0>", "street.png", "mask.png", ("desk",), output="mine"),
])  # fmt: skip
def test_a_job_whose_output_is_taken_is_refused_before_a_model_is_loaded(job: Any, tmp_path: Path,
                                                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    copy_bundle(tmp_path / "bundles", "desk")
    Path("mine").mkdir()
    Path("mine/note.txt").write_text("keep")
    monkeypatch.setattr(Workshop, "base_of", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(InputError, match="other things in it"):
        Workshop(tmp_path / "bundles", tmp_path / "output").do(job)
