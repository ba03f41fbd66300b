"""A base model with learned assets as a pipeline of diffusers, for programs that know nothing of mifo."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from ..model.base import BaseModel
from ..presets import synthesis_preset
from ..prompts import add_asset_tokens
from .published import Lora, diffusers_metadata, diffusers_weights


def make_pipeline(base: BaseModel, tokens: Sequence[str], token_embeddings: torch.Tensor, lora: Lora) -> Any:
    """A `StableDiffusionPipeline` or `StableDiffusionXLPipeline` that knows `tokens`, each with its row of `token_embeddings`
    (N, sum of the text encoders' widths), and has the LoRA loaded. SDXL's second encoder pools at the true end of a text, as the
    base's own does.

    The base model stays as it is: UNet and text encoders are copied, the VAE is shared. The sampler is the family's preset.
    """
    parts: dict[str, Any] = {name: copy.deepcopy(base.parts[name]) for name in ("unet", *base.layout.encoders)}
    vectors = token_embeddings.split(base.text_widths, dim=1)
    for index, (text, own) in enumerate(zip(base.layout.texts, vectors, strict=True)):
        tokenizer = copy.deepcopy(base.tokenizer)
        if index:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(base.padding_2)
        parts[text.tokenizer] = tokenizer
        _teach(tokenizer, parts[text.encoder], tokens, own)
    if base.layout.pooled:
        parts |= {"force_zeros_for_empty_prompt": base.zero_negative, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    sampler = base.sampler(synthesis_preset(base.family).scheduler)
    pipe = getattr(diffusers, base.layout.pipeline)(vae=base.vae, scheduler=sampler, **parts)
    if lora:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "lora.safetensors"
            save_file({k: v.contiguous() for k, v in diffusers_weights(lora).items()}, path, metadata=diffusers_metadata(lora))
            pipe.load_lora_weights(path)
    return pipe


def merge_lora(pipe: Any) -> None:
    """Adds the pipeline's LoRA to its weights, for good."""
    with torch.no_grad():
        pipe.fuse_lora(components=[name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipe, name)])
        pipe.unload_lora_weights()


def _teach(tokenizer: CLIPTokenizer, encoder: Any, tokens: Sequence[str], vectors: torch.Tensor) -> None:
    """As `load_textual_inversion`, also for tokens that the tokenizer has already."""
    add_asset_tokens(tokenizer, [token for token in tokens if token not in tokenizer.get_added_vocab()])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight
    table.data[[tokenizer.get_added_vocab()[token] for token in tokens]] = vectors.to(table)
