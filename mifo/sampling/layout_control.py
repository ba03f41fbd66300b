"""Boxes -> what a denoising loop needs to hold assets in them: bounded attention, texts, and hooks around each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from ..attention.bounded import BoundedAttention, ForwardPass, Owners, bound_attention
from ..attention.compiled import is_compiled
from ..attention.sites import smallest_map
from ..boxes import Layout
from ..config import SynthesisConfig
from ..errors import InputError
from ..model.base import BaseModel
from ..model.prompt_embeds import ImageSize, PromptEmbeds
from ..prompts import TokenizedPrompt
from .denoise import is_guided
from .guidance import LatentGuidance, MaskRefinement


def latent_shape(base: BaseModel, config: SynthesisConfig) -> tuple[int, int]:
    """(h, w) of the latents. Raises InputError unless width and height are multiples that the UNet can halve and double."""
    sides = []
    for name, value in (("height", config.height), ("width", config.width)):
        pixels = value if value is not None else base.resolution
        base.check_side(f"--{name}", pixels)
        sides.append(pixels // base.vae_factor)
    return sides[0], sides[1]


def check_boxes(base: BaseModel, layout: Layout, latent_size: tuple[int, int]) -> None:
    """Raises InputError for a box that has no pixel on the model's smallest attention map."""
    smallest = smallest_map(base.unet, *latent_size)
    for _, box in layout:
        box.check_visible(*smallest)


def owners_of(base: BaseModel, layout: Layout) -> Owners | None:
    """Whose adapter acts where, while several bundles are lent."""
    local = base.local_lora
    return Owners(len(local.bundles), local.owners_of(layout.tokens), local.background) if local else None


@contextmanager
def controlled(base: BaseModel, control: BoundedAttention | None) -> Iterator[None]:
    """Within the block the UNet's attention obeys `control`, and adapters that act by place act where its subjects are.

    Raises InputError where there are such adapters and no place for them.
    """
    local = base.local_lora
    _check_places(base, control)
    if local and is_compiled(base.unet):
        raise InputError("--compile does not go with LoRA that acts by place; leave it out")
    with ExitStack() as stack:
        if control:
            stack.enter_context(bound_attention(base.unet, control))
        if local and control and control.owners:  # words alone have no adapter
            stack.enter_context(local.bound_to(control))
        yield


def _check_places(base: BaseModel, control: BoundedAttention | None) -> None:
    if base.local_lora and (control is None or not control.bounded):
        raise InputError("several bundles in one picture need a box for each asset, which bounds where its LoRA acts; give "
                         "--boxes, and leave bounded attention on")  # fmt: skip


@dataclass(frozen=True)
class Texts:
    """A picture's texts as the UNet reads them."""

    prompt: PromptEmbeds
    """(1, T * L, D): the prompt, and each subject's own"""
    negative: PromptEmbeds
    """(1, T * L, D)"""
    guiding: PromptEmbeds
    """(1, L, D): the prompt as guidance reads it"""


def read_texts(base: BaseModel, control: BoundedAttention | None, prompt: Sequence[int], negative: Sequence[int],
               size: ImageSize | None = None) -> Texts:  # fmt: skip
    """Token ids (L,) of the prompt and the negative prompt -> embeds. Where adapters act by place each subject's own text, and
    the negative prompt that it is guided away from, are read with its bundle's text encoders."""
    _check_places(base, control)
    texts = control.texts if control else [prompt]
    local = base.local_lora
    if not local or control is None or control.owners is None:
        positive, empty = encode_texts(base, texts, negative, size)
        return Texts(positive, empty, positive.first_tokens(len(prompt)))
    owners, length = [control.owners.background, *control.owners.of_subjects], len(prompt)  # of each text
    of_prompt: dict[int | None, PromptEmbeds] = {}
    of_nothing: dict[int | None, PromptEmbeds] = {}
    own: dict[int, torch.Tensor] = {}  # of each text, (1, L, D)
    for owner in dict.fromkeys([*owners, *(o for o in control.prompt_owners if o >= 0)]):
        theirs = [k for k, each in enumerate(owners) if each == owner and k]
        with local.reading_as(owner):
            read, empty = encode_texts(base, [prompt, *(texts[k] for k in theirs)], negative, size)
        of_prompt[owner], of_nothing[owner] = read.first_tokens(length), empty.first_tokens(length)
        for k, states in zip(theirs, read.states.split(length, 1)[1:], strict=True):
            own[k] = states
    first = of_prompt[owners[0]]
    own[0], guiding = first.states, first.states.clone()
    for position, owner in enumerate(control.prompt_owners):
        if owner >= 0:
            guiding[:, position] = of_prompt[owner].states[:, position]
    said, unsaid = [own[k] for k in range(len(texts))], [of_nothing[owner].states for owner in owners]
    return Texts(replace(first, states=torch.cat(said, 1)), replace(of_nothing[owners[0]], states=torch.cat(unsaid, 1)),
                 replace(first, states=guiding))  # fmt: skip


def encode_texts(base: BaseModel, texts: Sequence[Sequence[int]], negative: Sequence[int],
                 size: ImageSize | None = None) -> tuple[PromptEmbeds, PromptEmbeds]:  # fmt: skip
    """Token ids (T, L), (L,) -> embeds (1, T * L, D) of the texts, one behind another, and as many of the negative prompt's:
    repeated, so that its half of the attention is what it is for one. `size`: of the picture."""
    with torch.no_grad():
        if base.zero_negative:
            prompts = base.encode_prompt(torch.tensor([*texts]), size)
            empty = base.encode_negative(torch.tensor([negative]), size)
        else:
            both = base.encode_prompt(torch.tensor([*texts, negative]), size)
            prompts, empty = both[:-1], both[-1:]
    return prompts.one_behind_another(), empty.repeated(len(texts))


def layout_control(base: BaseModel, config: SynthesisConfig, prompt: TokenizedPrompt, layout: Layout | None,
                   latent_size: tuple[int, int], count: int) -> BoundedAttention | None:  # fmt: skip
    """What bounds attention to the boxes of `layout`; None where there are none, or nothing shall be bounded or guided."""
    if layout is None or not (config.bounded or config.guidance.enabled):
        return None
    owners = owners_of(base, layout)
    return BoundedAttention(prompt, layout, latent_size, base.device, (config.own_text or owners is not None) and config.bounded,
                            config.bounded, owners=owners,
                            sampling=ForwardPass(count, unconditional=is_guided(config.guidance_scale)))  # fmt: skip


class LayoutHooks:
    """The hooks of one run: box guidance before a step, mask refinement around it."""

    def __init__(self, base: BaseModel, config: SynthesisConfig, control: BoundedAttention | None, prompt_embeds: PromptEmbeds):
        self.guidance: LatentGuidance | None = None
        self.refinement: MaskRefinement | None = None
        if control is None:
            return
        self.guidance = LatentGuidance(base.unet, control, config.guidance, prompt_embeds)
        if config.bounded and config.refinement.enabled:
            self.refinement = MaskRefinement(base.unet, control, config.refinement, config.guidance.steps)

    def before_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if self.guidance:
            latents = self.guidance.guide(step, timestep, latents)
        if self.refinement:
            self.refinement.before(step)
        return latents

    def after_step(self, step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if self.refinement:
            self.refinement.after(step)
        return latents
