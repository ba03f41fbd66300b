"""A bundle's adapters under the names by which other programs know them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya

from ..io.json_text import json_text
from ..model.families import ADAPTERS, SDXL
from ..model.lora import Adapter, published_name

Lora = Mapping[str, Adapter]
#: where diffusers looks for each part's rank and alpha in the metadata of a safetensors file
METADATA_KEY = "lora_adapter_metadata"


def diffusers_weights(lora: Lora) -> dict[str, torch.Tensor]:
    """As `load_lora_weights` reads them."""
    found: dict[str, torch.Tensor] = {}
    for part, _, weights in _by_part(lora):
        found.update({f"{part}.{k}": v for k, v in convert_state_dict_to_diffusers(weights).items()})
    return found


def diffusers_metadata(lora: Lora) -> dict[str, str]:
    """Rank, alpha and layers of each part. One entry, because several are written in a random order."""
    facts: dict[str, Any] = {}
    for part, adapter, _ in _by_part(lora):
        config = adapter.config
        facts |= {f"{part}.r": config.r, f"{part}.lora_alpha": config.lora_alpha,
                  f"{part}.target_modules": sorted(config.target_modules or ())}  # fmt: skip
    return {METADATA_KEY: json_text(facts, indent=2, sort_keys=True)}


def kohya_weights(lora: Lora, text_encoders: int) -> dict[str, torch.Tensor]:
    """As kohya's sd-scripts write them, which ComfyUI and AUTOMATIC1111 read: each layer with its alpha, and text encoders
    with a number where there are two."""
    found: dict[str, torch.Tensor] = {}
    for part, adapter, weights in _by_part(lora):
        alpha = torch.tensor(float(adapter.config.lora_alpha))
        named: dict[str, torch.Tensor] = convert_state_dict_to_kohya({f"{part}.{k}": v for k, v in weights.items()})
        found |= {name: alpha.clone() if name.endswith(".alpha") else weight for name, weight in named.items()}
    if text_encoders < 2:
        found = {name.replace("lora_te1_", "lora_te_"): weight for name, weight in found.items()}
    return found


def _by_part(lora: Lora) -> Iterator[tuple[str, Adapter, dict[str, torch.Tensor]]]:
    """Part of the base model, its adapter, and its weights as they were published, without PEFT's own prefix."""
    for name in (a for a in ADAPTERS if a in lora):
        saved = lora[name].weights
        own = {published_name(key).removeprefix("base_model.model."): weight for key, weight in saved.items()}
        yield SDXL.adapters[name], lora[name], own  # the names of parts are the same in every family
