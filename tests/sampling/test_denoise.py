"""The denoising loop: classifier-free guidance, schedulers, seeds and hooks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mifo.errors import InputError
from mifo.model.base import BaseModel
from mifo.model.prompt_embeds import PromptEmbeds, joined
from mifo.model.samplers import SCHEDULERS, make_scheduler
from mifo.sampling.denoise import denoise, initial_latents

LENGTH = 5


def states_of(base: BaseModel, seed: int = 1) -> tuple[PromptEmbeds, PromptEmbeds]:
    """A prompt's and a negative prompt's embeds, one row each."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 1, LENGTH, base.unet.config["cross_attention_dim"], generator=generator)
    return PromptEmbeds(states[0]), PromptEmbeds(states[1])


def noise_of(base: BaseModel, seed: int = 0, count: int = 1) -> torch.Tensor:
    return initial_latents((base.unet.config["in_channels"], 16, 16), seed, count, "cpu")


def test_guidance_combines_both_halves_as_if_each_ran_alone(toybox_random_base: BaseModel) -> None:
    base, (states, negative) = toybox_random_base, states_of(toybox_random_base)
    found = denoise(base.unet, make_scheduler("ddim", base.scheduler), noise_of(base, count=2), states, negative, 3, 4.0)
    scheduler = make_scheduler("ddim", base.scheduler)
    scheduler.set_timesteps(3)
    latents = noise_of(base, count=2)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            rows = []
            for row in latents:
                without = base.unet(row[None], timestep, negative.states).sample
                with_prompt = base.unet(row[None], timestep, states.states).sample
                rows.append(without + 4.0 * (with_prompt - without))
            latents = scheduler.step(torch.cat(rows), timestep, latents).prev_sample
    # fp32 rounding in batches of another size, through three steps and a guidance of 4
    torch.testing.assert_close(found, latents, rtol=1e-4, atol=1e-4)


def test_guidance_scale_1_runs_half_the_batch_and_ignores_the_negative_prompt(toybox_random_base: BaseModel) -> None:
    base, (states, negative), batches = toybox_random_base, states_of(toybox_random_base), []
    hook = base.unet.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    results = [
        denoise(base.unet, make_scheduler("ddim", base.scheduler), noise_of(base, count=3), states, other, 2, scale)
        for scale in (1.0, 2.0) for other in (negative, PromptEmbeds(5 * negative.states))
    ]
    hook.remove()
    assert batches == [3, 3] * 2 + [6, 6] * 2
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[2], results[3])


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_gives_finite_latents_on_both_kinds_of_model(any_base: BaseModel, name: str) -> None:
    # the toybox predicts v down to zero signal, where the step from pure noise divides by zero if done carelessly
    config = any_base.scheduler.config
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) in (("v_prediction", True), ("epsilon", False))
    scheduler = make_scheduler(name, any_base.scheduler)
    assert scheduler.config["prediction_type"] == config["prediction_type"]
    latents = denoise(any_base.unet, scheduler, noise_of(any_base), *states_of(any_base), 3, 3.0)
    assert latents.isfinite().all()
    assert latents.dtype == torch.float32


class Oracle:
    """Knows the clean latents, and predicts exactly what leads to them, in the model's own terms."""

    conv_in = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, clean: torch.Tensor, scheduler: Any):
        self.clean, self.kind = clean, scheduler.config["prediction_type"]
        self.signal = scheduler.alphas_cumprod  # share of the signal's power at each timestep

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor, **conditions: Any) -> SimpleNamespace:
        signal = self.signal[int(timestep)]
        noise = (latents - signal.sqrt() * self.clean) / (1 - signal).sqrt()
        velocity = signal.sqrt() * noise - (1 - signal).sqrt() * self.clean
        return SimpleNamespace(sample=noise if self.kind == "epsilon" else velocity)


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_every_scheduler_ends_at_what_the_model_sees(any_base: BaseModel, name: str) -> None:
    torch.manual_seed(8)
    clean = torch.randn(1, any_base.unet.config["in_channels"], 16, 16)
    oracle, states = Oracle(clean, any_base.scheduler), PromptEmbeds(torch.zeros(1, 1, 1))
    found = denoise(oracle, make_scheduler(name, any_base.scheduler), noise_of(any_base), states, states, 8, 1.0)  # type: ignore[arg-type]
    # Stable Diffusion's DDIM stops at the noise of timestep 0, sqrt(1 - 0.99915) = 0.03 of a unit; five sigmas of it
    assert (found - clean).abs().max() < 0.15, f"off by {(found - clean).abs().max():.3f}"


def test_an_unknown_scheduler_is_refused_with_the_known_ones(toybox_random_base: BaseModel) -> None:
    with pytest.raises(InputError, match=r"'lms' is not known; choose one of ddim, dpm, unipc, euler, own"):
        make_scheduler("lms", toybox_random_base.scheduler)


def test_the_noise_of_picture_k_depends_on_seed_plus_k_alone() -> None:
    batch = initial_latents((4, 3, 5), seed=10, count=4, device="cpu")
    assert batch.shape == (4, 4, 3, 5)
    for k in range(4):
        assert torch.equal(batch[k], initial_latents((4, 3, 5), seed=10 + k, count=1, device="cpu")[0])
    assert len({row.sum().item() for row in batch}) == 4


def test_picture_k_of_a_batch_equals_its_seed_alone(any_base: BaseModel) -> None:
    states = states_of(any_base)
    batch = denoise(any_base.unet, make_scheduler("ddim", any_base.scheduler), noise_of(any_base, 5, 2), *states, 2, 3.0)
    alone = denoise(any_base.unet, make_scheduler("ddim", any_base.scheduler), noise_of(any_base, 6, 1), *states, 2, 3.0)
    torch.testing.assert_close(batch[1:], alone, rtol=1e-4, atol=1e-4)  # fp32 rounding in batches of another size
    assert not torch.allclose(batch[0], batch[1], atol=0.1)


def test_each_picture_may_have_a_prompt_of_its_own(toybox_random_base: BaseModel) -> None:
    base, (first, negative), (second, _) = toybox_random_base, states_of(toybox_random_base), states_of(toybox_random_base, 2)
    noise = noise_of(base, count=2)
    both = denoise(base.unet, make_scheduler("ddim", base.scheduler), noise, joined([first, second]), negative, 2, 3.0)
    alone = denoise(base.unet, make_scheduler("ddim", base.scheduler), noise[1:], second, negative, 2, 3.0)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_hooks_see_every_step_and_their_latents_are_taken(toybox_random_base: BaseModel) -> None:
    base, seen, progress = toybox_random_base, [], []
    scheduler = make_scheduler("ddim", base.scheduler)
    marked = torch.full((1, base.unet.config["in_channels"], 16, 16), 0.25)

    def before(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        seen.append(("before", step, int(timestep)))
        return marked

    def after(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        seen.append(("after", step, int(timestep)))
        return latents + 100

    inputs = []
    hook = base.unet.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    found = denoise(base.unet, scheduler, noise_of(base), *states_of(base), 2, 1.0, before, after,
                    lambda k, n: progress.append((k, n)))  # fmt: skip
    hook.remove()
    first, last = (int(t) for t in scheduler.timesteps)
    assert seen == [("before", 0, first), ("after", 0, first), ("before", 1, last), ("after", 1, last)]
    assert all(torch.equal(latents, marked) for latents in inputs)
    assert found.min() > 50
    assert progress == [(1, 2), (2, 2)]
