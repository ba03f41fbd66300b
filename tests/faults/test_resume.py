"""A run that is interrupted and resumed learns the same bits as one that never was; nothing older is damaged on the way."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _short_runs import Crash, base, config, crash_at, learned, run
from _tiny import copy_bundle, learn_arguments, mifo, snapshot, write_instance
from safetensors.torch import load_file

from mifo.bundle.store import load_bundle
from mifo.data.instance import Instance, load_instance
from mifo.errors import InputError
from mifo.io.interrupts import stop_between_steps
from mifo.io.lock import checkpoint_folder, hold_lock
from mifo.io.tensor_file import read_state, write_state
from mifo.learning.checkpoints import Checkpointing, latest
from mifo.learning.learn import learn
from mifo.learning.objective import Objective
from mifo.learning.state import PhaseRun
from mifo.learning.trainer import Callback, Trainer

pytestmark = pytest.mark.usefixtures("quick_preview")


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [
    [("embedding", 1)], [("embedding", 2), ("embedding", 3)], [("lora", 1)], [("lora", 2), ("lora", 3)],
    [("embedding", 3), ("lora", 2)],
], ids=str)  # fmt: skip
def test_a_crashed_run_resumes_to_the_same_bits(instance: Instance, whole: Path, tmp_path: Path, moments: list):
    for moment in moments:
        with pytest.raises(Crash):
            run(instance, tmp_path / "cups", crash_at(*moment))
        torch.rand(3), np.random.rand(3)  # whatever else happens in between
    assert learned(run(instance, tmp_path / "cups")) == learned(whole)
    record, other = (json.loads((f / "bundle.json").read_text()) for f in (tmp_path / "cups", whole))
    assert record["losses"] == other["losses"]
    assert sorted(os.listdir(tmp_path)) == [".prior", "cups"]  # no checkpoint is left


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(instance: Instance, whole: Path, tmp_path: Path):
    with pytest.raises(Crash):
        run(instance, tmp_path / "cups", crash_at("lora", 3))
    older, newer = sorted(checkpoint_folder(tmp_path / "cups").glob("*.safetensors"))
    content = bytearray(newer.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    weight = json.loads(content[8:start])["t0"]["data_offsets"][0]  # the first of the parameters
    content[start + weight + 2] ^= 0x20  # one bit of one weight
    newer.write_bytes(content)
    assert learned(run(instance, tmp_path / "cups")) == learned(whole)
    for bad in (b"", b"\0" * 100, older.name.encode()):
        checkpoint_folder(tmp_path / "cups").mkdir(parents=True)
        newer.write_bytes(bad)
        assert latest(tmp_path / "cups") is None
        shutil.rmtree(tmp_path / ".checkpoints")


def test_without_checkpoints_a_run_starts_from_the_beginning(instance: Instance, whole: Path, tmp_path: Path):
    with pytest.raises(Crash):
        run(instance, tmp_path / "cups", crash_at("lora", 3), every=0)
    assert not checkpoint_folder(tmp_path / "cups").exists()
    assert learned(run(instance, tmp_path / "cups")) == learned(whole)


def test_other_settings_are_refused_by_name(instance: Instance, tmp_path: Path):
    with pytest.raises(Crash):
        run(instance, tmp_path / "cups", crash_at("embedding", 2))
    before = snapshot(tmp_path)
    differences = r"config\.weight_decay is 0\.01 there and 0\.1 here; config\.seed is 0 there and 5 here"
    with pytest.raises(InputError, match=differences):
        run(instance, tmp_path / "cups", settings=config(seed=5, weight_decay=0.1))
    with pytest.raises(InputError, match=r"checkpoint at phase 1, step 1 of 3; go on from it with --resume, or .*--no-resume"):
        run(instance, tmp_path / "cups", resume=None)
    assert snapshot(tmp_path) == before
    another = replace(base(), fingerprint="0123")
    with pytest.raises(InputError, match=r"base\.fingerprint is .* there and \"0123\" here; give the same ones, or --no-resume"):
        learn(instance, another, config(), tmp_path / "cups", checkpointing=Checkpointing(resume=True))
    other = load_instance(write_instance(tmp_path / "mugs" / "cups", assets=1))
    with pytest.raises(InputError, match=r"instance is .* there and"):
        run(other, tmp_path / "cups")
    with pytest.raises(Crash):  # whoever does not mind starts over
        learn(instance, base(), config(seed=4), tmp_path / "cups", crash_at("embedding", 1), None,
              Checkpointing(resume=True, strict=False))  # fmt: skip
    run(instance, tmp_path / "cups", resume=None, settings=config(seed=5))  # another run: nothing that could be gone on from
    assert load_bundle(tmp_path / "cups").config.seed == 5


# --- files --------------------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    tensors = [torch.arange(6).reshape(2, 3), torch.tensor(2.5), torch.zeros(0), torch.tensor([True, False]),
               torch.randn(4).bfloat16(), torch.arange(5, dtype=torch.uint8), torch.ones(4, 3).t()]  # fmt: skip
    plain = {1: (1, 2.5, None), "a": [True, "ü\n"], (3, "x"): {"deep": [{}, [], ()]}, "big": 2**127, "odd": float("-inf"),
             "exact": 0.1 + 0.2}  # fmt: skip
    write_state(tmp_path / "1.safetensors", {"tensors": tensors, "plain": plain}, "here", {})
    again = read_state(tmp_path / "1.safetensors")
    assert again["plain"] == plain and all(type(k) is type(j) for k, j in zip(again["plain"], plain, strict=True))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(again["tensors"], tensors, strict=True))
    with pytest.raises(TypeError):
        write_state(tmp_path / "2.safetensors", {"x": object()}, "here", {})


def test_the_last_two_are_kept_and_hold_no_pickle(instance: Instance, tmp_path: Path):
    with pytest.raises(Crash):
        run(instance, tmp_path / "cups", crash_at("lora", 3))
    names = sorted(os.listdir(checkpoint_folder(tmp_path / "cups")))
    assert names == ["00000004.safetensors", "00000005.safetensors"]
    assert all(load_file(checkpoint_folder(tmp_path / "cups") / n) for n in names)
    saved = latest(tmp_path / "cups")
    assert saved is not None and saved.where == "phase 2, step 2 of 3"


# --- signals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status", "verb"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_keeps_the_state_after_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int,
                                                 verb: str):  # fmt: skip
    """In the middle of step 2; the same command with --resume ends as one that was never stopped."""
    from mifo.io.interrupts import terminate

    cups, arguments = write_instance(tmp_path / "cups"), ("--no-prior-preservation", "--checkpoint-every", 50)
    mifo(*learn_arguments(cups, tmp_path / "whole", *arguments))
    losses, calls = Objective.losses, []

    def interrupted(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            signal.raise_signal(number)
        return losses(*given)

    earlier = [signal.signal(signal.SIGTERM, terminate), signal.signal(signal.SIGINT, signal.default_int_handler)]
    try:
        monkeypatch.setattr(Objective, "losses", interrupted)
        result = mifo(*learn_arguments(cups, tmp_path / "out", *arguments), exit_code=status)
        assert signal.getsignal(signal.SIGTERM) is terminate
    finally:
        signal.signal(signal.SIGTERM, earlier[0])
        signal.signal(signal.SIGINT, earlier[1])
    assert result.stderr.splitlines()[-1] == (
        f"{verb}: nothing half-written is left; files from before are as they were; the state at phase 1, step 2 of 2 is kept: "
        "the same command with --resume goes on from there"
    )
    assert "--no-resume" in mifo(*learn_arguments(cups, tmp_path / "out", *arguments), exit_code=2).stderr
    resumed = mifo(*learn_arguments(cups, tmp_path / "out", *arguments, "--resume"))
    assert "note: goes on from phase 1, step 2 of 2" in resumed.stderr
    assert learned(tmp_path / "out" / "cups") == learned(tmp_path / "whole" / "cups")


class AskAfterSaving(Callback):
    """Ctrl-C in the moment after a step's checkpoint was or was not due."""

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        if phase.steps_done == 1:
            signal.raise_signal(signal.SIGINT)
        return False


