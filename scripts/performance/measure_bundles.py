"""What each further bundle costs in one picture, on the full width of sd2.1 with random weights: three assets in three boxes, of
one, two and three bundles.

    OMP_NUM_THREADS=1 python -m scripts.performance.measure_bundles

Seconds of the processor for one denoising step, the three in turn in one process, so that other work beside it counts for little;
memory of a process each: what it holds before it draws, and the most that drawing adds.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer

from mifo import synthesize
from mifo.bundle.store import Bundle, save_bundle
from mifo.config import LearnConfig
from mifo.learning.learn import lend_adapters
from mifo.model.base import BaseModel
from mifo.presets import learn_preset, synthesis_preset
from mifo.prompts import asset_token
from scripts.performance.bench_setup import ResidentGrowth, boxes_for, build_base, in_own_process
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


def memory_of(bundles: int, pixels: int, width_divisor: int) -> tuple[float, float]:
    """(GiB of a process that holds the base model and the bundles, GiB that drawing one step adds at most)."""
    with tempfile.TemporaryDirectory(prefix="mifo-bundles-") as holder:
        base = build_base("sd2.1", width_divisor, torch.float32, "cpu")
        made = random_bundles(base, SPLITS[bundles], Path(holder))
        growth = ResidentGrowth()
        one_step(base, made, SPLITS[bundles], pixels)
        return growth.before_gib, growth.growth_gib()


def main(
    repeats: int = 3,
    pixels: int = 512,
    width_divisor: int = 1,
) -> None:
    with tempfile.TemporaryDirectory(prefix="mifo-bundles-") as holder:
        base = build_base("sd2.1", width_divisor, torch.float32, "cpu")
        made = {n: random_bundles(base, counts, Path(holder) / str(n)) for n, counts in SPLITS.items()}
        seconds: dict[int, list[float]] = {n: [] for n in SPLITS}
        for _ in range(repeats):
            for n, counts in SPLITS.items():
                seconds[n].append(one_step(base, made[n], counts, pixels))
                print(n, seconds[n][-1], flush=True)
        del base, made
    memory = {n: in_own_process(memory_of, n, pixels, width_divisor) for n in SPLITS}
    peaks = {n: held + growth for n, (held, growth) in memory.items()}
    first = spread(seconds[1])["median"]
    numbers: dict[str, Any] = {
        "shape": "sd2.1", "width_divisor": width_divisor, "pixels": pixels, "assets": ASSETS,
        "rank": learn_preset("stable-diffusion").lora.rank,
        "by_bundles": {str(n): {"cpu_seconds_a_step": spread(seconds[n]),
                                "of_one": round(spread(seconds[n])["median"] / first, 3),
                                "drawing_gib": round(memory[n][1], 3), "peak_gib": round(peaks[n], 3),
                                "peak_of_one": round(peaks[n] / peaks[1], 3)} for n in SPLITS},
    }  # fmt: skip
    print(write_result("bundles_cost", numbers))


if __name__ == "__main__":
    typer.run(main)
