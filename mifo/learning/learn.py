"""Learning: one image and its masks -> N embedding rows and one LoRA, in two phases (MIFO, arXiv 2511.00542, section 3).

Knows instances, the base model, losses and bundles. Knows nothing of boxes or of how the assets will be placed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_with_hard_restarts_schedule_with_warmup
from peft import PeftModel

from ..attention.record import AttentionRecorder, record_attention, token_maps
from ..attention.sites import Site, choose_sites
from ..bundle.instance_copy import keep_instance
from ..bundle.store import Bundle, save_bundle
from ..bundle.target import check_target, photo_digest
from ..config import AttentionTerms, EmbeddingPhase, LearnConfig, LoraPhase, to_dict
from ..data.instance import Instance, fit_instance
from ..data.mask_sizes import mask_at_map
from ..errors import InputError
from ..io.console import say
from ..io.interrupts import stop_between_steps
from ..model.base import BaseModel
from ..model.embedding import AssetEmbedding, initial_rows, use_assets
from ..model.finite import broken_weights
from ..model.lora import add_adapters, remove_adapter
from ..model.peak_memory import PeakMemory
from ..model.quantize import why_no_8bit_adam
from ..prompts import add_asset_tokens, join_assets, tokenize_prompt
from .checkpoints import Checkpointing, Checkpoints, open_checkpoints
from .dataset import Batch, InstanceData
from .early_stopping import KeepBest
from .losses import masked_diffusion_loss, match_loss, penalty_loss, reward_loss, separation_loss
from .optimizer import Stepper
from .prior import PriorData, make_prior
from .report import attention_shares, draw_attention_sheet, draw_preview, environment, snapshot_maps
from .state import capture, identity_of, place, restore


@dataclass(frozen=True)
class Progress:
    """What a progress bar needs to know after each step."""

    phase: str
    """'prior', 'embedding', 'lora' or 'previews'"""
    step: int
    total: int
    losses: dict[str, float] = field(default_factory=dict)


Report = Callable[[Progress], None]
#: (base with assets and adapters as they stand, data, tokens, supervised sites) -> {"score": larger is better, ...}
CheckpointJudge = Callable[[BaseModel, InstanceData, Sequence[str], AttentionTerms], dict[str, float]]


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


def learn(instance: Instance, base: BaseModel, config: LearnConfig, folder: Path, report: Report = lambda _: None,
          initializer_words: Sequence[str | None] | None = None, checkpointing: Checkpointing | None = None,
          judge: CheckpointJudge | None = None, overwrite: bool = False, keep_base_path: bool = False) -> Bundle:  # fmt: skip
    """Learns `instance` on `base` and writes the bundle to `folder`. The base model is handed back as it was.

    A bundle that stands there is replaced, in the end and whole, if it was learned from the same photo and masks on the same base
    model, or with `overwrite`; and only if all that is in it is as it was written.

    State is kept beside `folder` as `checkpointing` says, until the bundle is written. Ctrl-C and SIGTERM take effect after
    the step that runs, and the state is kept then too. `judge` scores checkpoints where `config.keep` is enabled.
    `keep_base_path` writes into the bundle where a local base model lies.
    Raises InputError for input that cannot be learned from (too many assets for a prompt, masks that vanish), when another
    process learns to `folder`, when a checkpoint that should be resumed is another run's, and when `folder` holds anything that
    may not be replaced.
    """
    check_target(folder, instance, base.fingerprint, overwrite)
    identity = identity_of(instance, base, config, initializer_words)
    with open_checkpoints(folder, identity, checkpointing or Checkpointing()) as checkpoints, PeakMemory(base.device) as peak:
        bundle = _learn(instance, base, config, folder, report, initializer_words, checkpoints, judge, peak, keep_base_path)
        checkpoints.clear()
    return bundle


def _learn(instance: Instance, base: BaseModel, config: LearnConfig, folder: Path, report: Report,
           initializer_words: Sequence[str | None] | None, checkpoints: Checkpoints,
           judge: CheckpointJudge | None, peak: PeakMemory, keep_base_path: bool) -> Bundle:  # fmt: skip
    started = time.monotonic()
    resumed = checkpoints.load()
    stepper = Stepper(base.device, config.mixed_precision)
    _check_resolution(base, config.resolution)
    tokens = instance.tokens
    known = base.tokenizer.get_added_vocab()
    add_asset_tokens(base.tokenizer, [t for t in tokens if t not in known])
    ids = [base.tokenizer.get_added_vocab()[t] for t in tokens]
    _check_longest_prompt(base, tokens)
    fitted = fit_instance(instance, config.resolution or base.resolution)
    data = InstanceData(fitted, base, config.placements, config.seed)
    prior = _draw_prior(base, config, folder.parent / ".prior", report)
    words = initializer_words or [None] * instance.count
    rows = initial_rows(base.text_encoder.get_input_embeddings(), base.tokenizer, words)
    with use_assets(base.text_encoder, ids, rows) as embedding, gradient_checkpointing(base, config.gradient_checkpointing):
        learner = Learner(base, data, config, embedding, stepper, prior, checkpoints, started, resumed, judge)
        learner.train_rows(report)
        with lend_adapters(base, config.lora, config.seed) as adapters:
            learner.train_adapters(adapters, report)
            shares = attention_shares(base, data, tokens, config.lora.attention)
            preview = draw_preview(instance, base, tokens, config.seed, config.resolution,
                                   lambda k, n: report(Progress("previews", k, n)))  # fmt: skip
            attention = draw_attention_sheet(learner.snapshots, instance, tokens)
            facts: dict[str, Any] = {
                "peak_of": peak.of,
                "attention_inside_mask": {t: round(s, 4) for t, s in zip(tokens, shares, strict=True)},
                "losses": learner.curve,
                "skipped_steps": learner.skipped_steps,
                "memory": to_dict(base.memory),
                "photo_digest": photo_digest(instance),
                **({"kept": learner.kept} if learner.kept else {}),
                **environment(),
                "seconds": round(learner.seconds(), 1),  # the pictures included
                "peak_gib": round(peak.gib, 3),
            }

            def write_pictures(target: Path) -> None:
                preview.save(target / "preview.png")
                attention.save(target / "attention.png")
                keep_instance(target, instance, fitted)

            return save_bundle(folder, base, tokens, instance.words, embedding.rows, adapters, config, facts, write_pictures,
                               overwrite=True, keep_base_path=keep_base_path)  # fmt: skip


def snapshot_steps(train_steps: int, first_phase: bool) -> set[int]:
    """The steps before which attention maps are kept, beside those after the last: thirds of a phase, each once. A later phase
    starts where the one before it ended, which is shown already."""
    steps = {k * train_steps // 3 for k in range(3)}
    return steps if first_phase else steps - {0}


@contextmanager
def lend_adapters(base: BaseModel, phase: LoraPhase, seed: int) -> Iterator[dict[str, PeftModel]]:
    """LoRA in the base model's modules for as long as the block lasts; none when phase 2 is switched off."""
    adapters = add_adapters(base, phase.rank, phase.text_encoder, seed) if phase.train_steps else {}
    try:
        yield adapters
    finally:
        for adapter in adapters.values():
            remove_adapter(adapter)


