"""A bundle's files as other programs read them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file

from ..io.files import write_folder
from ..model.families import SDXL
from ..model.lora import published_name
from .store import Bundle

LORA_FILE = "pytorch_lora_weights.safetensors"
ROW_FILE = "{}.safetensors"
EXPORT = "export"  # of its manifest


def export_for_diffusers(bundle: Bundle, output: Path, overwrite: bool = False) -> None:
    """`pytorch_lora_weights.safetensors` for `load_lora_weights`, and one file per asset for `load_textual_inversion`. Of SDXL a
    file has the first text encoder's part as `clip_l` and the second one's as `clip_g`, as other programs expect it.

    Raises InputError when `output` cannot be written or has other things in it; with `overwrite` an earlier export is replaced.
    """
    prefixes = SDXL.adapters  # the names of parts are the same in every family
    weights = {}
    for adapter in bundle.adapters:
        saved = bundle.lora[adapter].weights
        own = {published_name(k).removeprefix("base_model.model."): v for k, v in saved.items()}
        weights.update({f"{prefixes[adapter]}.{k}": v for k, v in convert_state_dict_to_diffusers(own).items()})
    with write_folder(output, EXPORT, overwrite) as temporary:
        if weights:
            save_file(weights, temporary / LORA_FILE, metadata={"format": "pt"})
        for token, row in zip(bundle.tokens, bundle.token_embeddings, strict=True):
            save_file(_named_parts(token, row, bundle.widths), temporary / ROW_FILE.format(token.strip("<>")))


def _named_parts(token: str, row: torch.Tensor, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if len(widths) < 2:
        return {token: row.contiguous()}
    return {name: part.contiguous() for name, part in zip(("clip_l", "clip_g"), row.split(list(widths)), strict=True)}
