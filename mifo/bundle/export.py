"""A bundle's files as other programs read them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..io.files import write_folder
from ..model.base import BaseModel
from .pipeline import merge_lora
from .published import diffusers_metadata, diffusers_weights, kohya_weights
from .store import Bundle

LORA_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"
EXPORT = "export"  # of its manifest


def export_for_diffusers(bundle: Bundle, output: Path, overwrite: bool = False) -> None:
    """`pytorch_lora_weights.safetensors` for `load_lora_weights`, and one file per asset for `load_textual_inversion`. Of SDXL a
    file has the first text encoder's part as `clip_l` and the second one's as `clip_g`, as other programs expect it.

    Raises InputError when `output` cannot be written or has other things in it; with `overwrite` an earlier export is replaced.
    """
    _write(bundle, output, overwrite, LORA_FILE, diffusers_weights(bundle.lora), diffusers_metadata(bundle.lora))


def export_for_kohya(bundle: Bundle, output: Path, overwrite: bool = False) -> None:
    """`lora.safetensors` under the names of kohya's sd-scripts, which ComfyUI and AUTOMATIC1111 read, each layer with its alpha;
    and the assets' embeddings as `export_for_diffusers` writes them. Raises InputError as that does."""
    _write(bundle, output, overwrite, KOHYA_FILE, kohya_weights(bundle.lora, len(bundle.widths)), {"format": "pt"})


def export_for_comfyui(bundle: Bundle, output: Path, overwrite: bool = False) -> None:
    """What ComfyUI looks for, in folders as it has them below `models`: `loras/NAME.safetensors` as kohya names it, and
    `embeddings/NAME-asset0.safetensors`, which a prompt calls `embedding:NAME-asset0`. A prompt ends that at white space and
    reads brackets and commas as its own, so `_` stands for all but letters, digits, `-` and `.` of the bundle's name. Raises
    InputError as the others do."""
    name = re.sub(r"[^\w.-]+", "_", bundle.name)
    _write(bundle, output, overwrite, f"loras/{name}.safetensors", kohya_weights(bundle.lora, len(bundle.widths)),
           {"format": "pt"}, f"embeddings/{name}-")  # fmt: skip


def export_pipeline(bundle: Bundle, base: BaseModel, output: Path, overwrite: bool = False) -> None:
    """A whole model for `from_pretrained`: the base with the tokens in its vocabulary and the LoRA added to its weights.

    Raises InputError as `export_for_diffusers` does, and when the bundle was learned on another base model.
    """
    pipe = bundle.to_pipeline(base)
    if bundle.adapters:
        merge_lora(pipe)
    with write_folder(output, EXPORT, overwrite) as temporary:
        pipe.save_pretrained(temporary)


def _write(bundle: Bundle, output: Path, overwrite: bool, name: str, weights: dict[str, torch.Tensor], metadata: dict[str, str],
           rows: str = "") -> None:  # fmt: skip
    """`rows`: what stands before the name of each embedding's file."""
    with write_folder(output, EXPORT, overwrite) as temporary:
        for path in (temporary / name, temporary / f"{rows}x"):
            path.parent.mkdir(exist_ok=True)
        if weights:
            save_file({key: weight.contiguous() for key, weight in weights.items()}, temporary / name, metadata=metadata)
        for token, row in zip(bundle.tokens, bundle.token_embeddings, strict=True):
            save_file(_named_parts(token, row, bundle.widths), temporary / f"{rows}{token.strip('<>')}.safetensors")


def _named_parts(token: str, row: torch.Tensor, widths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    if len(widths) < 2:
        return {token: row.contiguous()}
    return {name: part.contiguous() for name, part in zip(("clip_l", "clip_g"), row.split(list(widths)), strict=True)}
