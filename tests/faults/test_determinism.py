"""The same seed on the same machine with the same number of threads gives the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from _tiny import learn_arguments, mifo, snapshot, write_instance

BOXES = "[[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]"


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_learn_and_synthesize_repeat_to_the_byte(tmp_path: Path, threads: int):
    cups, made = write_instance(tmp_path / "cups"), []
    for name in ("first", "second"):
        mifo(*learn_arguments(cups, tmp_path / name))
        mifo("synthesize", tmp_path / name / "cups", "--prompt", "a photo of <asset0> and <asset1>", "--boxes", BOXES,
             "--steps", 3, "--seed", 5, "--output-path", tmp_path / name / "pictures")  # fmt: skip
        files = {n: c for n, c in snapshot(tmp_path / name).items() if not n.endswith(".json") or "lora" in n}
        made.append(files)
    differ = {name for name in made[0] | made[1] if made[0].get(name) != made[1].get(name)}
    assert not differ and "pictures/000005.png" in made[0] and "cups/assets.safetensors" in made[0]
