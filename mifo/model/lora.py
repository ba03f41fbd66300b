"""LoRA on a base model's attention: fresh adapters to be trained, learned ones lent for a while, and their files.

The files are PEFT's own: `adapter_config.json` and `adapter_model.safetensors`, weights in fp16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from ..errors import InputError
from .base import BaseModel
from .half_precision import follow_input_dtype

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
#: Layers that adapters of other programs may have too: feed-forward, projections around attention, convolutions.
KNOWN_TARGETS = (*UNET_TARGETS, *TEXT_TARGETS, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "fc1", "fc2", "conv_in",
                 "conv_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv")  # fmt: skip
LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
AGAIN = "learn the bundle again"


@dataclass(frozen=True)
class Adapter:
    """One LoRA as it was read. The tensors are shared; never write into them."""

    config: LoraConfig
    weights: Mapping[str, torch.Tensor]


def add_adapters(base: BaseModel, rank: int, text_encoder: bool, seed: int = 0) -> dict[str, PeftModel]:
    """Fresh LoRA in every attention projection, fp32 whatever the base's dtype; the base's modules are changed in place.

    Starts from `seed` alone; PyTorch's own random state stays as it was.
    """
    unet: Any = base.unet
    with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        adapters = {"unet_lora": get_peft_model(unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=UNET_TARGETS))}
        for text in base.layout.texts if text_encoder else ():
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TEXT_TARGETS)
            adapters[text.adapter] = get_peft_model(base.parts[text.encoder], config)
    for adapter in adapters.values():
        follow_input_dtype(adapter)
    return adapters


@contextmanager
def lend_adapter(part: Any, adapter: Adapter, folder: Path, scale: float) -> Iterator[None]:
    """A bundle's adapter in `part`, frozen and fp32, for as long as the block lasts.

    Only rank, alpha and targets are taken from its configuration; the rest could name code to run. Raises InputError when
    the weights are not those of this model's layers.
    """
    model = filled_adapter(part, adapter, folder)
    try:
        follow_input_dtype(model)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale("default", scale)
        yield
    finally:
        remove_adapter(model)


def filled_adapter(part: Any, adapter: Adapter, folder: Path) -> PeftModel:
    """`part` with the adapter in it. Raises InputError, and leaves `part` as it was, for weights that are not its layers'."""
    model = get_peft_model(part, copy(adapter.config))
    try:
        _fill_adapter(model, adapter.weights, folder)
    except BaseException:
        remove_adapter(model)
        raise
    return model


def remove_adapter(adapter: PeftModel) -> None:
    """Gives the module its own layers back, and leaves nothing of the adapter in it."""
    module = adapter.unload()
    vars(module).pop("peft_config", None)  # peft before 0.20 leaves it, and warns of it when the next adapter comes


def published_name(name: str) -> str:
    """Newer transformers have no `text_model` in a CLIPTextModel; older ones, and adapters as other programs read them, do.

    A bundle has the names of the versions that learned it, as PEFT's own loading wants them.
    """
    return name.replace("base_model.model.encoder.", "base_model.model.text_model.encoder.")


def lora_config(record: Mapping[str, Any], path: Path) -> LoraConfig:
    rank, alpha, targets = record.get("r"), record.get("lora_alpha"), record.get("target_modules")
    known = isinstance(targets, list) and len(targets) > 0 and all(target in KNOWN_TARGETS for target in targets)
    if type(rank) is not int or type(alpha) is not int or not (0 < rank <= 1024 and 0 < alpha <= 1024 and known):
        shown = f"r {rank!r}, lora_alpha {alpha!r}, target_modules {targets!r}"[:200]
        raise InputError(f"{path} has {shown}, which is no adapter that mifo writes; {AGAIN}")
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, inference_mode=True)


def _fill_adapter(model: PeftModel, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Loads every weight of the adapter, and nothing else."""
    expected = {k: v.shape for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    own_names = {published_name(name): name for name in expected}
    named = {own_names.get(published_name(name), name): weight for name, weight in weights.items()}
    if {k: v.shape for k, v in named.items()} != expected:
        raise InputError(f"{folder / LORA_WEIGHTS} does not fit the base model's layers; {AGAIN}")
    set_peft_model_state_dict(model, named)


def save_adapter(adapter: PeftModel, folder: Path, base_source: str) -> None:
    """PEFT's own format, weights in fp16: half the size, and far finer than a learning step."""
    folder.mkdir()
    state = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    weights = {k: v.detach().half().cpu().contiguous() for k, v in state.items()}
    save_file(weights, folder / LORA_WEIGHTS, metadata={"format": "pt"})
    config: Any = copy(adapter.peft_config["default"])
    config.base_model_name_or_path = base_source
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set's order would change from run to run
    config.save_pretrained(str(folder))
