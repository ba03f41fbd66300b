"""The planner's counts against measurements.

    python -m scripts.performance.measure_memory       # fake tensors: a whole step of the real width in megabytes of RAM
    python -m scripts.performance.measure_memory --real --width-divisor 4 --resolution 256      # a real step's resident memory
    python -m scripts.performance.measure_memory --gpu                # the allocator's peak, and whole jobs under 12, 8 and 6 GiB

Fake tensors: PyTorch's own MemTracker follows one learning step under FakeTensorMode, with the CPU's real fused attention;
the plan comes from the meta device with a model of that kernel. Real: the learner's own step, its peak resident memory and
its tensors, with a C library told to give freed memory back at once (by itself it is a third faster, and holds gaps that no
plan can know). GPU: `torch.cuda.max_memory_allocated`, and each whole job in a process that may not take more.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mifo.attention.record import record_attention
from mifo.attention.sites import choose_sites
from mifo.config import LearnConfig
from mifo.io.json_text import json_text, record_text
from mifo.learning.losses import masked_diffusion_loss, penalty_loss
from mifo.model.base import BaseModel
from mifo.model.embedding import use_assets
from mifo.model.lora import add_adapters
from mifo.model.peak_memory import process_peak_gib
from mifo.model.prompt_embeds import predict
from mifo.model.shapes import shape_of
from mifo.planning.live_bytes import LiveBytes
from mifo.planning.trace import Model, build, trace_learning
from mifo.presets import learn_preset
from scripts.performance import measure_drawing
from scripts.performance.bench_setup import in_own_process
from scripts.record import write_result

GIB = 2**30
RETURN_AT_ONCE = 1 << 16  # bytes from which a freed block goes back to the system
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One learning step."""

    phase: str
    checkpointing: bool
    dtype: str
    resolution: int
    assets: int = 3

    @property
    def rows(self) -> int:
        return 2 if self.phase == "phase2" else 1

    def settings(self, config: LearnConfig) -> Any:
        return config.lora if self.phase == "phase2" else config.embedding


def planned(model: Model, case: Case) -> dict[str, float]:
    """GiB at the planned peak beside weights and optimizer states."""
    config = learn_preset("stable-diffusion")
    rank = config.lora.rank if case.phase == "phase2" else 0
    traced = trace_learning(model, case.resolution, DTYPES[case.dtype], case.rows, case.assets, rank, True, True,
                            case.checkpointing, case.settings(config).attention, "sdpa")  # fmt: skip
    return {"total": traced.peak.total / GIB, **{k: v / GIB for k, v in traced.peak.by_tag.items()}}


# --- fake tensors -------------------------------------------------------------------------------


def measured_on_fake_tensors(model: Model, case: Case) -> dict[str, float]:
    """GiB by MemTracker's own categories at its peak."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = learn_preset("stable-diffusion")
    base = build(model, DTYPES[case.dtype])
    if case.phase == "phase2":
        for adapter in add_adapters(base, config.lora.rank, True).values():
            adapter.to("meta")
    if case.checkpointing:
        base.unet.enable_gradient_checkpointing()
    text = model.configs["text_encoder"]
    with FakeTensorMode():
        parts = tuple(base.parts.values())
        for part in parts:
            _fill_with_fakes(part)
        tokens = range(text["vocab_size"], text["vocab_size"] + case.assets)
        with use_assets(base.text_encoders, tokens, torch.zeros(case.assets, base.text_width)):
            tracker = _tracker()
            tracker.track_external(*parts)
            with tracker:
                _fake_step(base, case, case.settings(config).attention)
            snapshot = tracker.get_tracker_snapshot("peak")
    named = {str(getattr(k, "value", k)): v / GIB for k, v in next(iter(snapshot.values())).items()}
    weights = sum(v for k, v in named.items() if k in ("Parameter", "Buffer"))
    return {"total": named["Total"] - weights, **{k: v for k, v in named.items() if v and k != "Total"}}


def drawing_on_fake_tensors(model: Model, piece: str, resolution: int, dtype: torch.dtype) -> float:
    """GiB beside the weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    base = build(model, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):  # boxes are drawn by NumPy
        parts = (base.unet, base.vae)
        for part in parts:
            _fill_with_fakes(part)
        tracker = _tracker()
        tracker.track_external(*parts)
        with tracker:
            measure_drawing.draw(base, piece, resolution, 3, tracker.reset_mod_stats)
    (found,) = tracker.get_tracker_snapshot("peak").values()
    named = {str(getattr(k, "value", k)): v for k, v in found.items()}
    return float((named["Total"] - named["Parameter"] - named["Buffer"]) / GIB)


