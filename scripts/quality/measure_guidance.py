"""Box guidance with the published code's numbers against those before, on the embedded model.

    python -m scripts.quality.measure_guidance --bundle Model_ours/toy_car

Published: the background weighs 0.55, 0.40, 0.25, 0.10 in the first steps, step sizes end at 2.4, and each picture moves at least
once a step. Before: 0.40, 0.30, 0.20, 0.10 (the paper's text), 2.0, and no move below the threshold. The same seeds for both, by
the judge: three look-alike cars, each in its box.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

import mifo.sampling.guidance
from mifo.bundle.store import attach, load_bundle
from mifo.config import SynthesisConfig
from mifo.io.json_text import record_text
from mifo.model.load_base import load_base_model
from mifo.presets import synthesis_preset
from mifo.sampling.guidance import LatentGuidance, step_size
from mifo.toybox.judge import load_judge
from scripts.quality.measure_main_job import load_things, measure_boxes
from scripts.record import write_result

ROOT = Path(__file__).resolve().parents[2]


@torch.enable_grad()
def guide_before(self: LatentGuidance, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """As it was: a picture whose loss is below the threshold does not move."""
    if not self.config.enabled or step >= self.config.steps:
        return latents
    for iteration in range(self.config.max_iterations):
        latents = latents.detach().requires_grad_(True)
        losses = self.losses(step, timestep, latents)
        normalized = losses.detach() / len(self.control.layout)
        self.history.append((step, iteration, float(normalized.mean())))
        active = normalized >= self.config.loss_threshold
        if not active.any():
            break
        (gradient,) = torch.autograd.grad(losses.sum(), latents)
        latents = latents - step_size(step, self.config) * gradient * active[:, None, None, None]
    return latents.detach()


@contextmanager
def numbers_before() -> Iterator[SynthesisConfig]:
    """The former numbers and loop for as long as the block lasts."""
    alpha, guide = mifo.sampling.guidance.alpha_schedule, LatentGuidance.guide

    def alpha_before(step: int, guidance_steps: int = 15) -> float:
        return 0.4 - 0.1 * step if step < 3 else alpha(step, guidance_steps)

    mifo.sampling.guidance.alpha_schedule = alpha_before
    LatentGuidance.guide = guide_before  # type: ignore[method-assign]
    config = synthesis_preset("toybox")
    try:
        yield replace(config, guidance=replace(config.guidance, step_size_end=2.0))
    finally:
        mifo.sampling.guidance.alpha_schedule, LatentGuidance.guide = alpha, guide  # type: ignore[method-assign]


def main(bundle: Annotated[Path, typer.Option()], images: int = 24, name: str = "guidance_numbers") -> None:
    """Measures and writes scripts/results/<name>.json."""
    base, judge, things = load_base_model("toybox"), load_judge(), load_things(ROOT / "example" / "toy_car")
    learned = load_bundle(bundle)
    with attach(base, learned):
        published, _ = measure_boxes(base, learned, things, judge, synthesis_preset("toybox"), images)
        with numbers_before() as config:
            before, _ = measure_boxes(base, learned, things, judge, config, images)
    print(record_text({"published": published, "before": before}, indent=1))
    print(write_result(name, {"images": images, "published": published, "before": before}))


if __name__ == "__main__":
    typer.run(main)
