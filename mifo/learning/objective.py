"""What one training step minimizes: the masked diffusion loss, the attention loss, prior preservation and locality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..attention.record import AttentionRecorder, token_maps
from ..attention.sites import Site
from ..config import AttentionTerms, EmbeddingPhase, LearnConfig, LoraPhase, Timesteps
from ..data.mask_sizes import mask_at_map
from ..errors import InputError
from ..model.base import BaseModel
from ..model.prompt_embeds import ImageSize, joined, predict
from ..prompts import TokenizedPrompt, tokenize_prompt
from .dataset import Batch, InstanceData
from .losses import masked_diffusion_loss, match_loss, penalty_loss, relative_penalty_loss, reward_loss, separation_loss
from .prior import PriorData


@dataclass
class StepLosses:
    """The parts of one step's loss, weighted as they are added up."""

    diffusion: torch.Tensor
    attention: torch.Tensor
    prior: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        return self.diffusion + self.attention + self.prior

    def as_floats(self) -> dict[str, float]:
        return {k: float(getattr(self, k).detach()) for k in ("diffusion", "attention", "prior")}


FILLED_FROM = 500
"""The timestep from which a place that was filled in counts."""

PARTS = 2
"""Of a step's draws at least, for a model so small that threads within an operation gain nothing. A constant, because sums of
other parts round otherwise: the same run gives the same bytes on any number of cores."""


@dataclass(frozen=True)
class Draws:
    """What was drawn for one of a step's pictures: the prior image first, if there is one, then the picture's draws."""

    own: slice
    """Of the step's draws, those of this picture"""
    batch: Batch
    prompts: list[TokenizedPrompt]
    """Of the prior image, if there is one, and of the batch"""
    latents: torch.Tensor
    """(B, C, h, w), scaled, without noise"""
    timesteps: torch.Tensor
    """(B,)"""
    noise: torch.Tensor
    """(B, C, h, w)"""


DrawsPart = tuple[Draws, slice]
"""Some of a picture's draws, counted within them"""


