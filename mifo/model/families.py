"""Families of base models as data: what Stable Diffusion 1.x/2.x and SDXL have in common, and in what they differ.

The jobs ask a `BaseModel` for its texts' embeds and hand them to `prompt_embeds.predict`; none of them knows a family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextPart:
    """A text encoder with its tokenizer, and the LoRA that a bundle holds for it."""

    encoder: str
    tokenizer: str
    kind: str
    """Its class in transformers."""
    adapter: str


@dataclass(frozen=True)
class Family:
    """What a base model of this kind consists of. Names of parts are those of their folders in diffusers' layout."""

    name: str
    """By which presets are chosen."""
    title: str
    pipeline: str
    """Its class in diffusers."""
    texts: tuple[TextPart, ...]
    hidden_layer: int | None = None
    """Which of a text encoder's hidden states the UNet reads: -2 is the last but one, as it is; None the last, normalized."""
    pooled: bool = False
    """Whether the UNet is also given the last text encoder's pooled embedding, and the picture's size and crop."""

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(text.encoder for text in self.texts)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The parts that have weights."""
        return (*self.encoders, "vae", "unet")

    @property
    def parts(self) -> tuple[str, ...]:
        """All folders."""
        return (*(text.tokenizer for text in self.texts), *self.weighted, "scheduler")

    @property
    def adapters(self) -> dict[str, str]:
        """A bundle's adapter -> the part that it belongs to."""
        return {"unet_lora": "unet", **{text.adapter: text.encoder for text in self.texts}}


_FIRST = TextPart("text_encoder", "tokenizer", "CLIPTextModel", "text_lora")
_SECOND = TextPart("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "text_lora_2")

SD = Family("stable-diffusion", "Stable Diffusion 1.x or 2.x", "StableDiffusionPipeline", (_FIRST,))
#: Podell et al., arXiv 2307.01952, section 2
SDXL = Family("sdxl", "Stable Diffusion XL", "StableDiffusionXLPipeline", (_FIRST, _SECOND), hidden_layer=-2, pooled=True)
FAMILIES = (SD, SDXL)
#: Of every family: a bundle's adapters, and the parts that have weights, in the order in which they are read.
ADAPTERS = tuple(SDXL.adapters)


def family_of(unet_config: Mapping[str, Any]) -> Family:
    """The family that a UNet's configuration belongs to: SDXL's is given a pooled text and the picture's size beside the text."""
    return SDXL if unet_config.get("addition_embed_type") == "text_time" else SD