def test_a_signal_after_the_checkpoint_was_due_waits_for_the_next(instance: Instance, tmp_path: Path,
                                                                  on_ctrl_c: Callable[[Any], None]):  # fmt: skip
    on_ctrl_c(signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        learn(instance, base(), config(), tmp_path / "cups", checkpointing=Checkpointing(50), callbacks=[AskAfterSaving()])
    saved = latest(tmp_path / "cups")
    assert saved is not None and saved.where == "phase 1, step 2 of 3"


@pytest.fixture
def on_ctrl_c() -> Iterator[Callable[[Any], None]]:
    """Sets what Ctrl-C does for one test; a test run in the background may ignore it altogether."""
    earlier = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)  # type: ignore[misc]
    signal.signal(signal.SIGINT, earlier)


def test_a_second_ctrl_c_does_not_wait_for_the_step(on_ctrl_c: Callable[[Any], None]):
    on_ctrl_c(signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt), stop_between_steps() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_or_only_noted_does_not_end_the_run(on_ctrl_c: Callable[[Any], None], whole: Path,
                                                                     instance: Instance, tmp_path: Path):  # fmt: skip
    """Half a run must never become a bundle."""
    for handler in (signal.SIG_IGN, lambda *_: None):
        on_ctrl_c(handler)
        folder = run(instance, tmp_path / "cups", lambda _: signal.raise_signal(signal.SIGINT))
        assert learned(folder) == learned(whole) and signal.getsignal(signal.SIGINT) is handler


