"""One denoising loop: classifier-free guidance, any scheduler that keeps latents at unit scale, hooks around each step.

Knows latents, states and a scheduler. Knows nothing of assets or boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel, UniPCMultistepScheduler

from .errors import InputError

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}
#: (step index, timestep, latents (B, C, h, w)) -> latents
StepHook = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def make_scheduler(name: str, training_scheduler: DDIMScheduler) -> Any:
    """A sampler on the base model's own noise schedule and prediction type."""
    if name not in SCHEDULERS:
        raise InputError(f"scheduler '{name}' is not known; choose one of {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name].from_config(training_scheduler.config)


def initial_latents(shape: tuple[int, int, int], seed: int, count: int, device: torch.device | str) -> torch.Tensor:
    """(count, C, h, w) fp32 noise; picture k depends on `seed + k` alone, whatever the batch size or device."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + k)) for k in range(count)]
    return torch.stack(rows).to(device)


@torch.no_grad()
def denoise(unet: UNet2DConditionModel, scheduler: Any, latents: torch.Tensor, states: torch.Tensor,
            negative_states: torch.Tensor, steps: int, guidance_scale: float, before_step: StepHook | None = None,
            after_step: StepHook | None = None,
            on_progress: Callable[[int, int], None] | None = None, first_step: int = 0) -> torch.Tensor:  # fmt: skip
    """Runs `latents` (B, C, h, w) from noise to a picture's latents.

    `states`, `negative_states`: (1 or B, L, D). The UNet's batch is [unconditional, conditional]; at guidance scale 1 it
    is the conditional half alone. With `first_step` the schedule begins there, at `latents` of that step's noise level;
    the hooks count steps from it.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    count = len(latents)
    guided = guidance_scale != 1.0
    context = states.expand(count, -1, -1)
    if guided:
        context = torch.cat([negative_states.expand(count, -1, -1), context])
    timesteps = scheduler.timesteps[first_step:]
    if first_step and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first_step)
    for index, timestep in enumerate(timesteps):
        if before_step:
            latents = before_step(index, timestep, latents)
        inputs = torch.cat([latents, latents]) if guided else latents
        noise_pred = unet(inputs.to(unet.dtype), timestep, context).sample.float()
        if guided:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(noise_pred, timestep, latents).prev_sample
        if after_step:
            latents = after_step(index, timestep, latents)
        if on_progress:
            on_progress(index + 1, len(timesteps))
    return latents
