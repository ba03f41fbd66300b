"""A bundle's files as other programs read them."""

from __future__ import annotations

from pathlib import Path

from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file

from ..io.files import write_folder
from ..model.lora import published_name
from .store import Bundle

LORA_FILE = "pytorch_lora_weights.safetensors"
ROW_FILE = "{}.safetensors"
EXPORT = "export"  # of its manifest


def export_for_diffusers(bundle: Bundle, output: Path, overwrite: bool = False) -> None:
    """`pytorch_lora_weights.safetensors` for `load_lora_weights`, and one file per asset for `load_textual_inversion`.

    Raises InputError when `output` cannot be written or has other things in it; with `overwrite` an earlier export is replaced.
    """
    prefixes = {"unet_lora": "unet", "text_lora": "text_encoder"}
    weights = {}
    for adapter in bundle.adapters:
        saved = bundle.lora[adapter].weights
        own = {published_name(k).removeprefix("base_model.model."): v for k, v in saved.items()}
        weights.update({f"{prefixes[adapter]}.{k}": v for k, v in convert_state_dict_to_diffusers(own).items()})
    with write_folder(output, EXPORT, overwrite) as temporary:
        if weights:
            save_file(weights, temporary / LORA_FILE, metadata={"format": "pt"})
        for token, row in zip(bundle.tokens, bundle.token_embeddings, strict=True):
            save_file({token: row.contiguous()}, temporary / ROW_FILE.format(token.strip("<>")))
