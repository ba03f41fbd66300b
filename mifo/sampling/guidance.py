"""Box guidance: moves the latents until each asset's attention lies in its box, and refines the boxes later on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel

from ..attention.bounded import BoundedAttention, ForwardPass, StopForward
from ..attention.refine import MeanMap, cluster_pixels, refine_masks
from ..attention.sites import Site, choose_sites
from ..config import GuidanceConfig, RefinementConfig
from ..model.prompt_embeds import PromptEmbeds, predict


def step_size(step: int, config: GuidanceConfig) -> float:
    """Linear from the first guided step to the last."""
    progress = step / max(1, config.steps - 1)
    return config.step_size_start + (config.step_size_end - config.step_size_start) * progress


def alpha_schedule(step: int, guidance_steps: int = 15) -> float:
    """Weight of the background term at a guided step: 0.55, 0.40, 0.25, 0.10, then a half cosine to 0.01 at `guidance_steps`.

    These are the numbers of Bounded Attention's code; its paper (section 4.2) goes from 0.4 to 0.1 in three steps.
    """
    if step < 3:
        return 0.55 - 0.15 * step
    progress = min(1.0, (step - 3) / max(1, guidance_steps - 3))
    return 0.01 + (0.1 - 0.01) * 0.5 * (1 + math.cos(math.pi * progress))


def box_guidance_loss(foreground: torch.Tensor, background: torch.Tensor, alpha: float) -> torch.Tensor:
    """(1 - fg / (fg + bg))^2 + alpha log(1 + bg), summed over subjects (Bounded Attention, section 4.2).

    `foreground`, `background`: (..., subjects) attention mass that each subject's context receives from the pixels inside
    its box and from the pixels outside all boxes. Returns (...,).
    """
    inside = foreground / (foreground + background).clamp(min=1e-8)
    return ((1 - inside) ** 2 + alpha * torch.log1p(background)).sum(-1)


def attention_masses(probabilities: torch.Tensor, subjects: torch.Tensor,
                     contexts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Attention mass that each subject's context receives from inside its box, and from outside all boxes.

    probabilities (B, heads, h*w, keys); subjects (B or 1, N, h*w) bool; contexts (B or 1, N, keys) bool: the keys that
    stand for a subject. Returns two (B, N), summed over heads.
    """
    received = torch.einsum("bqk,bnk->bnq", probabilities.sum(1), contexts.to(probabilities).expand(len(probabilities), -1, -1))
    background = ~subjects.any(1, keepdim=True)
    return (received * subjects).sum(-1), (received * background).sum(-1)