@dataclass
class Objective:
    """Draws a batch and computes its losses (MIFO, arXiv 2511.00542, section 3; Break-A-Scene, arXiv 2305.16311, section 3).

    `rng` chooses assets and views, `generator` noise and timesteps: both are the run's own, and a checkpoint holds their state.
    """

    base: BaseModel
    data: InstanceData
    config: LearnConfig
    rng: np.random.Generator
    generator: torch.Generator

    def losses(self, phase: EmbeddingPhase | LoraPhase, step: int, sites: Sequence[Site], recorder: AttentionRecorder,
               prior: PriorData | None, mine: slice | None = None) -> StepLosses:  # fmt: skip
        """One step's losses with their graph. With a `prior` its image goes through the UNet beside the instance's draws.

        `mine`: this process's own of the draws; the losses are then its part of the step's, and whoever has the last draw has the
        prior image too.
        """
        parts = parts_of(self.draw(phase, step, prior), mine or slice(0, phase.draws))
        return added([self.part(part, phase, step, sites, recorder) for part in parts])

    def part(self, part: DrawsPart, phase: EmbeddingPhase | LoraPhase, step: int, sites: Sequence[Site],
             recorder: AttentionRecorder) -> StepLosses:  # fmt: skip
        """What some of a step's draws add to its losses; the prior image goes with a picture's last ones."""
        drawn, rows = part
        last = rows.stop == drawn.own.stop - drawn.own.start
        found = self.compute(drawn, phase, step, sites, recorder, rows, with_prior=last)
        share = (rows.stop - rows.start) / phase.draws
        return found if share == 1 else StepLosses(found.diffusion * share, found.attention * share, found.prior)

    def draw(self, phase: EmbeddingPhase | LoraPhase, step: int, prior: PriorData | None,
             apply: Callable[..., Iterable[Draws]] = map) -> list[Draws]:  # fmt: skip
        """All that is random in a step, by picture; the prior image, if this step has one, goes with the last picture.

        `apply`: `map`, or an executor's, which encodes the pictures side by side.
        """
        pictures, every = self.config.pictures, self.config.prior.every_steps
        ends = [phase.draws * k // pictures for k in range(pictures + 1)]
        with_prior = prior if step % every == 0 else None
        drawn = [self.draw_picture(phase, slice(start, stop), with_prior if stop == phase.draws else None, step // every)
                 for start, stop in pairwise(ends)]  # fmt: skip
        return list(apply(lambda encode: encode(), drawn))

    def draw_picture(self, phase: EmbeddingPhase | LoraPhase, own: slice, prior: PriorData | None,
                     turn: int) -> Callable[[], Draws]:  # fmt: skip
        """All that is random for one picture; what it returns encodes it. `turn`: of the prior's images."""
        config, draws = self.config, own.stop - own.start
        batch = self.data.sample(self.rng, self.generator, draws, config.union_sampling, config.flip_probability,
                                 config.alone_share)  # fmt: skip
        shape, device = self.data.latent_shape, self.base.device
        prompts, prior_latents = [batch.prompt], torch.empty((0, *shape), device=device)
        if prior is not None:
            prior_prompt, prior_latents = prior.pick(turn)
            prompts = [prior_prompt, batch.prompt]
        count = len(prior_latents) + draws
        timesteps = self.draw_timesteps(phase.timesteps, count).to(device)
        noise = torch.randn((count, *shape), generator=self.generator).to(device)
        tokenized = [tokenize_prompt(self.base.tokenizer, p, [t for t in self.data.tokens if t in p]) for p in prompts]
        return lambda: Draws(own, batch, tokenized, torch.cat([prior_latents, batch.latents()]), timesteps, noise)

    def draw_timesteps(self, kind: Timesteps, count: int) -> torch.Tensor:
        """(count,), whole numbers from 0 on, below the number of training timesteps."""
        steps = int(self.base.scheduler.config["num_train_timesteps"])
        if kind == "uniform":
            return torch.randint(0, steps, (count,), generator=self.generator)
        return (torch.randn(count, generator=self.generator).sigmoid() * steps).long().clamp(max=steps - 1)

    def compute(self, drawn: Draws, phase: EmbeddingPhase | LoraPhase, step: int, sites: Sequence[Site],
                recorder: AttentionRecorder, part: slice, with_prior: bool) -> StepLosses:  # fmt: skip
        """The losses of the draws in `part`, averaged over them, and of the prior image if there is one and it is asked for."""
        config, batch = self.config, drawn.batch
        first = len(drawn.latents) - (drawn.own.stop - drawn.own.start)  # the instance's draws stand last
        with_prior = with_prior and first > 0
        rows = [*range(first if with_prior else 0), *range(first, len(drawn.latents))[part]]
        latents, timesteps, noise = (x[rows] for x in (drawn.latents, drawn.timesteps, drawn.noise))
        tokenized = drawn.prompts if with_prior else drawn.prompts[-1:]
        own = slice(first if with_prior else 0, None)
        noisy = self.base.scheduler.add_noise(latents, noise, timesteps)
        recorder.open()
        sizes = [self.data.drawn_size, self.size_of(batch)][-len(tokenized) :]
        prompt_embeds = self.base.encode_prompt(torch.tensor([t.input_ids for t in tokenized]), *sizes)  # 1 or 2 rows
        prompt_embeds = joined([prompt_embeds[:-1], prompt_embeds[-1:].expand(len(latents[own]))])
        prediction = predict(self.base.unet, noisy, timesteps, prompt_embeds)
        maps = recorder.take()
        target = diffusion_target(self.base.scheduler, latents, noise, timesteps)
        weights = where_it_counts(batch, timesteps[own])
        diffusion = masked_diffusion_loss(prediction[own], target[own], weights, config.masked_loss_by_area)
        latent_size = (latents.shape[-2], latents.shape[-1])
        positions = tokenized[-1].asset_positions
        attention = attention_loss(maps, sites, phase.attention, batch, positions, timesteps, own.start, step, latent_size)
        if config.locality_weight and step % config.locality_every == 0:
            weight = config.locality_weight * config.locality_every
            diffusion = diffusion + weight * self.locality(prediction[own], noisy[own], timesteps[own], batch)
        prior_loss = torch.zeros((), device=latents.device)
        if with_prior:
            prior_loss = config.prior.weight * config.prior.every_steps * F.mse_loss(prediction[:1].float(), target[:1])
        return StepLosses(diffusion, attention, prior_loss)

    def size_of(self, batch: Batch) -> ImageSize:
        """What the UNet is told of the picture's size, and of its crop where that is asked for."""
        size = batch.size or self.data.size
        return size if self.config.crop_conditioning else replace(size, crop=self.data.size.crop)

    def gradients(self, phase: EmbeddingPhase | LoraPhase, step: int, sites: Sequence[Site], recorder: AttentionRecorder,
                  prior: PriorData | None, parameters: Sequence[torch.Tensor], pool: Executor,
                  mine: slice | None = None) -> StepLosses:  # fmt: skip
        """As `losses` and its backward pass, with the draws in `PARTS` parts or one a picture, each on a thread of `pool`.
        Gradients are left in the parameters, added in the parts' order, so that they are the same whichever thread is first; the
        losses have none."""
        parts = parts_of(self.draw(phase, step, prior, pool.map), mine or slice(0, phase.draws), PARTS)

        def work(part: DrawsPart) -> tuple[StepLosses, Sequence[torch.Tensor | None]]:
            weighted = self.part(part, phase, step, sites, recorder)
            return weighted, torch.autograd.grad(weighted.total, parameters, allow_unused=True)

        done = list(pool.map(work, parts))
        for parameter, *found in zip(parameters, *(gradients for _, gradients in done), strict=True):
            there = [gradient for gradient in found if gradient is not None]
            parameter.grad = sum(there[1:], start=there[0]) if there else None
        return added([StepLosses(*(x.detach() for x in (each.diffusion, each.attention, each.prior))) for each, _ in done])

    def locality(self, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outside the masks the assets' tokens must change nothing: there the prediction keeps to the one without them.

        `prediction` and `noisy` are (draws, C, h, w), `timesteps` (draws,); the reference is the model as it stands, adapters
        included, without gradient. This project's own term; the idea is prior preservation's, applied by place.
        The masked loss alone says nothing about the outside, so a token may fill it with its asset as well. Draws at or above
        `locality_max_timestep` count nothing: there nobody can see where the masks are, and a token that may change nothing
        outside of them could change nothing at all.
        """
        counting = timesteps < self.config.locality_max_timestep
        share = float(counting.float().mean())
        if share == 0:
            return prediction.new_zeros(())
        prediction, noisy, timesteps = prediction[counting], noisy[counting], timesteps[counting]
        with torch.no_grad():
            ids = tokenize_prompt(self.base.tokenizer, "a photo", []).input_ids
            prompt_embeds = self.base.encode_prompt(torch.tensor([ids]), self.size_of(batch)).expand(len(noisy))
            without = predict(self.base.unet, noisy, timesteps, prompt_embeds)
        return share * masked_diffusion_loss(prediction, without, 1 - batch.union_mask, self.config.masked_loss_by_area)


def parts_of(drawn: Sequence[Draws], mine: slice, at_least: int = 1) -> list[DrawsPart]:
    """Those of a step's draws that are in `mine`, by picture; each picture's in as many parts as it takes to have `at_least`."""
    found: list[DrawsPart] = []
    for each in drawn:
        start, stop = max(each.own.start, mine.start) - each.own.start, min(each.own.stop, mine.stop) - each.own.start
        if start < stop:
            size = -(-(stop - start) // -(-at_least // len(drawn)))
            found += [(each, slice(k, min(k + size, stop))) for k in range(start, stop, size)]
    return found


def added(losses: Sequence[StepLosses]) -> StepLosses:
    """Their sums."""
    first, *others = losses
    for each in others:
        first = StepLosses(first.diffusion + each.diffusion, first.attention + each.attention, first.prior + each.prior)
    return first


def where_it_counts(batch: Batch, timesteps: torch.Tensor) -> torch.Tensor:
    """Weights of the diffusion loss, (1 or B, 1, h, w). What was filled in has the colours of what is around it and no details of
    its own, so it counts where there is too much noise to see any."""
    if batch.filled is None:
        return batch.union_mask
    early = (timesteps >= FILLED_FROM).to(batch.filled)[:, None, None, None]
    return batch.union_mask * (1 - batch.filled * (1 - early))


def diffusion_target(scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet should predict, by the scheduler's own `prediction_type`: noise, velocity or the clean latents."""
    kind = scheduler.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        velocity: torch.Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    if kind == "sample":
        return latents
    raise InputError(f"the base model predicts '{kind}', expected epsilon, v_prediction or sample; use another base model")


def attention_loss(maps: dict[str, torch.Tensor], sites: Sequence[Site], terms: AttentionTerms, batch: Batch,
                   positions: dict[str, tuple[int, ...]], timesteps: torch.Tensor, first_row: int, step: int,
                   latent_size: tuple[int, int]) -> torch.Tensor:  # fmt: skip
    """Weighted attention loss of one step: summed over sites and assets, averaged over the draws.

    A draw counts only where its own timestep, the instance's, is below `max_timestep`; for the relative penalty each does.
    """
    total = torch.zeros((), device=timesteps.device)
    for row in range(first_row, len(timesteps)):
        counts = terms.loss != "none" and int(timesteps[row]) < terms.max_timestep
        if not counts and not terms.relative_penalty_weight:
            continue
        by_asset = [token_maps(maps, sites, positions[token], row, latent_size) for token in batch.tokens]
        if terms.relative_penalty_weight:
            for attention, mask in zip(map(_mean_map, by_asset), batch.asset_masks, strict=True):
                size = (attention.shape[0], attention.shape[1])
                relative = relative_penalty_loss(attention, mask_at_map(mask[0], size))
                total = total + terms.relative_penalty_weight * relative
        if not counts:
            continue
        if terms.average_sites:
            by_asset = [[_mean_map(found)] for found in by_asset]
        for found, mask in zip(by_asset, batch.asset_masks, strict=True):
            for attention in found:
                size = (attention.shape[0], attention.shape[1])
                total = total + _one_term(attention, mask_at_map(mask[0], size), terms, step)
        if terms.separation_weight:
            for at_site in zip(*by_asset, strict=True):
                total = total + terms.separation_weight * separation_loss(at_site)
    return total / (len(timesteps) - first_row)


def _mean_map(maps: list[torch.Tensor]) -> torch.Tensor:
    """One map from several sites', at the largest one's size."""
    size = max(m.shape for m in maps)
    return torch.stack([F.interpolate(m[None, None], size, mode="bilinear")[0, 0] for m in maps]).mean(0)


def _one_term(attention: torch.Tensor, mask: torch.Tensor, terms: AttentionTerms, step: int) -> torch.Tensor:
    if terms.loss == "match":
        return terms.penalty_weight * match_loss(attention, mask)
    if step < terms.reward_steps:
        return terms.reward_weight * reward_loss(attention, mask)
    return terms.penalty_weight * penalty_loss(attention, mask)