def _tracker() -> Any:
    """MemTracker for large models with frozen parameters."""
    from torch.autograd.graph import register_multi_grad_hook
    from torch.distributed._tools import mod_tracker
    from torch.distributed._tools.mem_tracker import MemTracker

    # Its hook for a module's inputs holds the gradient of each until all are there. SDXL's residual blocks read the time, whose
    # gradient is there last of all, so all the other inputs' would be counted to the end; `any` holds none.
    def hold_none(tensors: Any, hook: Any, *, mode: str = "any") -> Any:
        return register_multi_grad_hook(tensors, hook, mode="any")

    vars(mod_tracker)["register_multi_grad_hook"] = hold_none

    class Tracker(MemTracker):
        def _track_module_params_and_buffers(self, module: torch.nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
            for parameter in module.parameters():
                if not parameter.requires_grad:  # MemTracker hooks every gradient, and these have none: marked as hooked
                    self._param_to_grad_hook_handles[parameter] = (_NO_HOOK, _NO_HOOK)
            return super()._track_module_params_and_buffers(module, install_grad_hooks)

        def _update_peak_stats(self, peak_state: Any) -> None:
            """The whole's peak alone: looking through a thousand modules' own after each operation takes hours."""
            for device, now in self._curr_mem_snap.items():
                if now["Total"] > self._peak_mem.get(device, 0):
                    self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)

    return Tracker()


class _NoHook:
    def remove(self) -> None:
        pass


_NO_HOOK = _NoHook()


def _fill_with_fakes(part: torch.nn.Module) -> None:
    """CPU fakes for meta tensors. Converting a module of fakes would have to swap them, which PyTorch refuses."""
    for module in part.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def _fake_step(base: BaseModel, case: Case, terms: Any) -> None:
    """The learner's step without what depends on values: which timesteps were drawn, and the masks' contents."""
    side = case.resolution // base.vae_factor
    latents = torch.zeros(case.rows, 4, side, side)
    prompt_embeds = base.encode_prompt(torch.zeros((case.rows, 77), dtype=torch.long))
    sites = choose_sites(base.unet, terms.blocks, terms.levels)
    with record_attention(base.unet, sites) as recorder:
        recorder.open()
        prediction = predict(base.unet, latents, torch.zeros(case.rows, dtype=torch.long), prompt_embeds)
        maps = recorder.take()
        loss = masked_diffusion_loss(prediction, latents, latents[:, :1])
        for found in maps.values():
            for asset in range(case.assets):
                loss = loss + penalty_loss(found[-1, :, asset], torch.zeros_like(found[-1, :, asset]))
        del maps, prediction
        loss.backward()


# --- real steps ---------------------------------------------------------------------------------


def measured_for_real(shape: str, width_divisor: int, case: Case, device: str) -> dict[str, float]:
    """The trainer's own step in this process: its tensors beside what was there, and the process's or the GPU's peak."""
    from mifo.data.instance import fit_instance
    from scripts.performance.bench import Options
    from scripts.performance.bench_setup import ResidentGrowth, build_base, make_trainer, run_step, write_scene

    options = Options(shape=shape, dtype=case.dtype, gradient_checkpointing=case.checkpointing)
    base = build_base(shape, width_divisor, DTYPES[case.dtype], device)
    instance = fit_instance(write_scene(case.assets, case.resolution), case.resolution)
    with make_trainer(base, instance, options, lora=case.phase == "phase2") as trainer:
        step = run_step(trainer, case.phase)
        gc.collect()
        if device == "cuda":
            step()  # the optimizer's states are there from now on, as in the plan
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            peak = torch.cuda.max_memory_allocated()
            return {"total": (peak - before) / GIB, "allocator_peak": peak / GIB}
        step()
        resident = ResidentGrowth()
        step()
        resident_gib = resident.growth_gib()
        with LiveBytes([t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]) as live:
            step()
    return {"total": live.peak.total / GIB, "resident_growth": resident_gib, "process_peak": process_peak_gib()}


# --- whole jobs under a cap ---------------------------------------------------------------------


