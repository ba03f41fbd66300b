"""One denoising loop: classifier-free guidance, any sampler of `samplers`, hooks around each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler, UNet2DConditionModel, UniPCMultistepScheduler

from ..model.prompt_embeds import PromptEmbeds, joined, predict

#: (step index, timestep, latents (B, C, h, w) as the UNet is given them) -> latents
StepHook = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
#: (latents (B, C, h, w) as the UNet is given them, timestep, its conditional prediction) -> what is added to the noise
NoiseHook = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def initial_latents(shape: tuple[int, int, int], seed: int, count: int, device: torch.device | str) -> torch.Tensor:
    """(count, C, h, w) fp32 noise; picture k depends on `seed + k` alone, whatever the batch size or device."""
    return seeded_noise(shape, seed, count, device)[0]


def seeded_noise(shape: tuple[int, int, int], seed: int, count: int,
                 device: torch.device | str) -> tuple[torch.Tensor, list[torch.Generator]]:  # fmt: skip
    """`initial_latents`, and each picture's generator, from which a sampler that adds noise draws on."""
    generators = [torch.Generator().manual_seed(seed + k) for k in range(count)]
    rows = [torch.randn(shape, generator=generator) for generator in generators]
    return torch.stack(rows).to(device), generators


def is_guided(guidance_scale: float) -> bool:
    """Whether there is classifier-free guidance: above a scale of 1, as in diffusers' pipelines; few-step checkpoints have 0."""
    return guidance_scale > 1.0


@torch.no_grad()
def denoise(unet: UNet2DConditionModel, scheduler: Any, latents: torch.Tensor, prompt_embeds: PromptEmbeds,
            negative_prompt_embeds: PromptEmbeds, steps: int, guidance_scale: float, before_step: StepHook | None = None,
            after_step: StepHook | None = None, on_progress: Callable[[int, int], None] | None = None, first_step: int = 0,
            generators: Sequence[torch.Generator] = (), add_noise: NoiseHook | None = None) -> torch.Tensor:  # fmt: skip
    """Runs `latents` (B, C, h, w) from noise of unit variance to a picture's latents.

    `prompt_embeds`, `negative_prompt_embeds`: 1 row or B. The UNet's batch is [unconditional, conditional]; where
    `is_guided` says no it is the conditional half alone. With `first_step` the schedule begins there, at `latents` of that
    step's noise level; the hooks count steps from it. `generators`: one a picture, for samplers that add noise at each step.
    `add_noise` has its say at each call of the UNet, after classifier-free guidance.

    The hooks see latents at the scale at which the UNet does, and what they change reaches the picture with every sampler. A
    step that takes several calls of the UNet (Heun's, PNDM's first) has its hooks before the first and after the last.
    """
    scheduler.set_timesteps(steps, device=latents.device)
    timesteps = scheduler.timesteps[first_step:]
    if first_step and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first_step)
    elif not first_step:
        latents = latents * scheduler.init_noise_sigma
    guided = is_guided(guidance_scale)
    context = prompt_embeds.expand(len(latents))
    if guided:
        context = joined([negative_prompt_embeds.expand(len(latents)), context])
    extra = {"generator": list(generators)} if generators and "generator" in inspect.signature(scheduler.step).parameters else {}
    index, returned = 0, latents
    for call, timestep in enumerate(timesteps):
        if before_step and not within_step(scheduler):
            latents = _apply(before_step, scheduler, index, timestep, latents)
        if call and latents is not returned:
            tell_moved(scheduler, latents - returned)
        scaled = scheduler.scale_model_input(latents, timestep)
        noise_pred = predict(unet, torch.cat([scaled, scaled]) if guided else scaled, timestep, context).float()
        conditional = noise_pred
        if guided:
            unconditional, conditional = noise_pred.chunk(2)
            noise_pred = unconditional + guidance_scale * (conditional - unconditional)
        if add_noise:
            noise_pred = noise_pred + add_noise(scaled, timestep, conditional)
        latents = returned = scheduler.step(noise_pred, timestep, latents, **extra).prev_sample
        if call + 1 == len(timesteps) or not within_step(scheduler):
            if after_step:
                latents = _apply(after_step, scheduler, index, timestep, latents)
            index += 1
        if on_progress:
            on_progress(call + 1, len(timesteps))
    return latents


def _apply(hook: StepHook, scheduler: Any, index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """A hook on latents that some samplers keep at the scale of the noise (Euler, LMS, Heun), not at the UNet's."""
    scale = float(scheduler.scale_model_input(torch.ones((), device=latents.device), timestep))
    if scale == 1.0:
        return hook(index, timestep, latents)
    seen = latents * scale
    moved = hook(index, timestep, seen)
    return latents if moved is seen else moved / scale


def within_step(scheduler: Any) -> bool:
    """True where the next call goes on with a step that is half done, from latents that the sampler has kept itself."""
    if isinstance(scheduler, HeunDiscreteScheduler):
        return not scheduler.state_in_first_order
    if isinstance(scheduler, PNDMScheduler):
        if scheduler.config["skip_prk_steps"]:
            return bool(scheduler.counter == 1)
        return bool(scheduler.counter < len(scheduler.prk_timesteps) and scheduler.counter % 4 != 0)
    return False


def tell_moved(scheduler: Any, change: torch.Tensor) -> None:
    """The latents (B, C, h, w) were moved by `change` since the sampler's last step.

    UniPC corrects its last step before it takes the next, and starts again from where that one began (Zhao et al., arXiv
    2302.04867, UniC): what has been moved since would be lost. Its start is moved by as much as arrives as `change`.
    """
    if not isinstance(scheduler, UniPCMultistepScheduler) or scheduler.last_sample is None:
        return
    step = scheduler.step_index
    now, start = (scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[k]) for k in (step, step - 1))  # (alpha, sigma) each
    kept = 1 if scheduler.predict_x0 else 0  # the share of the start that a step keeps: the ratio of sigmas, or of alphas
    factor = (start[kept] / now[kept]).to(change)
    scheduler.last_sample = scheduler.last_sample + factor * change