@dataclass
class LatentGuidance:
    """`guide` is the before-step hook of the denoising loop. The UNet must be under `bound_attention(unet, control)`."""

    unet: UNet2DConditionModel
    control: BoundedAttention
    config: GuidanceConfig
    prompt_embeds: PromptEmbeds
    """One row, of the prompt alone"""

    def __post_init__(self) -> None:
        self.sites = choose_sites(self.unet, self.config.blocks, self.config.levels, ("cross", "self"))
        self.history: list[tuple[int, int, float]] = []  # (step, iteration, mean normalized loss)

    @torch.enable_grad()  # the denoising loop around it runs without
    def guide(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, C, h, w). Each picture stops by itself, so a batch equals its pictures one by one: after the
        move at which its loss was below the threshold, so each moves at least once, as in the published code."""
        if not self.config.enabled or step >= self.config.steps:
            return latents
        active = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        for iteration in range(self.config.max_iterations):
            latents = latents.detach().requires_grad_(True)
            losses = self.losses(step, timestep, latents)  # (B,)
            normalized = losses.detach() / len(self.control.layout)
            self.history.append((step, iteration, float(normalized.mean())))
            (gradient,) = torch.autograd.grad(losses.sum(), latents)
            latents = latents - step_size(step, self.config) * gradient * active[:, None, None, None]
            active = active & (normalized >= self.config.loss_threshold)
            if not active.any():
                break
        return latents.detach()

    def losses(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(B,) guidance loss of each picture. Only the conditional half runs, and only up to the last supervised site."""
        self.control.begin(ForwardPass(len(latents), False, True, tuple(self.sites), stop_when_recorded=True))
        try:
            predict(self.unet, latents, timestep, self.prompt_embeds.expand(len(latents)))
        except StopForward:
            pass
        finally:
            maps = self.control.end()
        alpha = alpha_schedule(step, self.config.steps)
        cross = self._kind_loss(maps, [s for s in self.sites if s.is_cross], alpha)
        own = self._kind_loss(maps, [s for s in self.sites if not s.is_cross], alpha)
        return self.config.cross_weight * cross + self.config.self_weight * own

    def _kind_loss(self, maps: dict[str, torch.Tensor], sites: list[Site], alpha: float) -> torch.Tensor:
        masses = []
        for site in sites:
            subjects = self.control.subject_masks(site.map_size(*self.control.latent_size))
            contexts = self._context_tokens() if site.is_cross else subjects
            masses.append(torch.stack(attention_masses(maps[site.name], subjects, contexts)))
        foreground, background = torch.stack(masses).mean(0)  # each (B, N), averaged over layers
        return box_guidance_loss(foreground, background, alpha)

    def _context_tokens(self) -> torch.Tensor:
        """(1, N, L) bool: a subject's own token and the end of the text."""
        prompt = self.control.prompt
        contexts = torch.zeros((1, len(self.control.layout), len(prompt.input_ids)), dtype=torch.bool, device=self.control.device)
        contexts[..., prompt.end_position] = True
        for index, (token, _) in enumerate(self.control.layout):
            contexts[0, index, list(prompt.asset_positions[token])] = True
        return contexts


@dataclass
class MaskRefinement:
    """Watches every sampling pass's self-attention, and every few steps after guidance tightens the subjects' masks with it."""

    unet: UNet2DConditionModel
    control: BoundedAttention
    config: RefinementConfig
    first_step: int
    seed: int = 0
    """Of the clusters' first centers."""

    def __post_init__(self) -> None:
        self.self_sites = choose_sites(self.unet, self.config.blocks, self.config.levels, ("self",))
        self.cross_sites = choose_sites(self.unet, self.config.blocks, self.config.levels, ("cross",))
        sizes = {site.map_size(*self.control.latent_size) for site in (*self.self_sites, *self.cross_sites)}
        if len(sizes) > 1:
            raise ValueError(f"refinement averages maps of one size, but its sites have {sorted(sizes)}; name one level")
        self.watched = MeanMap()  # (I, h*w, h*w)
        self._clusters: dict[int, torch.Tensor] = {}  # of each picture, at the last refinement

    def _is_due(self, step: int) -> bool:
        late = step - self.first_step
        return self.config.enabled and late >= 0 and late % self.config.every_steps == 0

    def before(self, step: int) -> None:
        if self.config.enabled:
            recorded = (*self.self_sites, *(self.cross_sites if self._is_due(step) else ()))
            self.control.begin(replace(self.control.sampling, recorded=recorded))

    def after(self, step: int) -> None:
        if not self.config.enabled:
            return
        maps = self.control.end()
        self.watched.add(torch.stack([maps[s.name] for s in self.self_sites]).mean(0))
        if self._is_due(step):
            cross = torch.stack([maps[s.name] for s in self.cross_sites]).mean(0)  # (I, h*w, L)
            self._refine(cross)

    def _refine(self, cross: torch.Tensor) -> None:
        size = self.self_sites[0].map_size(*self.control.latent_size)
        subjects = range(len(self.control.layout))
        present = self.control.subject_masks(size).expand(self.control.sampling.images, -1, -1)
        refined = []
        for image, (own, looks) in enumerate(zip(self.watched.mean, cross, strict=True)):
            clusters = self.config.clusters_per_box * len(subjects)
            self._clusters[image] = cluster_pixels(own, clusters, self.seed, self._clusters.get(image))
            tokens = torch.stack([looks[:, self.control.subject_keys(k)].mean(1) for k in subjects])
            refined.append(refine_masks(self._clusters[image], tokens, present[image], self.config.min_cover))
        self.control.refine(torch.stack(refined).unflatten(-1, size))
