"""Speed and memory against the published way (bench_baseline.py), measured in the same run.

    python -m scripts.performance.bench --gpu                                            # everything, under 10 minutes on a GPU
    python -m scripts.performance.bench --only guidance --resolution 384 --repeats 3     # one piece on a CPU
    python -m scripts.performance.bench --only phase2 --width-divisor 4 --resolution 256
    python -m scripts.performance.bench --config my_bench.json                           # the same options as JSON

Runs on random weights in Stable Diffusion's shape: nothing here says anything about quality.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from mifo.attention.bounded import BoundedAttention, bound_attention
from mifo.config import SynthesisConfig
from mifo.data.instance import fit_instance
from mifo.io.json_text import json_text, record_text
from mifo.io.sheets import pixels_to_tensor
from mifo.model.base import BaseModel
from mifo.model.prompt_embeds import PromptEmbeds
from mifo.planning.live_bytes import LiveBytes
from mifo.presets import learn_preset, synthesis_preset
from mifo.prompts import add_asset_tokens, asset_token, join_assets, tokenize_prompt
from mifo.sampling.guidance import LatentGuidance
from mifo.synthesis.synthesize import synthesize
from scripts.performance.bench_baseline import DreamBoothLora, PublishedTrainer, guidance_gradient
from scripts.performance.bench_baseline import synthesize as published_synthesize
from scripts.performance.bench_setup import boxes_for, build_base, make_trainer, run_step, write_scene
from scripts.record import spread, write_result

PIECES = ("guidance", "synthesize", "phase1", "phase2", "mfu", "growth")


@dataclass(frozen=True)
class Options:
    """What is measured, and at what size."""

    shape: str = "sd2.1"
    width_divisor: int = 1
    only: str = ",".join(PIECES)
    resolution: int = 512
    assets: int = 3
    repeats: int = 5
    steps: int = 10
    """Denoising steps of `synthesize`; three tenths of them are guided"""
    dtype: str = "fp32"
    """Ours; the baseline runs in it too, and in fp32 as published"""
    device: str = "cpu"
    growth_assets: tuple[int, ...] = (1, 2, 4, 8)
    growth_resolutions: tuple[int, ...] = (256, 512, 768, 1024)
    channels_last: bool = False
    gradient_checkpointing: bool = False
    draws: int = 1
    name: str = "bench"

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]

    @property
    def baseline_dtypes(self) -> list[str]:
        return [self.dtype] if self.dtype == "fp32" else [self.dtype, "fp32"]


# --- clocks -------------------------------------------------------------------------------------


def clock(job: Callable[[], Any], options: Options) -> dict[str, Any]:
    """Seconds of each repeat after one warm-up, and the peak of tensor bytes beside what was there before, in GiB."""
    peak = _peak_gib(job, options.device)
    seconds = []
    for _ in range(options.repeats):
        _synchronize(options.device)
        started = time.perf_counter()
        job()
        _synchronize(options.device)
        seconds.append(time.perf_counter() - started)
    return {"seconds": spread(seconds), "peak_gib": peak}


def _peak_gib(job: Callable[[], Any], device: str) -> float:
    """Also the warm-up."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
    with LiveBytes([t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]) as live:
        job()
    return float(round(live.peak.total / 2**30, 3))


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _release(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def compare(ours: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> dict[str, Any]:
    speedups = {k: round(b["seconds"]["median"] / ours["seconds"]["median"], 2) for k, b in baselines.items()}
    return {"ours": ours, "baseline": baselines, "times_faster_than_baseline_in": speedups}


# --- pieces -------------------------------------------------------------------------------------


@dataclass
class Placing:
    """What drawing with boxes needs."""

    base: BaseModel
    guidance: LatentGuidance
    prompt_embeds: PromptEmbeds
    negative: PromptEmbeds
    latents: torch.Tensor
    config: SynthesisConfig
    prompt: Any


def _place(options: Options, dtype: str, assets: int, resolution: int) -> Placing:
    base = build_base(options.shape, options.width_divisor, replace(options, dtype=dtype).torch_dtype, options.device,
                      options.channels_last)  # fmt: skip
    tokens = [asset_token(i) for i in range(assets)]
    add_asset_tokens(base.tokenizer, tokens)
    for encoder in base.text_encoders:
        encoder.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    prompt = tokenize_prompt(base.tokenizer, join_assets(tokens), tokens)
    empty = tokenize_prompt(base.tokenizer, "", [])
    with torch.no_grad():
        both = base.encode_prompt(torch.tensor([prompt.input_ids, empty.input_ids]))
    prompt_embeds, negative = both[:1], both[1:]
    side = resolution // base.vae_factor
    control = BoundedAttention(prompt, boxes_for(assets), (side, side), base.device)
    guided = max(1, round(0.3 * options.steps))
    # no early stop: on random weights the number of iterations would be chance, and differ from a real model's
    preset = synthesis_preset(base.family)
    config = replace(preset, steps=options.steps, width=resolution, height=resolution,
                     guidance=replace(preset.guidance, steps=guided, loss_threshold=0.0))  # fmt: skip
    latents = torch.randn((1, 4, side, side), generator=torch.Generator().manual_seed(0)).to(base.device)
    guidance = LatentGuidance(base.unet, control, config.guidance, prompt_embeds)
    return Placing(base, guidance, prompt_embeds, negative, latents, config, prompt)


def _our_gradient(place: Placing) -> torch.Tensor:
    with torch.enable_grad(), bound_attention(place.base.unet, place.guidance.control):
        latents = place.latents.detach().requires_grad_(True)
        return torch.autograd.grad(place.guidance.losses(0, _timestep(place), latents).sum(), latents)[0]


def _published_gradient(place: Placing) -> torch.Tensor:
    return guidance_gradient(place.base, place.guidance, place.prompt_embeds, place.negative, place.latents, _timestep(place))


def _timestep(place: Placing) -> torch.Tensor:
    return torch.tensor(900, device=place.base.device)


def bench_guidance(options: Options) -> dict[str, Any]:
    """One guidance pass with its gradient, and how far the two gradients are apart."""
    place = _place(options, options.dtype, options.assets, options.resolution)
    ours, gradient = clock(partial(_our_gradient, place), options), _our_gradient(place).float().cpu()
    baselines, error = {}, {}
    for dtype in options.baseline_dtypes:
        del place
        _release(options.device)
        place = _place(options, dtype, options.assets, options.resolution)
        baselines[dtype] = clock(partial(_published_gradient, place), options)
        expected = _published_gradient(place).float().cpu()
        error[dtype] = float((gradient - expected).norm() / expected.norm())
    return {**compare(ours, baselines), "relative_gradient_error": error}


def bench_synthesize(options: Options) -> dict[str, Any]:
    """The whole job after loading: text, guided and bounded denoising, decoding."""
    place = _place(options, options.dtype, options.assets, options.resolution)
    tokens = place.guidance.control.layout.tokens
    layout = boxes_for(options.assets)
    ours = clock(partial(synthesize, place.base, join_assets(list(tokens)), layout, tokens, place.config), options)
    baselines = {}
    for dtype in options.baseline_dtypes:
        del place
        _release(options.device)
        place = _place(options, dtype, options.assets, options.resolution)
        size = (place.latents.shape[-2], place.latents.shape[-1])
        job = partial(published_synthesize, place.base, place.prompt, place.guidance, place.config, size, 0)
        baselines[dtype] = clock(job, options)
        del job
    return {**compare(ours, baselines), "steps": options.steps, "guided_steps": place.config.guidance.steps}


def bench_step(options: Options, phase: str) -> dict[str, Any]:
    """One optimizer step of phase 1 or 2 at batch 1 (phase 2: and the prior's picture)."""
    full = phase == "phase2"
    baselines = {}
    published_for_it = options.shape != "sdxl"  # the published code trains one text encoder
    for dtype in options.baseline_dtypes if published_for_it else ():
        base = build_base(options.shape, options.width_divisor, replace(options, dtype=dtype).torch_dtype, options.device)
        instance = fit_instance(write_scene(options.assets, options.resolution), options.resolution)
        with make_trainer(base, instance, replace(options, dtype=dtype), lora=False) as trainer:
            batch = trainer.data.sample(trainer.state.rng, trainer.state.generator, 1, False, 0.0)
            ids = [base.tokenizer.get_added_vocab()[asset_token(i)] for i in range(options.assets)]
            config = trainer.config
        prompt = tokenize_prompt(base.tokenizer, batch.prompt, [asset_token(i) for i in batch.assets])
        pixels = pixels_to_tensor(instance.image).to(base.device)
        published = PublishedTrainer(base, None, pixels, config, prompt, ids, full)
        baselines[dtype] = clock(partial(published.step, batch), options)
        del base, trainer, published
        _release(options.device)
    ours, _ = _our_step(options, phase, options.assets, options.resolution)
    ours["draws"] = options.draws
    found = compare(ours, baselines)
    if full:
        found["diffusers_script"] = _diffusers_step(options)
        found["times_faster_than_diffusers_script"] = round(
            found["diffusers_script"]["seconds"]["median"] / ours["seconds"]["median"], 2
        )
    found["times_faster_a_draw"] = {k: round(v * options.draws, 2) for k, v in found["times_faster_than_baseline_in"].items()}
    return found


def _diffusers_step(options: Options) -> dict[str, Any]:
    base = build_base(options.shape, options.width_divisor, options.torch_dtype, options.device, options.channels_last)
    instance = fit_instance(write_scene(options.assets, options.resolution), options.resolution)
    ids = [tokenize_prompt(base.tokenizer, prompt, []).input_ids for prompt in ("a photo of a sks thing", "a photo of a thing")]
    pixels = pixels_to_tensor(instance.image).to(base.device)
    script = DreamBoothLora(base, pixels, ids, learn_preset(base.family).lora.rank)
    if options.gradient_checkpointing:
        base.unet.enable_gradient_checkpointing()
    found = clock(script.step, options)
    del base, script
    _release(options.device)
    return found


def _our_step(options: Options, phase: str, assets: int, resolution: int,
              count_flops: bool = False) -> tuple[dict[str, Any], int]:  # fmt: skip
    base = build_base(options.shape, options.width_divisor, options.torch_dtype, options.device, options.channels_last)
    instance = fit_instance(write_scene(assets, resolution), resolution)
    with make_trainer(base, instance, options, lora=phase == "phase2") as trainer:
        step = run_step(trainer, phase)
        found = clock(step, options)
        flops = 0
        if count_flops:
            with FlopCounterMode(display=False) as counter:
                step()
            flops = counter.get_total_flops()
    del base, trainer
    _release(options.device)
    return found, flops


def bench_mfu(options: Options) -> dict[str, Any]:
    """Model flop utilization of a phase 2 step: its counted flops a second over the device's measured matmul rate."""
    rate = matmul_rate(options.torch_dtype, options.device)
    found, flops = _our_step(options, "phase2", options.assets, options.resolution, count_flops=True)
    achieved = flops / found["seconds"]["median"]
    return {"step": found, "tflop_per_step": round(flops / 1e12, 4), "tflops_achieved": round(achieved / 1e12, 4),
            "tflops_of_a_matmul": round(rate / 1e12, 4), "utilization_percent": round(100 * achieved / rate, 1)}  # fmt: skip


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """Flops a second of a large square product, the best of ten."""
    n = 8192 if device.startswith("cuda") else 1536
    a, b = torch.randn((2, n, n), device=device).to(dtype).unbind()
    a @ b
    best = float("inf")
    for _ in range(10):
        _synchronize(device)
        started = time.perf_counter()
        a @ b
        _synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def bench_growth(options: Options) -> dict[str, Any]:
    """Phase 2 step and guidance pass over assets, and over pixels; an out-of-memory row stays in the table."""
    rows = [("assets", n, n, options.resolution) for n in options.growth_assets]
    rows += [("resolution", r, options.assets, r) for r in options.growth_resolutions]
    table = []
    for over, value, assets, resolution in rows:
        row: dict[str, Any] = {"over": over, "value": value}
        try:
            row["phase2"], _ = _our_step(options, "phase2", assets, resolution)
            place = _place(options, options.dtype, assets, resolution)
            row["guidance"] = clock(partial(_our_gradient, place), options)
            del place
        except RuntimeError as error:
            row["error"] = str(error).splitlines()[0][:200]
        _release(options.device)
        table.append(row)
        print(record_text(row), flush=True)
    return {"rows": table}


RUN: dict[str, Callable[[Options], dict[str, Any]]] = {
    "guidance": bench_guidance,
    "synthesize": bench_synthesize,
    "phase1": lambda o: bench_step(o, "phase1"),
    "phase2": lambda o: bench_step(o, "phase2"),
    "mfu": bench_mfu,
    "growth": bench_growth,
}


def run(options: Options) -> Path:
    """Measures and writes `results/<name>.json` after each piece, so that an interruption loses little."""
    wanted = [p.strip() for p in options.only.split(",")]
    unknown = [p for p in wanted if p not in PIECES]
    if unknown:
        raise typer.BadParameter(f"--only has {', '.join(unknown)}; choose from {', '.join(PIECES)}")
    note = "random weights in Stable Diffusion's shape; speed and memory only"
    numbers: dict[str, Any] = {"note": note, "options": asdict(options)}
    if not options.device.startswith("cuda"):
        numbers["gpu"] = "not measured"
    for piece in wanted:
        started = time.perf_counter()
        numbers[piece] = RUN[piece](options)
        print(f"{piece} ({time.perf_counter() - started:.0f} s): {json_text(numbers[piece])}", flush=True)
        path = write_result(options.name, numbers, options.device)
        _release(options.device)
    return path


def main(
    only: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PIECES)}.")] = ",".join(PIECES),
    gpu: Annotated[bool, typer.Option(help="On cuda, ours in bf16, at 512 pixels, real width.")] = False,
    config: Annotated[Path | None, typer.Option(help="JSON file with any of the options.")] = None,
    shape: str = "sd2.1",
    width_divisor: int = 1,
    resolution: int = 512,
    assets: int = 3,
    repeats: int = 5,
    steps: int = 10,
    dtype: str = "",
    draws: int = 1,
    channels_last: bool = False,
    gradient_checkpointing: bool = False,
    growth_resolutions: str = "256,512,768,1024",
    growth_assets: str = "1,2,4,8",
    threads: int = 0,
    name: str = "",
) -> None:
    """Writes scripts/results/<name>.json."""
    if threads:
        torch.set_num_threads(threads)
    options = Options(
        shape, width_divisor, only, resolution, assets, repeats, steps, dtype or ("bf16" if gpu else "fp32"),
        "cuda" if gpu else "cpu", tuple(map(int, growth_assets.split(","))), tuple(map(int, growth_resolutions.split(","))),
        channels_last, gradient_checkpointing, draws, name or ("bench_gpu" if gpu else "bench"),
    )  # fmt: skip
    if config:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(config.read_text()).items()}
        unknown = sorted(set(given) - {f.name for f in fields(Options)})
        if unknown:
            raise typer.BadParameter(f"{config} has unknown keys {unknown}")
        options = replace(options, **given)
    print(run(options))


if __name__ == "__main__":
    typer.run(main)
