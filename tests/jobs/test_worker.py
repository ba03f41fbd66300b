"""The process that does what the list holds: stops, what is killed, and a shell that has it ignore Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _tiny import ROOT, copy_bundle, tiny_base_folder, write_instance
from _warm import python_line

from mifo.jobs.job import LearnJob, SynthesizeJob
from mifo.jobs.store import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Entry, JobStore
from mifo.jobs.worker import LIST, preview_of

SECONDS = 120  # for PyTorch to be imported on a busy machine


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    copy_bundle(folder / "Model_ours", "desk")
    write_instance(folder / "cups")
    return folder


def start(place: Path) -> subprocess.Popen[bytes]:
    """As a shell's `&` starts it: with SIGINT ignored, which children inherit."""
    return subprocess.Popen(python_line("-m", "mifo.jobs.worker", place / "state", place / "Model_ours", place / "output"),
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # fmt: skip


@pytest.fixture
def worker(place: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = start(place)
    yield process
    process.kill()
    process.wait()


def wait(store: JobStore, number: int, done: Callable[[Entry], bool]) -> Entry:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        entry = store.get(number)
        assert entry is not None
        if done(entry):
            return entry
        time.sleep(0.1)
    raise AssertionError(entry)


def test_a_job_stops_keeps_its_state_and_the_next_one_is_done(place: Path, worker: subprocess.Popen[bytes]) -> None:
    store = JobStore(place / "state" / LIST)
    long = LearnJob(str(place / "cups"), "cups", str(tiny_base_folder()), phase1_train_steps=100_000, phase2_train_steps=0)
    number = store.add(long)
    after = store.add(SynthesizeJob("a photo of <asset0>", ("desk",), steps=1, model=str(tiny_base_folder())))
    wait(store, number, lambda e: bool(e.progress and e.progress["what"].startswith("phase 1") and e.progress["done"] > 3))
    assert preview_of(place / "state", number).is_file()
    store.stop(number)
    assert wait(store, number, lambda e: e.over).state == CANCELLED
    assert list((place / "Model_ours" / ".checkpoints" / "cups").glob("*.safetensors"))
    assert wait(store, after, lambda e: e.over).state == DONE


def test_what_is_asked_to_end_or_killed_leaves_its_job_to_the_next(place: Path) -> None:
    store = JobStore(place / "state" / LIST)
    number = store.add(SynthesizeJob("a photo of <asset0>", ("desk",), steps=900, model=str(tiny_base_folder())))
    for ending in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        process = start(place)
        wait(store, number, lambda e: e.state == RUNNING and e.progress is not None)
        process.send_signal(ending)
        process.wait(SECONDS)
        entry = store.get(number)
        assert entry and entry.state == (RUNNING if ending == signal.SIGKILL else QUEUED)
    store.stop(number)  # while no worker is there


def test_what_is_wrong_with_a_job_is_told_without_a_traceback(place: Path, worker: subprocess.Popen[bytes]) -> None:
    store = JobStore(place / "state" / LIST)
    number = store.add(SynthesizeJob("a photo of <asset9>", ("desk",), model=str(tiny_base_folder())))
    entry = wait(store, number, lambda e: e.over)
    assert entry.state == FAILED and "<asset9>" in str(entry.error) and "Traceback" not in str(entry.error)


def test_a_second_worker_leaves_the_first_one_alone(place: Path, worker: subprocess.Popen[bytes]) -> None:
    store = JobStore(place / "state" / LIST)
    number = store.add(SynthesizeJob("a photo of <asset0>", ("desk",), steps=1, model=str(tiny_base_folder())))
    wait(store, number, lambda e: e.over)
    second = start(place)
    assert second.wait(SECONDS) == 2 and worker.poll() is None
