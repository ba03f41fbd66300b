"""Settings by base model family, chosen by measurement (see LOG.md)."""

from __future__ import annotations

from dataclasses import replace

from .config import (
    AttentionTerms,
    CompositeConfig,
    EditConfig,
    GuidanceConfig,
    LearnConfig,
    PriorConfig,
    RefinementConfig,
    SynthesisConfig,
)
from .errors import InputError

SINGLE_TOYS = "|".join(f"a photo of a toy {place}" for place in (
    "at the beach", "in the snow", "on the grass", "at night", "on a wooden floor", "on a plain background"))  # fmt: skip


ASSETS = 3
"""How many the toybox's steps were measured with."""

MATCH_WEIGHT = 1e-2
"""Of Break-A-Scene's attention loss, as published."""

PLACES = ("at the beach", "in the snow", "on the grass", "at night", "in front of a brick wall", "on a wooden floor",
          "on a plain background")  # fmt: skip
TOYBOX_COMPOSITES = CompositeConfig(share=1.0, backgrounds="|".join(f"a photo {place}" for place in PLACES), num_backgrounds=21,
                                    sampling_steps=15, guidance_scale=2.0)  # fmt: skip
TOYBOX_PRIOR = PriorConfig(every_steps=2, num_class_images=16, sampling_steps=15, guidance_scale=2.0, class_prompt=SINGLE_TOYS)


def learn_preset(family: str, recipe: str = "mifo", assets: int = ASSETS) -> LearnConfig:
    """`family`: 'stable-diffusion' (published numbers; LoRA's rate found by others), 'sdxl' (the same, at the levels at which its
    UNet looks at the text) or 'toybox' (measured, LOG.md). `assets`: how many are learned, `<background>` included; of more than
    three, the toybox takes more steps."""
    if recipe not in ("mifo", "break-a-scene"):
        raise InputError(f"recipe '{recipe}' is not known; choose mifo or break-a-scene")
    config = LearnConfig()
    if family == "sdxl":
        config = replace(config, aspect="photo", crop_conditioning=True)
    if family == "toybox":
        terms = AttentionTerms(levels=(1, 2), penalty_weight=0.5, reward_weight=0.5, relative_penalty_weight=0.02)
        rewarded = replace(terms, reward_steps=50)
        config = replace(
            config,
            embedding=replace(config.embedding, train_steps=150, learning_rate=1.5e-2, draws=4, attention=rewarded),
            lora=replace(config.lora, train_steps=200, learning_rate=3e-3, row_learning_rate=2e-3, draws=4, averaged_share=0.3,
                         attention=terms),
            prior=TOYBOX_PRIOR,
            composites=TOYBOX_COMPOSITES,
            masked_loss_by_area=True,
        )
    if recipe == "break-a-scene":
        config = _as_break_a_scene(config, family)
    return scale_steps(config, assets / ASSETS) if family == "toybox" and assets > ASSETS else config


def scale_steps(config: LearnConfig, by: float) -> LearnConfig:
    """As many steps of each phase, and of the reward in it, times `by`; one at least where there were any."""

    def scaled(steps: int) -> int:
        return max(1, round(steps * by)) if steps else 0

    first, second = config.embedding, config.lora
    rewarded, then = (replace(p.attention, reward_steps=scaled(p.attention.reward_steps)) for p in (first, second))
    return replace(config, embedding=replace(first, train_steps=scaled(first.train_steps), attention=rewarded),
                   lora=replace(second, train_steps=scaled(second.train_steps), attention=then))  # fmt: skip


def with_attention_loss(config: LearnConfig, family: str, loss: str) -> LearnConfig:
    """The preset with another attention loss, and what belongs to it; with 'reward-penalty' it stays as it is.

    'match' is Break-A-Scene's, at its published weight. For the toybox, 'match' and 'none' have the weight and the rates that a
    search of their own found best: the preset's rates are too low for learning without a loss (LOG.md). Raises InputError for
    another name.
    """
    if loss == "reward-penalty":
        return config
    if loss not in ("match", "none"):
        raise InputError(f"attention loss '{loss}' is not known; choose reward-penalty, match or none")
    embedding, lora = config.embedding, config.lora
    if family == "toybox":
        first, second, rows = (1.104e-2, 2.695e-3, 7.31e-3) if loss == "match" else (2.63e-2, 2.61e-3, 4.35e-3)
        embedding = replace(embedding, learning_rate=first)
        lora = replace(lora, learning_rate=second, row_learning_rate=rows)

    def changed(terms: AttentionTerms) -> AttentionTerms:
        if loss == "none":
            return replace(terms, loss="none", relative_penalty_weight=0.0)
        return _match(terms, 4.76e-3 if family == "toybox" else MATCH_WEIGHT)

    return replace(config, embedding=replace(embedding, attention=changed(embedding.attention)),
                   lora=replace(lora, attention=changed(lora.attention)))  # fmt: skip


def _match(terms: AttentionTerms, weight: float) -> AttentionTerms:
    return replace(terms, loss="match", reward_weight=0.0, penalty_weight=weight, reward_steps=0, max_timestep=1000,
                   average_sites=True, relative_penalty_weight=0.0)  # fmt: skip


def _as_break_a_scene(config: LearnConfig, family: str) -> LearnConfig:
    """Break-A-Scene's losses (arXiv 2305.16311, section 3 and appendix) on the same LoRA budget.

    For Stable Diffusion with its published schedule; for the toybox with the steps, draws and rates of this project's own recipe:
    the published rates teach a model as small as that next to nothing (LOG.md).
    """
    match = _match(config.lora.attention, MATCH_WEIGHT)
    embedding = replace(config.embedding, cosine_restarts=False, attention=match)
    lora = replace(config.lora, attention=match)
    if family != "toybox":
        embedding, lora = replace(embedding, train_steps=400, learning_rate=5e-4), replace(lora, train_steps=400)
    return replace(
        config,
        recipe="break-a-scene",
        masked_loss_by_area=False,  # its attention weight belongs to the loss by picture
        composites=CompositeConfig(),
        placements=0,
        locality_weight=0.0,
        prior=replace(config.prior, class_prompt=PriorConfig.class_prompt),
        embedding=embedding,
        lora=lora,
    )


def synthesis_preset(family: str) -> SynthesisConfig:
    """As `learn_preset`. SDXL's guidance looks at the middle block alone: the up block at the same level has three times the
    maps, for which a consumer GPU has no room."""
    if family == "sdxl":
        return SynthesisConfig(guidance=GuidanceConfig(blocks=("mid_block",), levels=(4,)))
    if family != "toybox":
        return SynthesisConfig()
    return SynthesisConfig(
        steps=20,
        guidance_scale=2.0,
        guidance=GuidanceConfig(steps=6, max_iterations=2, step_size_start=24.0, step_size_end=24.0, levels=(1, 2)),
        refinement=RefinementConfig(levels=(1,)),
    )


def edit_preset(family: str) -> EditConfig:
    """As `learn_preset`."""
    control = synthesis_preset(family)
    config = EditConfig(steps=control.steps, guidance_scale=control.guidance_scale, guidance=control.guidance)
    if family == "toybox":  # of so few steps none can be left out: colours come out wrong; and things were cut off (LOG.md)
        config = replace(config, blending_start_percentage=0.0, box_inset=0.1)
    return config
