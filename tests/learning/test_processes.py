"""Several processes that learn one scene together, as `accelerate launch` and `torchrun` start them; on CPUs, by gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from _tiny import learn_arguments, write_instance
from _warm import python_line

from mifo.bundle.store import Bundle, load_bundle

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(place: Path, count: int, output: str, *more: object) -> list[subprocess.Popen[str]]:
    """`learn` in `count` processes, as a launcher would start them."""
    arguments = learn_arguments(place / "desk", place / output, *more)
    command, port, processes = python_line("-m", "mifo", *arguments), free_port(), []
    for index in range(count):
        names = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                       **({k: str(v) for k, v in names.items()} if count > 1 else {})}  # fmt: skip
        processes.append(subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                          cwd=place))  # fmt: skip
    return processes


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """(status, output, messages) of each."""
    texts = [process.communicate(timeout=600) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def wait_for_checkpoint(output: Path) -> Path:
    kept, deadline = output / ".checkpoints" / "desk", time.monotonic() + 300
    while not list(kept.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    return kept


def weights(bundle: Bundle) -> torch.Tensor:
    named = {f"{name}.{key}": value for name in bundle.adapters for key, value in bundle.lora[name].weights.items()}
    return torch.cat([bundle.token_embeddings.flatten(), *(named[key].float().flatten() for key in sorted(named))])


def test_two_learn_what_one_with_as_many_draws_learns(tmp_path: Path) -> None:
    write_instance(tmp_path / "desk")
    # each process has one picture whole and half of another
    shared = ("--draws", 6, "--pictures", 3, "--alone-share", 0.5, "--phase2-timesteps", "logit-normal")
    [(status, _, messages)] = ended(start(tmp_path, 1, "one", *shared))
    assert status == 0, messages
    both = ended(start(tmp_path, 2, "two", *shared))
    assert [status for status, _, _ in both] == [0, 0], both
    one, two = (load_bundle(tmp_path / name / "desk") for name in ("one", "two"))
    assert float((weights(one) - weights(two)).abs().max()) < 1e-5  # the bar; sums are added in another order
    asked, phase2 = two.config, two.config.lora
    assert (asked.pictures, asked.alone_share, phase2.draws, phase2.timesteps) == (3, 0.5, 6, "logit-normal")
    assert (asked.embedding.draws, asked.embedding.timesteps) == (6, "uniform")
    assert "learned" in both[0][1] and both[1][1] == "" and "note" not in both[1][2]  # the main process speaks for both
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_a_stop_that_one_hears_stops_both_and_they_go_on(tmp_path: Path) -> None:
    write_instance(tmp_path / "desk")
    steps = ("--phase1-train-steps", 40)
    both = start(tmp_path, 2, "two", *steps, "--checkpoint-every", 1)
    kept = wait_for_checkpoint(tmp_path / "two")
    both[1].send_signal(signal.SIGTERM)
    assert [status for status, _, _ in ended(both)] == [143, 143]
    assert list(kept.glob("*.safetensors")) and not (tmp_path / "two" / "desk").exists()
    again = ended(start(tmp_path, 2, "two", *steps, "--resume"))
    assert [status for status, _, _ in again] == [0, 0], again
    assert "goes on from phase 1" in again[0][2]
    ended(start(tmp_path, 2, "whole", *steps))
    resumed, whole = (load_bundle(tmp_path / name / "desk") for name in ("two", "whole"))
    assert torch.equal(weights(resumed), weights(whole))


def test_a_process_that_is_killed_ends_the_other_with_one_message(tmp_path: Path) -> None:
    write_instance(tmp_path / "desk")
    both = start(tmp_path, 2, "two", "--phase1-train-steps", 4000, "--checkpoint-every", 1)
    wait_for_checkpoint(tmp_path / "two")
    both[1].kill()
    (status, _, messages), _ = ended(both)
    said = [line for line in messages.splitlines() if line.startswith("error:")]
    assert status == 1 and len(said) == 1 and "another of the job's 2 processes has ended" in said[0], messages
    assert "Traceback" not in messages and list((tmp_path / "two" / ".checkpoints" / "desk").glob("*.safetensors"))


def test_other_commands_do_not_run_in_several(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    for command in (["list"], ["cluster", "learn", "photos.jsonl"]):
        done = subprocess.run([sys.executable, "-m", "mifo", *command], env=environment, capture_output=True, text=True,
                              cwd=tmp_path)  # fmt: skip
        assert done.returncode == 2 and "no job for several processes" in done.stderr
