"""What each further bundle costs in one picture, on the full width of sd2.1 with random weights: three assets in three boxes, of
one, two and three bundles.

    OMP_NUM_THREADS=1 python -m scripts.performance.measure_bundles

Seconds of the processor for one denoising step, the three in turn in one process, so that other work beside it counts for little;
peak memory of a process each.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mifo import synthesize
from mifo.bundle.store import Bundle, save_bundle
from mifo.config import LearnConfig
from mifo.learning.learn import lend_adapters
from mifo.model.base import BaseModel
from mifo.presets import learn_preset, synthesis_preset
from mifo.prompts import asset_token
from scripts.performance.bench_setup import boxes_for, build_base
from scripts.record import spread, write_result

ASSETS = 3
SPLITS = {1: (3,), 2: (2, 1), 3: (1, 1, 1)}  # bundles -> assets of each


def random_bundles(base: BaseModel, counts: tuple[int, ...], place: Path) -> list[Bundle]:
    """With LoRA that does something, on the UNet and the text encoder."""
    config: LearnConfig = learn_preset("stable-diffusion")
    made = []
    for k, count in enumerate(counts):
        torch.manual_seed(k)
        with lend_adapters(base, config.lora, k) as adapters:
            for adapter in adapters.values():
                for name, weight in adapter.named_parameters():
                    if "lora_B" in name:
                        torch.nn.init.normal_(weight, std=0.01)
            tokens = tuple(asset_token(i) for i in range(count))
            vectors = 0.02 * torch.randn(count, base.text_width)
            made.append(save_bundle(place / f"b{k}", base, tokens, None, vectors, adapters, config, {}, overwrite=True))
    return made


def one_step(base: BaseModel, bundles: list[Bundle], counts: tuple[int, ...], pixels: int) -> float:
    """Seconds of the processor, text and decoding included."""
    names = [asset_token(i) if k == 0 else f"<b{k}.asset{i}>" for k, count in enumerate(counts) for i in range(count)]
    preset = synthesis_preset("stable-diffusion")
    off = {name: replace(getattr(preset, name), enabled=False) for name in ("guidance", "refinement")}
    config = replace(preset, steps=1, width=pixels, height=pixels, lora="boxes", **off)
    boxes = dict(zip(names, (list(box.as_tuple()) for box in boxes_for(ASSETS).boxes), strict=True))
    started = time.process_time()
    synthesize(base, bundles, f"a photo of {' and '.join(names)}", boxes, config=config)
    return time.process_time() - started


def in_its_own_process(bundles: int, pixels: int, width_divisor: int) -> float:
    """Peak GiB of a process that draws one step."""
    words = ["--bundles", str(bundles), "--pixels", str(pixels), "--width-divisor", str(width_divisor)]
    done = subprocess.run([sys.executable, "-m", "scripts.performance.measure_bundles", *words], check=True, text=True,
                          capture_output=True)  # fmt: skip
    return float(json.loads(done.stdout.splitlines()[-1]))


def main(
    repeats: int = 3,
    pixels: int = 512,
    width_divisor: int = 1,
    bundles: Annotated[int, typer.Option(help="Draw once with so many and print the peak; for the script's own use.")] = 0,
) -> None:
    with tempfile.TemporaryDirectory(prefix="mifo-bundles-") as holder:
        base = build_base("sd2.1", width_divisor, torch.float32, "cpu")
        if bundles:
            one_step(base, random_bundles(base, SPLITS[bundles], Path(holder)), SPLITS[bundles], pixels)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
            return
        made = {n: random_bundles(base, counts, Path(holder) / str(n)) for n, counts in SPLITS.items()}
        seconds: dict[int, list[float]] = {n: [] for n in SPLITS}
        for _ in range(repeats):
            for n, counts in SPLITS.items():
                seconds[n].append(one_step(base, made[n], counts, pixels))
                print(n, seconds[n][-1], flush=True)
        del base, made
    peaks = {n: in_its_own_process(n, pixels, width_divisor) for n in SPLITS}
    first = spread(seconds[1])["median"]
    numbers: dict[str, Any] = {
        "shape": "sd2.1", "width_divisor": width_divisor, "pixels": pixels, "assets": ASSETS,
        "rank": learn_preset("stable-diffusion").lora.rank,
        "by_bundles": {str(n): {"cpu_seconds_a_step": spread(seconds[n]),
                                "of_one": round(spread(seconds[n])["median"] / first, 3),
                                "peak_gib": round(peaks[n], 3), "peak_of_one": round(peaks[n] / peaks[1], 3)} for n in SPLITS},
    }  # fmt: skip
    print(write_result("bundles_cost", numbers))


if __name__ == "__main__":
    typer.run(main)