# --- two runs at once ---------------------------------------------------------------------------


def hold_and_wait(folder: Path, held: Any) -> None:
    with hold_lock(folder, "learning to cups", "wait"):
        held.set()
        signal.pause()


def test_a_second_run_to_one_name_refuses_and_a_dead_ones_lock_is_taken_over(tmp_path: Path):
    folder = tmp_path / ".checkpoints" / "cups"
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold_and_wait, args=(folder, held), daemon=True)
    process.start()
    assert held.wait(60)
    second = hold_lock(folder, "learning to cups", "give another")
    with pytest.raises(InputError, match=rf"process {process.pid} is learning to cups .*; wait for it, .* give another"), second:
        pass
    process.kill()
    process.join()
    assert (folder / "lock").read_text().strip() == str(process.pid)
    with hold_lock(folder, "learning to cups", "wait"):
        assert (folder / "lock").read_text().strip() == str(os.getpid())
        with pytest.raises(InputError, match="is learning to"), hold_lock(folder, "learning to cups", "wait"):
            pass
        assert (folder / "lock").exists()
    assert os.listdir(tmp_path) == []


# --- numerical faults ---------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "value"), [("diffusion", float("nan")), ("attention", float("inf")), ("prior", float("nan"))])
def test_a_loss_that_is_not_finite_stops_with_its_name(instance: Instance, tmp_path: Path, part: str, value: float,
                                                       monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    """The bundle from before stays, and the checkpoint of the step before is kept."""
    folder = copy_bundle(tmp_path, "cups")
    before, losses, calls = snapshot(folder), Objective.losses, []

    def spoiled(*given: Any) -> Any:
        calls.append(given)
        result = losses(*given)
        return replace(result, **{part: getattr(result, part) * value + value}) if len(calls) == 3 else result

    monkeypatch.setattr(Objective, "losses", spoiled)
    kept = r"The last good checkpoint, phase 1, step 2 of 3, is kept"
    with pytest.raises(InputError, match=rf"the {part} loss is not finite at step 2 of the embedding phase.* {kept}"):
        run(instance, tmp_path / "cups")
    monkeypatch.undo()
    assert snapshot(folder) == before
    saved = latest(tmp_path / "cups")
    assert saved is not None and all(bool(p.isfinite().all()) for p in read_state(saved.path)["parameters"])


def test_a_gradient_that_is_not_finite_stops_too(instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")

    losses = Objective.losses

    def spoiled(objective: Objective, *given: Any) -> Any:
        result = losses(objective, *given)
        result.diffusion.register_hook(poison)
        return result

    monkeypatch.setattr(Objective, "losses", spoiled)
    with pytest.raises(InputError, match="the gradient is not finite at step 0 of the embedding phase"):
        run(instance, tmp_path / "cups")
    assert not (tmp_path / "cups").exists()


def test_steps_that_a_scaler_skips_are_counted_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """fp16 needs a GPU; the scaler's own word for a skipped step is imitated."""
    from mifo.learning.optimizer import Stepper

    monkeypatch.setattr(Stepper, "step", lambda self, optimizer: optimizer.step() or False)
    result = mifo(*learn_arguments(write_instance(tmp_path / "cups"), tmp_path / "out", "--no-prior-preservation"))
    assert "4 steps overflowed in fp16 and were skipped" in result.stdout
    assert load_bundle(tmp_path / "out" / "cups").metadata["skipped_steps"] == 4