def jobs_under_caps(shape: str, caps: list[float]) -> list[dict[str, Any]]:
    """learn, then synthesize with three boxes, as a user runs them; --vram-gib caps the allocator."""
    from scripts.make_random_sd import write_random_sd

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "sd"
        write_random_sd(shape, folder)
        for cap in caps:
            output = Path(scratch) / f"bundles_{cap}"
            common = ["--vram-gib", str(cap), "--json", "--output-dir", str(output)]
            learn = ["learn", "toy_car", "--model-path", str(folder), "--phase1-train-steps", "3", "--phase2-train-steps", "3",
                     "--num-class-images", "2"]  # fmt: skip
            place = ["synthesize", "toy_car", "--prompt", "a photo of <asset0> and <asset1> and <asset2>", "--steps", "5",
                     "--boxes", "[[0,0.3,0.3,0.8],[0.35,0.3,0.65,0.8],[0.7,0.3,1,0.8]]", "--output-path",
                     scratch + "/pictures", "--overwrite", "--model-path", str(folder)]  # fmt: skip
            for job in (learn, place):
                started = time.perf_counter()
                done = subprocess.run([sys.executable, "cli.py", *job, *common], capture_output=True, text=True, cwd=ROOT)
                result = json.loads(done.stdout) if done.returncode == 0 else {"message": done.stderr.strip()[-400:]}
                kept = {k: result[k] for k in ("peak_gib", "message") if k in result}
                rows.append({"job": job[0], "cap_gib": cap, "exit_status": done.returncode,
                             "seconds": round(time.perf_counter() - started, 1), **kept})  # fmt: skip
                print(record_text(rows[-1]), flush=True)
    return rows


def main(
    shape: str = "sd2.1",
    width_divisor: int = 1,
    resolution: int = 512,
    dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16; fp32 for --real, bf16 elsewhere by default.")] = "",
    real: Annotated[bool, typer.Option(help="Real steps on the CPU.")] = False,
    gpu: Annotated[bool, typer.Option(help="Real steps on the GPU, then whole jobs under caps.")] = False,
    caps: str = "12,8,6",
    phases: str = "phase1,phase2",
    name: str = "",
) -> None:
    """Writes scripts/results/<name>.json."""
    kind = "gpu" if gpu else "real" if real else "fake"
    dtype = dtype or ("fp32" if real else "bf16")
    model = Model(shape, json_text(shape_of(shape, width_divisor)))
    if kind == "real":
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(RETURN_AT_ONCE)  # glibc's; the processes that measure start with it
    rows = []
    for phase in phases.split(","):
        for checkpointing in (False, True):
            case = Case(phase, checkpointing, dtype, resolution)
            plan = planned(model, case)
            if kind == "fake":
                found = measured_on_fake_tensors(model, case)
            else:
                found = in_own_process(measured_for_real, shape, width_divisor, case, "cuda" if gpu else "cpu")
            off = 100 * (plan["total"] / found["total"] - 1)
            rows.append({"phase": phase, "gradient_checkpointing": checkpointing, "planned_gib": _rounded(plan),
                         "measured_gib": _rounded(found), "plan_off_percent": round(off, 1)})  # fmt: skip
            print(record_text(rows[-1]), flush=True)

    def measure(piece: str) -> float:
        if kind == "fake":
            return drawing_on_fake_tensors(model, piece, resolution, DTYPES[dtype])
        return float(in_own_process(measure_drawing.measured_for_real, shape, width_divisor, piece, resolution, 3,
                                    DTYPES[dtype], "cuda" if gpu else "cpu"))  # fmt: skip

    drawing = measure_drawing.rows(shape, width_divisor, resolution, DTYPES[dtype], measure)
    note = "random weights in Stable Diffusion's shape"
    numbers: dict[str, Any] = {"note": note, "kind": kind, "shape": shape, "width_divisor": width_divisor,
                               "resolution": resolution, "dtype": dtype, "steps": rows, "drawing": drawing}  # fmt: skip
    if gpu:
        numbers["jobs"] = jobs_under_caps(shape, [float(c) for c in caps.split(",")])
    else:
        numbers["gpu"] = "not measured"
    if kind == "real":
        numbers["malloc_mmap_threshold"] = RETURN_AT_ONCE
    print(write_result(name or f"memory_{kind}", numbers, "cuda" if gpu else "cpu"))


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {k: round(v, 4) for k, v in values.items()}


if __name__ == "__main__":
    typer.run(main)
