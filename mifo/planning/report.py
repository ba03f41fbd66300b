"""A plan in words and as plain data; and a plan applied."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..model.peak_memory import limit_memory
from .planner import GIB, ITEMS, MEMORY_OPTIONS, RESERVE, Plan

ALWAYS = "fused attention, latents encoded once, rows instead of the embedding table"


def plan_facts(plan: Plan) -> dict[str, Any]:
    """For JSON; GiB of 2**30 bytes."""
    s = plan.settings
    return {
        "job": s.job,
        "model": plan.model,
        "resolution": s.resolution,
        "dtype": str(s.dtype).removeprefix("torch."),
        "assets": s.assets,
        "attention_backend": s.backend,
        "phases": {p.name: {"peak_gib": _gib(p.peak), "items_gib": {k: _gib(v) for k, v in p.items.items() if v}}
                   for p in plan.phases},
        "peak_gib": _gib(plan.largest.peak),
        "peak_phase": plan.largest.name,
        "reserve_gib": _gib(RESERVE),
        "vram_gib": None if plan.budget is None else _gib(plan.budget),
        "fits": plan.fits,
        "given_up": list(plan.given_up),
        "tried": [{"option": name, "cost": cost, "peak_gib": _gib(peak)} for name, cost, peak in plan.tried],
        "memory": asdict(s.memory),
        "gradient_checkpointing": s.learn.gradient_checkpointing,
    }  # fmt: skip


def plan_text(plan: Plan) -> str:
    """A table of items and phases, then what is given up."""
    s = plan.settings
    dtype = str(s.dtype).removeprefix("torch.")
    lines = [
        f"{s.job} with {plan.model} at {s.resolution}x{s.resolution}, {s.assets} assets, {dtype}; GiB",
        "",
        _row("", [p.name for p in plan.phases]),
    ]
    for item in ITEMS:
        values = [p.items.get(item, 0) for p in plan.phases]
        if any(values):
            lines.append(_row(item, [f"{v / GIB:.3f}" for v in values]))
    lines += [_row("peak", [f"{p.peak / GIB:.3f}" for p in plan.phases]), "", f"always on: {ALWAYS}"]
    if plan.budget is None:
        lines += [f"  + {name}: peak {peak / GIB:.2f} GiB; costs {cost}" for name, cost, peak in plan.tried]
        lines.append("give --vram-gib to have what is needed turned on, the cheapest first")
    else:
        on = ", ".join(plan.given_up) or "nothing"
        lines.append(f"turned on for {plan.budget / GIB:.2f} GiB: {on}")
        costs = {k.name: k.cost for k in MEMORY_OPTIONS[s.job]}
        lines += [f"  {name}: costs {costs[name]}" for name in plan.given_up]
    lines.append(f"largest: {plan.largest.name}, {plan.largest.peak / GIB:.2f} GiB; {RESERVE / GIB:.2f} GiB more are kept for "
                 "the driver and libraries")  # fmt: skip
    return "\n".join(lines)


def limit_gpu(plan: Plan, device: str) -> None:
    """Makes the budget binding: PyTorch's allocator refuses what goes beyond it. No effect on a CPU."""
    if plan.budget is None or not device.startswith("cuda"):
        return
    limit_memory(device, plan.budget - RESERVE)


def _row(label: str, cells: list[str]) -> str:
    return f"{label:26}" + "".join(f"{c:>19}" for c in cells)


def _gib(size: int) -> float:
    return round(size / GIB, 4)
