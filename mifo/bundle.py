"""The learned bundle on disk: whole or absent, no pickle, readable by peft and (exported) by diffusers.

    Model_ours/<name>/  bundle.json, assets.safetensors, unet_lora/, text_lora/, preview.png, attention.png

Knows files and adapters. Knows nothing of how they were learned or what they will draw.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .base_model import BaseModel
from .config import LearnConfig, from_dict, to_dict
from .embedding import use_assets
from .errors import InputError
from .prompts import add_asset_tokens

SCHEMA = 1
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ADAPTERS = ("unet_lora", "text_lora")


@dataclass(frozen=True)
class Bundle:
    """What `learn` hands to `synthesize`: the contract between them."""

    name: str
    folder: Path
    base_name: str
    base_fingerprint: str
    tokens: tuple[str, ...]
    words: tuple[str, ...] | None
    rows: torch.Tensor
    """(N, D) fp32"""
    config: LearnConfig
    facts: dict[str, Any] = field(default_factory=dict)
    """Everything else of bundle.json: versions, seconds, memory, attention shares."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Which of `unet_lora`, `text_lora` the bundle has; phase 2 may have been left out."""
        return tuple(a for a in ADAPTERS if (self.folder / a).is_dir())


# --- adapters -----------------------------------------------------------------------------------


def add_adapters(base: BaseModel, rank: int, text_encoder: bool) -> dict[str, PeftModel]:
    """Fresh LoRA in every attention projection, fp32 whatever the base's dtype; the base's modules are changed in place."""
    adapters = {"unet_lora": get_peft_model(base.unet, LoraConfig(r=rank, lora_alpha=rank, target_modules=UNET_TARGETS))}
    if text_encoder:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TEXT_TARGETS)
        adapters["text_lora"] = get_peft_model(base.text_encoder, config)
    return adapters


@contextmanager
def attach(base: BaseModel, bundle: Bundle, lora_scale: float = 1.0) -> Iterator[BaseModel]:
    """Lends the bundle's assets and adapters to the base model; afterwards the weights are as they were.

    The asset tokens stay in the tokenizer, where they do no harm. Raises InputError when the bundle was learned on another
    base model.
    """
    check_base(base, bundle)
    known = base.tokenizer.get_added_vocab()
    new = [t for t in bundle.tokens if t not in known]
    if new:
        add_asset_tokens(base.tokenizer, new)
    ids = [base.tokenizer.get_added_vocab()[t] for t in bundle.tokens]
    parts = {"unet_lora": base.unet, "text_lora": base.text_encoder}
    attached = []
    with use_assets(base.text_encoder, ids, bundle.rows):
        try:
            for adapter in bundle.adapters:
                attached.append(PeftModel.from_pretrained(parts[adapter], str(bundle.folder / adapter)))
                for module in attached[-1].modules():
                    if isinstance(module, LoraLayer):
                        module.set_scale("default", lora_scale)
            yield base
        finally:
            for model in attached:
                model.unload()


def check_base(base: BaseModel, bundle: Bundle) -> None:
    """Raises InputError when the bundle was not learned on this very base model."""
    if base.fingerprint != bundle.base_fingerprint:
        raise InputError(
            f"the bundle '{bundle.name}' was learned on {bundle.base_name} (fingerprint {bundle.base_fingerprint[:8]}), but "
            f"the base model is {base.name} (fingerprint {base.fingerprint[:8]}); give the one it was learned on with "
            "--model-path, or learn it again"
        )


# --- writing ------------------------------------------------------------------------------------


def save_bundle(folder: Path, base: BaseModel, tokens: tuple[str, ...], words: tuple[str, ...] | None, rows: torch.Tensor,
                adapters: dict[str, PeftModel], config: LearnConfig, facts: dict[str, Any],
                write_pictures: Callable[[Path], None] | None = None) -> Bundle:  # fmt: skip
    """Writes everything into a temporary folder beside `folder` and renames it; a bundle of that name is replaced whole.

    Raises InputError when the disk is full or the folder cannot be written; what was there before is then untouched.
    """
    record = {
        "schema": SCHEMA,
        "name": folder.name,
        "base": {"name": base.name, "source": base.source, "revision": base.revision, "fingerprint": base.fingerprint},
        "tokens": list(tokens),
        "words": list(words) if words else None,
        "config": to_dict(config),
        **facts,
    }
    with replace_folder(folder) as temporary:
        save_file({t: r.detach().float().cpu().clone() for t, r in zip(tokens, rows, strict=True)},
                  temporary / "assets.safetensors")  # fmt: skip
        for name, adapter in adapters.items():
            _save_adapter(adapter, temporary / name, base.source)
        if write_pictures:
            write_pictures(temporary)
        (temporary / "bundle.json").write_text(json.dumps(record, indent=2) + "\n")
    return load_bundle(folder)