@contextmanager
def gradient_checkpointing(base: BaseModel, enabled: bool) -> Iterator[None]:
    """Within the block the UNet keeps only its blocks' inputs for the backward pass, and runs each block again there."""
    if enabled:
        base.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if enabled:
            base.unet.disable_gradient_checkpointing()


def _draw_prior(base: BaseModel, config: LearnConfig, cache: Path, report: Report) -> PriorData | None:
    if not config.prior.enabled or not config.lora.train_steps:
        return None
    resolution = config.resolution or base.resolution
    return make_prior(base, config.prior, resolution, config.seed, cache, lambda k, n: report(Progress("prior", k, n)))


def _check_resolution(base: BaseModel, resolution: int | None) -> None:
    if resolution is not None:
        base.check_side("the resolution", resolution)


def _check_longest_prompt(base: BaseModel, tokens: Sequence[str]) -> None:
    try:
        tokenize_prompt(base.tokenizer, join_assets(list(tokens)), tokens)
    except InputError as error:
        length = str(error).split(". ")[0]
        raise InputError(f"{len(tokens)} assets are more than one prompt can hold; use fewer masks. {length}.") from None


class Learner:
    """Both phases' shared parts: the step, its losses, and what is kept to be shown."""

    def __init__(self, base: BaseModel, data: InstanceData, config: LearnConfig, embedding: AssetEmbedding,
                 stepper: Stepper, prior: PriorData | None, checkpoints: Checkpoints | None = None,
                 started: float | None = None, resumed: dict[str, Any] | None = None,
                 judge: CheckpointJudge | None = None):  # fmt: skip
        self.checkpoints, self.resumed = checkpoints, resumed
        self.started = time.monotonic() if started is None else started
        self.skipped_steps = 0
        self.base, self.data, self.config = base, data, config
        self.embedding, self.stepper, self.prior = embedding, stepper, prior
        self.rng = np.random.default_rng(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.curve: list[dict[str, float]] = []
        self.snapshots: list[tuple[str, torch.Tensor]] = []
        self.judge = judge
        self.keeper: KeepBest | None = None
        self.kept: dict[str, Any] | None = None

    def seconds(self) -> float:
        """Since the run began, without the time between an interruption and the resumption."""
        return time.monotonic() - self.started

    # --- phases ---

    def train_rows(self, report: Report) -> None:
        if self.resumed is not None and self.resumed["phase"] != "embedding":
            return  # the checkpoint is of phase 2, and holds the rows
        phase = self.config.embedding
        groups = [{"params": [self.embedding.rows], "lr": phase.learning_rate}]
        optimizer = torch.optim.AdamW(groups, betas=self.config.adam_betas, weight_decay=self.config.weight_decay)
        self._run("embedding", phase, optimizer, None, report)

    def train_adapters(self, adapters: dict[str, PeftModel], report: Report) -> None:
        phase = self.config.lora
        if not phase.train_steps:
            return
        weights = [p for a in adapters.values() for p in a.parameters() if p.requires_grad and p is not self.embedding.rows]
        self.embedding.rows.requires_grad_(True)  # freezing the base for LoRA froze the rows with it
        groups = [
            {"params": weights, "lr": phase.learning_rate},
            {"params": [self.embedding.rows], "lr": phase.row_learning_rate},
        ]
        optimizer = make_optimizer(groups, self.config, phase.use_8bit_adam)
        self._run("lora", phase, optimizer, self.prior, report)

    def _run(self, name: str, phase: EmbeddingPhase | LoraPhase, optimizer: torch.optim.Optimizer, prior: PriorData | None,
             report: Report) -> None:  # fmt: skip
        sites = choose_sites(self.base.unet, phase.attention.blocks, phase.attention.levels)
        scheduler = make_lr_schedule(optimizer, phase)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.keeper = self._make_keeper(name, phase.attention, parameters)
        first = self._resume(name, parameters, optimizer, scheduler)
        shown = snapshot_steps(phase.train_steps, first_phase=not self.snapshots)
        ended = first > 0 and self.keeper is not None and self.keeper.has_stopped_improving()
        with stop_between_steps() as stop, record_attention(self.base.unet, sites) as recorder:
            if self.keeper and first == 0:
                self.keeper.after(0, False)
            for step in range(first, first if ended else phase.train_steps):
                if step in shown:
                    self._keep_snapshot(f"{name} {step}", phase.attention)
                losses = self._losses(phase, step, sites, recorder, prior)
                parts = losses.as_floats()
                self._refuse_nonfinite({f"{k} loss": v for k, v in parts.items()}, name, step)
                norm = self.stepper.backward(losses.total, optimizer, parameters, self.config.max_grad_norm)
                if self.stepper.scaler is None:  # a scaler skips such a step by itself, and is counted
                    self._refuse_nonfinite({"gradient": float(norm)}, name, step)
                self.skipped_steps += not self.stepper.step(optimizer)
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                if step % 10 == 0:
                    self.curve.append({"phase": name, "step": step, **{k: round(v, 6) for k, v in parts.items()}})  # type: ignore[dict-item]
                report(Progress(name, step + 1, phase.train_steps, parts))
                finished = self.keeper is not None and self.keeper.after(step + 1, step + 1 == phase.train_steps)
                if self.checkpoints and self.checkpoints.due(step + 1, stop.asked is not None or step + 1 == phase.train_steps):
                    size = max(float(p.detach().abs().max()) for p in parameters)
                    self._refuse_nonfinite({"weight": size}, name, step)
                    state = capture(self, name, step + 1, parameters, optimizer, scheduler)
                    self.checkpoints.save(state, place(name, step + 1, phase.train_steps))
                if stop.asked is not None:
                    stop.take_effect()
                if finished:
                    break
        if self.keeper:
            self.kept = {"phase": name, **self.keeper.restore()}
        self._keep_snapshot(f"{name} {phase.train_steps}", phase.attention)

    def _make_keeper(self, name: str, terms: AttentionTerms, parameters: Sequence[torch.Tensor]) -> KeepBest | None:
        """In the last phase alone; its first candidate is what the phase before left."""
        keep, judge = self.config.keep, self.judge
        if not keep.enabled or judge is None or (name == "embedding" and self.config.lora.train_steps):
            return None
        tokens = self.data.tokens
        return KeepBest(parameters, lambda: judge(self.base, self.data, tokens, terms), keep.every_steps, keep.patience)

    def _resume(self, name: str, parameters: list[torch.Tensor], optimizer: Any, scheduler: Any) -> int:
        """The number of this phase's steps that are done already."""
        state, self.resumed = self.resumed, None
        return 0 if state is None else restore(self, state, parameters, optimizer, scheduler)

    def _refuse_nonfinite(self, parts: dict[str, float], phase: str, step: int) -> None:
        bad = [name for name, value in parts.items() if not np.isfinite(value)]
        if bad:
            if broken := broken_weights(self.base.parts):
                raise InputError(f"the {' and the '.join(bad)} is not finite: {broken}")
            kept = self.checkpoints.last_saved if self.checkpoints else None
            raise InputError(
                f"the {' and the '.join(bad)} is not finite at step {step} of the {phase} phase; lower the learning rate or use "
                f"--mixed-precision no{f'. The last good checkpoint, {kept}, is kept' if kept else ''}"
            )

    def _keep_snapshot(self, label: str, terms: AttentionTerms) -> None:
        self.snapshots.append((label, snapshot_maps(self.base, self.data, self.data.tokens, terms)))

    # --- one step ---

    def _losses(self, phase: EmbeddingPhase | LoraPhase, step: int, sites: Sequence[Site], recorder: AttentionRecorder,
                prior: PriorData | None) -> StepLosses:  # fmt: skip
        config = self.config
        batch = self.data.sample(self.rng, self.generator, phase.draws, config.union_sampling, config.flip_probability)
        prompts, latents = [batch.prompt], batch.latents
        if prior is not None:
            prior_prompt, prior_latents = prior.pick(step)
            prompts, latents = [prior_prompt, batch.prompt], torch.cat([prior_latents, latents])
        tokenized = [tokenize_prompt(self.base.tokenizer, p, _assets_of(p, batch)) for p in prompts]
        timesteps = torch.randint(0, int(self.base.scheduler.config["num_train_timesteps"]), (len(latents),),
                                  generator=self.generator).to(latents.device)  # fmt: skip
        noise = torch.randn(latents.shape, generator=self.generator).to(latents)
        noisy = self.base.scheduler.add_noise(latents, noise, timesteps)
        recorder.open()
        states = self.base.encode_prompt(torch.tensor([t.input_ids for t in tokenized]))  # (1 or 2, L, D)
        states = torch.cat([states[:-1], states[-1:].expand(phase.draws, -1, -1)])
        prediction = self.base.unet(noisy.to(self.base.dtype), timesteps, states).sample
        maps = recorder.take()
        target = diffusion_target(self.base.scheduler, latents, noise, timesteps)
        own = slice(len(latents) - phase.draws, None)  # the instance's rows stand last
        diffusion = masked_diffusion_loss(prediction[own], target[own], batch.union_mask, config.masked_loss_by_area)
        latent_size = (latents.shape[-2], latents.shape[-1])
        positions = tokenized[-1].asset_positions
        attention = attention_terms(maps, sites, phase.attention, batch, positions, timesteps, own.start, step, latent_size)
        zero = torch.zeros((), device=latents.device)
        if config.locality_weight:
            diffusion = diffusion + config.locality_weight * self._locality(prediction[own], noisy[own], timesteps[own], batch)
        prior_loss = zero if prior is None else config.prior.weight * F.mse_loss(prediction[:1].float(), target[:1])
        return StepLosses(diffusion, attention, prior_loss)

    def _locality(self, prediction: torch.Tensor, noisy: torch.Tensor, timesteps: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outside the masks the assets' tokens must change nothing: there the prediction keeps to the one without them.

        `prediction` and `noisy` are (draws, C, h, w), `timesteps` (draws,); the reference is the model as it stands, adapters
        included, without gradient. This project's own term; the idea is prior preservation's, applied by place.
        The masked loss alone says nothing about the outside, so a token may fill it with its asset as well.
        """
        with torch.no_grad():
            ids = tokenize_prompt(self.base.tokenizer, "a photo", []).input_ids
            states = self.base.encode_prompt(torch.tensor([ids])).expand(len(noisy), -1, -1)
            without = self.base.unet(noisy.to(self.base.dtype), timesteps, states).sample
        return masked_diffusion_loss(prediction, without, 1 - batch.union_mask, self.config.masked_loss_by_area)


def _assets_of(prompt: str, batch: Batch) -> list[str]:
    return list(batch.tokens) if prompt == batch.prompt else []


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


def attention_terms(maps: dict[str, torch.Tensor], sites: Sequence[Site], terms: AttentionTerms, batch: Batch,
                    positions: dict[str, tuple[int, ...]], timesteps: torch.Tensor, first_row: int, step: int,
                    latent_size: tuple[int, int]) -> torch.Tensor:  # fmt: skip
    """Weighted attention loss of one step: summed over sites and assets, averaged over the draws.

    A draw counts only where its own timestep, the instance's, is below `max_timestep`.
    """
    total = torch.zeros((), device=timesteps.device)
    rows = [row for row in range(first_row, len(timesteps)) if int(timesteps[row]) < terms.max_timestep]
    if terms.loss == "none":
        return total
    for row in rows:
        by_asset = [token_maps(maps, sites, positions[token], row, latent_size) for token in batch.tokens]
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


# --- optimizers ---------------------------------------------------------------------------------


def make_optimizer(groups: list[dict[str, Any]], config: LearnConfig, use_8bit: bool) -> torch.optim.Optimizer:
    """8-bit AdamW by bitsandbytes where it runs; torch's AdamW otherwise, which learns the same with larger states."""
    options: dict[str, Any] = {"betas": config.adam_betas, "weight_decay": config.weight_decay}
    if not use_8bit:
        return torch.optim.AdamW(groups, **options)
    devices = {p.device.type for group in groups for p in group["params"]}
    reason = why_no_8bit_adam(devices)
    if reason is None:
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **options)
        return optimizer
    message = f"note: no 8-bit Adam: {reason}; using PyTorch's AdamW, whose states take 8 bytes a weight instead of 2"
    say(message)
    return torch.optim.AdamW(groups, **options)


def make_lr_schedule(optimizer: Any, phase: EmbeddingPhase | LoraPhase) -> Any:
    """Phase 1: warm-up and cosine with restarts. Phase 2: constant."""
    if isinstance(phase, EmbeddingPhase) and phase.cosine_restarts:
        return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, phase.warmup_steps, phase.train_steps, 1)
    return get_constant_schedule_with_warmup(optimizer, getattr(phase, "warmup_steps", 0))
