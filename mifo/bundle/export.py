"""A bundle's files as other programs read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import save_file

from ..io.files import write_folder
from ..model.families import SDXL
from ..model.lora import published_name
from .store import Bundle

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"
ROW_FILE = "{}.safetensors"
EXPORT = "export"  # of its manifest


def export_for_diffusers(bundle: Bundle, output: Path, overwrite: bool = False) -> None:
    """`pytorch_lora_weights.safetensors` for `load_lora_weights`, and one file per asset for `load_textual_inversion`. Of SDXL a
    file has the first text encoder's part as `clip_l` and the second one's as `clip_g`, as other programs expect it.

    Raises InputError when `output` cannot be written or has other things in it; with `overwrite` an earlier export is replaced.
    """
    weights = {}
    for part, saved in _by_part(bundle):
        weights.update({f"{part}.{k}": v for k, v in convert_state_dict_to_diffusers(saved).items()})
    _write(bundle, output, overwrite, LORA_FILE, weights)


def export_for_kohya(bundle: Bundle, output: Path, overwrite: bool = False) -> None:
    """`lora.safetensors` under the names of kohya's sd-scripts, which ComfyUI and AUTOMATIC1111 read, each layer with its alpha;
    and the assets' embeddings as `export_for_diffusers` writes them. Raises InputError as that does."""
    weights: dict[str, torch.Tensor] = {}
    for (part, saved), adapter in zip(_by_part(bundle), bundle.adapters, strict=True):
        alpha = torch.tensor(float(bundle.lora[adapter].config.lora_alpha))
        named: dict[str, torch.Tensor] = convert_state_dict_to_kohya({f"{part}.{k}": v for k, v in saved.items()})
        weights |= {name: alpha.clone() if name.endswith(".alpha") else weight for name, weight in named.items()}
    if len(bundle.widths) < 2:  # with one text encoder its layers have no number
        weights = {name.replace("lora_te1_", "lora_te_"): weight for name, weight in weights.items()}
    _write(bundle, output, overwrite, KOHYA_FILE, weights)


def _by_part(bundle: Bundle) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Part of the base model -> its adapter's weights as they were published, without PEFT's own prefix."""
    for adapter in bundle.adapters:
        saved = bundle.lora[adapter].weights
        own = {published_name(name).removeprefix("base_model.model."): weight for name, weight in saved.items()}
        yield SDXL.adapters[adapter], own  # the names of parts are the same in every family


def _write(bundle: Bundle, output: Path, overwrite: bool, name: str, weights: dict[str, torch.Tensor]) -> None:
    with write_folder(output, EXPORT, overwrite) as temporary:
        if weights:
            save_file({key: weight.contiguous() for key, weight in weights.items()}, temporary / name, metadata={"format": "pt"})
        for token, row in zip(bundle.tokens, bundle.token_embeddings, strict=True):
            save_file(_named_parts(token, row, bundle.widths), temporary / ROW_FILE.format(token.strip("<>")))


def _named_parts(token: str, row: torch.Tensor, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if len(widths) < 2:
        return {token: row.contiguous()}
    return {name: part.contiguous() for name, part in zip(("clip_l", "clip_g"), row.split(list(widths)), strict=True)}