def _save_adapter(adapter: PeftModel, folder: Path, base_source: str) -> None:
    """PEFT's own format, weights in fp16: half the size, and far finer than a learning step."""
    folder.mkdir()
    weights = {k: v.detach().half().cpu().contiguous() for k, v in get_peft_model_state_dict(adapter).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapter.peft_config["default"]
    config.base_model_name_or_path = base_source
    config.inference_mode = True
    config.save_pretrained(str(folder))


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block succeeds, and vanishes when it does not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise unwritable(folder, error) from None
    try:
        yield temporary
        temporary.chmod(0o755)
        old = temporary.with_name(temporary.name + ".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unwritable(path: Path, error: Exception) -> InputError:
    """One message for every way in which writing fails."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return InputError(f"the disk is full: {path} was not written, nothing half-written is left; free some space")
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{path} cannot be written ({reason}); choose another output folder or change its permissions")


# --- reading ------------------------------------------------------------------------------------


def find_bundle(model_id: str, output_dir: Path) -> Path:
    """The folder of `model_id`: a name under `output_dir`, or a path. Raises InputError listing what there is."""
    for folder in (output_dir / model_id, Path(model_id)):
        if model_id and (folder / "bundle.json").is_file():
            return folder
    names = sorted(p.parent.name for p in output_dir.glob("*/bundle.json"))
    there = f"there are {', '.join(names)}" if names else f"{output_dir} has none; run 'learn' first"
    raise InputError(f"there is no learned bundle '{model_id}': {there}")


def load_bundle(folder: Path) -> Bundle:
    """Reads and checks a bundle. Raises InputError when a file is missing or corrupt or the schema is newer."""
    record = _read_record(folder / "bundle.json")
    try:
        schema = int(record["schema"])
        if schema > SCHEMA:
            raise InputError(f"{folder} has bundle schema {schema}, this version reads up to {SCHEMA}; update mifo")
        tokens = tuple(str(t) for t in record["tokens"])
        words = tuple(str(w) for w in record["words"]) if record["words"] else None
        base = record["base"]
        config = from_dict(LearnConfig, record["config"])
        names = str(base["name"]), str(base["fingerprint"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / 'bundle.json'} lacks or garbles {error}; learn the bundle again") from None
    rows = _read_rows(folder / "assets.safetensors", tokens)
    for adapter in ADAPTERS:
        if (folder / adapter).exists():
            _check_adapter(folder / adapter)
        elif adapter in record.get("adapters", ()):
            raise InputError(f"{folder} is missing {adapter}/; learn the bundle again")
    facts = {k: v for k, v in record.items() if k not in ("schema", "base", "tokens", "words", "config")}
    return Bundle(folder.name, folder, *names, tokens, words, rows, config, facts)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 22:
            raise InputError(f"{path} is {path.stat().st_size >> 20} MiB, a bundle.json has a few KiB; learn it again")
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing, so this is no bundle; learn it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({type(error).__name__}); learn the bundle again") from None
    if not isinstance(record, dict):
        raise InputError(f"{path} holds a {type(record).__name__}, expected an object; learn the bundle again")
    return record


def _read_rows(path: Path, tokens: tuple[str, ...]) -> torch.Tensor:
    try:
        rows = load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; learn the bundle again") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is corrupt ({str(error).splitlines()[0]}); learn the bundle again") from None
    missing = [t for t in tokens if t not in rows]
    if missing or not tokens:
        raise InputError(f"{path} has no row for {', '.join(missing) or 'any asset'}; learn the bundle again")
    stacked = torch.stack([rows[t].float() for t in tokens])
    if stacked.ndim != 2 or not torch.isfinite(stacked).all():
        raise InputError(f"{path} holds values that are not finite vectors; learn the bundle again")
    return stacked


def _check_adapter(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    for path in (folder / "adapter_config.json", weights):
        if not path.is_file():
            raise InputError(f"{path} is missing; learn the bundle again")
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{weights} is corrupt ({str(error).splitlines()[0]}); learn the bundle again") from None
    _read_record(folder / "adapter_config.json")
    if not all(bool(torch.isfinite(t).all()) for t in tensors.values()):
        raise InputError(f"{weights} holds values that are not finite; learn the bundle again")


# --- for other tools ----------------------------------------------------------------------------


def export_for_diffusers(base: BaseModel, bundle: Bundle, output: Path) -> None:
    """`pytorch_lora_weights.safetensors` for `load_lora_weights`, and one file per asset for `load_textual_inversion`."""
    with attach(base, bundle), replace_folder(output) as temporary:
        parts = {"unet_lora": base.unet, "text_lora": base.text_encoder}
        states = {a: convert_state_dict_to_diffusers(get_peft_model_state_dict(parts[a])) for a in bundle.adapters}
        if states:
            StableDiffusionPipeline.save_lora_weights(
                temporary, unet_lora_layers=states.get("unet_lora"), text_encoder_lora_layers=states.get("text_lora")
            )
        for token, row in zip(bundle.tokens, bundle.rows, strict=True):
            save_file({token: row.contiguous()}, temporary / f"{token.strip('<>')}.safetensors")
