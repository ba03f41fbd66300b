"""What the planner predicts for the memory goals on the shapes of Stable Diffusion 2.1 and XL, and how memory grows.

    python -m scripts.performance.plan_goals          a few minutes on a CPU; no weights, no GPU
    python -m scripts.performance.plan_goals --shape sdxl

How true the predictions are is measured by measure_memory.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import typer

from mifo.config import MemoryConfig
from mifo.io.json_text import record_text
from mifo.planning.planner import GIB, Settings, make_plan, phases_of, read_model
from mifo.planning.report import plan_facts
from mifo.presets import learn_preset, synthesis_preset
from scripts.record import write_result

FAMILY = "stable-diffusion"
LEARN = Settings("learn", 512, torch.bfloat16, learn_preset(FAMILY), synthesis_preset(FAMILY), assets=3)
DRAW = replace(LEARN, job="synthesize")
NF4 = replace(LEARN, memory=MemoryConfig(nf4=True))
#: (goal, settings before anything is given up, GiB that it has to stay within)
GOALS = (
    ("learn, LoRA of rank 16 on UNet and text encoder, prior preservation", LEARN, 6.0),
    ("the same on an NF4 base", NF4, 4.0),
    ("synthesize, 3 boxes, guidance", DRAW, 6.0),
)
XL = replace(LEARN, resolution=1024, learn=learn_preset("sdxl"), synthesis=synthesis_preset("sdxl"))
XL_GOALS = (
    ("learn at 1024 pixels, LoRA of rank 16 on UNet and both text encoders, prior preservation", XL, 12.0),
    ("the same on an 8 GiB card", XL, 8.0),
    ("synthesize at 1024 pixels, 3 boxes, guidance", replace(XL, job="synthesize"), 10.0),
)
#: what growth is shown for: nothing given up, and what a small GPU gives up
SMALL = replace(LEARN, learn=replace(LEARN.learn, gradient_checkpointing=True), memory=MemoryConfig(True, False, False, 1))
GROWING = {
    "learn": LEARN,
    "learn, checkpointing, VAE moved, prior one by one": SMALL,
    "synthesize": DRAW,
    "synthesize, VAE moved and tiled": replace(DRAW, memory=MemoryConfig(vae_on_cpu=True, tiled_vae=True)),
}


def main(shape: str = "sd2.1") -> None:
    """Writes scripts/results/memory_goals.json, or memory_goals_sdxl.json."""
    model = read_model(shape)
    if shape == "sdxl":
        numbers = {"note": "predicted, not measured; bf16, batch 1", "shape": shape, "resolution": 1024,
                   "goals": _goals(model, XL_GOALS)}  # fmt: skip
        print(write_result("memory_goals_sdxl", numbers))
        return
    goals = _goals(model, GOALS)
    rows = []
    for over, values in (("assets", (1, 2, 4, 8)), ("resolution", (256, 512, 768, 1024))):
        for value in values:
            change: dict[str, Any] = {over: value}
            found = {label: _peak(model, replace(s, **change)) for label, s in GROWING.items()}
            rows.append({"over": over, "value": value, "peak_gib": found})
            print(record_text(rows[-1]), flush=True)
    numbers = {"note": "predicted, not measured; bf16, batch 1", "shape": shape, "resolution": 512,
               "goals": goals, "growth": rows}  # fmt: skip
    print(write_result("memory_goals", numbers))


def _goals(model: Any, wanted: Any) -> list[dict[str, Any]]:
    goals = []
    for goal, settings, budget in wanted:
        free = max(p.peak for p in phases_of(model, settings))
        plan = plan_facts(make_plan(model, settings, budget))
        kept = {k: plan[k] for k in ("peak_gib", "peak_phase", "reserve_gib", "fits", "given_up", "tried", "phases")}
        goals.append({"goal": goal, "goal_gib": budget, "with_nothing_given_up_gib": round(free / GIB, 3), **kept})
        print(record_text({k: v for k, v in goals[-1].items() if k != "phases"}), flush=True)
    return goals


def _peak(model: Any, settings: Settings) -> dict[str, Any]:
    largest = max(phases_of(model, settings), key=lambda p: p.peak)
    return {"gib": round(largest.peak / GIB, 3), "phase": largest.name}


if __name__ == "__main__":
    typer.run(main)
