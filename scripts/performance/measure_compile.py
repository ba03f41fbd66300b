"""What `--compile` costs and brings: one picture in boxes as it is and with compiled blocks, in turns, in one run.

    python -m scripts.performance.measure_compile --bundle Model_ours/toy_car
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from mifo.api import load_base_model, load_bundle, synthesize
from mifo.attention.compiled import compile_blocks
from scripts.record import spread, write_result

PROMPT = "a photo of <asset0> and <asset1> and <asset2> at the beach"
BOXES = [[0.0, 0.3, 0.33, 0.8], [0.33, 0.3, 0.66, 0.8], [0.66, 0.3, 1.0, 0.8]]


def main(
    bundle: Annotated[Path, typer.Option(help="Three things learned on the base model.")],
    model: str = "toybox",
    device: str = "",
    repeats: int = 5,
    name: str = "compile",
) -> None:
    """Measures and writes scripts/results/<name>.json."""
    torch.set_num_threads(1)
    base, learned = load_base_model(model, device), load_bundle(bundle)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    images: dict[bool, Any] = {}
    for repeat in range(1 + repeats):  # the first warms up, and compiles
        for compiled in (False, True):
            started = time.perf_counter()
            with compile_blocks(base.unet, compiled):
                result = synthesize(base, learned, PROMPT, BOXES, seed=repeat)
            seconds[compiled].append(time.perf_counter() - started)
            images[compiled] = np.asarray(result.images[0], dtype=int)
    numbers = {
        "model": model, "device": str(base.device), "threads": 1,
        "seconds_as_it_is": spread(seconds[False][1:]), "seconds_compiled": spread(seconds[True][1:]),
        "first_picture_seconds": {"as_it_is": round(seconds[False][0], 1), "compiled": round(seconds[True][0], 1)},
        "largest_difference_in_levels": int(abs(images[True] - images[False]).max()),
    }  # fmt: skip
    print(write_result(name, numbers))


if __name__ == "__main__":
    typer.run(main)
