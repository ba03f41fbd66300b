"""The published way of doing it, written plainly, as what the bench compares with.

From the papers' description: attention materialized at every layer and all maps kept, guidance through the whole UNet with
both halves of classifier-free guidance, the whole embedding table in the optimizer and restored after each step, the VAE in
the training loop, the whole UNet and text encoder fine-tuned in phase 2. It shares this project's losses and masks, so that
both sides compute the same thing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mifo.attention.bounded import BoundedAttention, ForwardPass
from mifo.attention.sites import Processor, Site, attention_probabilities, attention_sites, choose_sites, use_processors
from mifo.config import LearnConfig, SynthesisConfig
from mifo.learning.losses import masked_diffusion_loss
from mifo.learning.objective import attention_loss, diffusion_target
from mifo.model.base import BaseModel
from mifo.model.lora import add_adapters
from mifo.model.prompt_embeds import PromptEmbeds, joined, predict
from mifo.prompts import tokenize_prompt
from mifo.sampling.denoise import denoise, initial_latents
from mifo.sampling.guidance import LatentGuidance, alpha_schedule, step_size


class PublishedProcessor(Processor):
    """Materializes its map, always, and keeps it."""

    def __init__(self, site: Site, kept: dict[str, torch.Tensor], control: BoundedAttention | None = None):
        super().__init__()
        self.site, self.kept, self.control = site, kept, control

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        visible = self.control.visible(self.site) if self.control else None
        if visible is not None and self.site.is_cross and self.control and len(visible) < len(query):
            visible = torch.cat([torch.ones_like(visible), visible])  # a guidance pass: the unconditional half runs beside it
        probabilities = attention_probabilities(query, key, scale, visible)
        self.kept[self.site.name] = probabilities
        return probabilities.to(value.dtype) @ value


def published_attention(base: BaseModel, kept: dict[str, torch.Tensor], control: BoundedAttention | None = None) -> Any:
    """Lends the processors; a context manager."""
    return use_processors(base.unet, {s.name: PublishedProcessor(s, kept, control) for s in attention_sites(base.unet)})


# --- diffusers' own script ----------------------------------------------------------------------


class DreamBoothLora:
    """One step of diffusers' `train_dreambooth_lora.py` (and `_sdxl.py`) with `--train_text_encoder` and
    `--with_prior_preservation`, written again: the photo and a class picture are encoded by the VAE in every step and go
    through the UNet together; the loss covers both, whole; plain AdamW on LoRA. It learns one thing and looks at no attention.
    """

    def __init__(self, base: BaseModel, pixels: torch.Tensor, prompts: list[list[int]], rank: int):
        """`pixels` (1, 3, H, W) in [-1, 1] stands for the class picture too. `prompts`: token ids of both."""
        self.base, self.ids = base, torch.tensor(prompts)
        self.pixels = torch.cat([pixels, pixels.flip(-1)])
        adapters = add_adapters(base, rank, True)
        self.parameters = [p for adapter in adapters.values() for p in adapter.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def step(self) -> None:
        mean, deviation = self.base.encode(self.pixels)
        latents = mean + deviation * torch.randn_like(mean)
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        noisy = self.base.scheduler.add_noise(latents, noise, timesteps)
        prediction = predict(self.base.unet, noisy, timesteps, self.base.encode_prompt(self.ids)).float()
        target = diffusion_target(self.base.scheduler, latents, noise, timesteps)
        loss = F.mse_loss(prediction[:1], target[:1]) + F.mse_loss(prediction[1:], target[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


# --- drawing ------------------------------------------------------------------------------------


def guidance_gradient(base: BaseModel, guidance: LatentGuidance, prompt_embeds: PromptEmbeds, negative: PromptEmbeds,
                      latents: torch.Tensor, timestep: torch.Tensor, step: int = 0) -> torch.Tensor:  # fmt: skip
    """One guidance pass and its gradient, (B, C, h, w): both halves through the whole UNet, every map kept."""
    control = guidance.control
    kept: dict[str, torch.Tensor] = {}
    latents = latents.detach().requires_grad_(True)
    control.begin(ForwardPass(len(latents), unconditional=False, guiding=True))
    with torch.enable_grad(), published_attention(base, kept, control):
        context = joined([negative.expand(len(latents)), prompt_embeds.expand(len(latents))])
        predict(base.unet, torch.cat([latents, latents]), timestep, context)
        maps = {s.name: kept[s.name][len(latents) :] for s in guidance.sites}
        config = guidance.config
        alpha = alpha_schedule(step, config.steps)
        loss: Any = sum(
            weight * guidance._kind_loss(maps, [s for s in guidance.sites if s.is_cross == is_cross], alpha)
            for weight, is_cross in ((config.cross_weight, True), (config.self_weight, False))
        )
        (gradient,) = torch.autograd.grad(loss.sum(), latents)
    control.end()
    return gradient


def synthesize(base: BaseModel, prompt: Any, guidance: LatentGuidance, config: SynthesisConfig, latent_size: tuple[int, int],
               seed: int) -> torch.Tensor:  # fmt: skip
    """The whole picture, (1, 3, H, W); every guided step makes all its iterations."""
    ids = torch.tensor([prompt.input_ids, tokenize_prompt(base.tokenizer, "", []).input_ids])
    with torch.no_grad():
        both = base.encode_prompt(ids)
    prompt_embeds, negative = both[:1], both[1:]
    latents = initial_latents((int(base.unet.config["in_channels"]), *latent_size), seed, 1, base.device)

    def before(step: int, timestep: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        if step < config.guidance.steps:
            for _ in range(config.guidance.max_iterations):
                gradient = guidance_gradient(base, guidance, prompt_embeds, negative, now, timestep, step)
                now = now - step_size(step, config.guidance) * gradient
        return now

    kept: dict[str, torch.Tensor] = {}
    with published_attention(base, kept, guidance.control):
        sampler = base.sampler(config.scheduler, config.timestep_spacing)
        latents = denoise(base.unet, sampler, latents, prompt_embeds, negative, config.steps,
                          config.guidance_scale, before)  # fmt: skip
    with torch.no_grad():
        return base.decode(latents)


# --- learning -----------------------------------------------------------------------------------


class PublishedTrainer:
    """One phase's steps. `pixels` (1, 3, H, W) in [-1, 1], with its masks; phase 2 has the prior's picture before it."""

    def __init__(self, base: BaseModel, data: Any, pixels: torch.Tensor, config: LearnConfig, prompt: Any, ids: list[int],
                 full: bool):  # fmt: skip
        self.base, self.data, self.pixels, self.config, self.prompt, self.full = base, data, pixels, config, prompt, full
        self.phase = config.lora if full else config.embedding
        base.text_encoder.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        self.table = base.text_encoder.get_input_embeddings().weight
        self.original, self.ids = self.table.detach().clone(), ids
        trained = [self.table]
        if full:
            trained += [p for part in (base.unet, base.text_encoder) for p in part.parameters() if p is not self.table]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.optimizer = self._optimizer(trained)
        self.sites = choose_sites(base.unet, self.phase.attention.blocks, self.phase.attention.levels)
        self.generator = torch.Generator().manual_seed(0)

    def _optimizer(self, trained: list[torch.Tensor]) -> torch.optim.Optimizer:
        rate = 2e-6 if self.full else self.phase.learning_rate
        if self.full and self.base.device.type == "cuda":
            from bitsandbytes.optim import AdamW8bit

            small: torch.optim.Optimizer = AdamW8bit(trained, lr=rate, betas=self.config.adam_betas)
            return small
        return torch.optim.AdamW(trained, lr=rate, betas=self.config.adam_betas)

    def step(self, batch: Any) -> float:
        base, rows = self.base, 2 if self.full else 1
        with torch.no_grad():
            posterior = base.vae.encode(self.pixels.expand(rows, -1, -1, -1).to(base.dtype)).latent_dist
            latents = posterior.sample().float() * base.vae.config["scaling_factor"]
        timesteps = torch.randint(0, 500, (rows,), generator=self.generator).to(base.device)
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        kept: dict[str, torch.Tensor] = {}
        with published_attention(base, kept):
            prompt_embeds = base.encode_prompt(torch.tensor([self.prompt.input_ids] * rows))
            noisy = base.scheduler.add_noise(latents, noise, timesteps)
            prediction = predict(base.unet, noisy, timesteps, prompt_embeds)
        maps = {name: found.mean(1) for name, found in kept.items()}
        target = diffusion_target(base.scheduler, latents, noise, timesteps)
        loss = masked_diffusion_loss(prediction[-1:], target[-1:], batch.union_mask)
        loss = loss + attention_loss(maps, self.sites, self.phase.attention, batch, self.prompt.asset_positions, timesteps,
                                     rows - 1, 0, (latents.shape[-2], latents.shape[-1]))  # fmt: skip
        if self.full:
            loss = loss + F.mse_loss(prediction[:1].float(), target[:1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # only the assets' rows may change
            untouched = torch.ones(len(self.table), dtype=torch.bool, device=self.table.device)
            untouched[self.ids] = False
            self.table[untouched] = self.original[untouched]
        return float(loss.detach())
