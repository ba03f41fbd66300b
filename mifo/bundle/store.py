"""The learned bundle on disk: whole or absent, no pickle, readable by peft and (exported) by diffusers.

    Model_ours/<name>/  bundle.json, assets.safetensors, unet_lora/, text_lora/, preview.png, attention.png, instance/
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from ..config import LearnConfig, from_dict, to_dict
from ..data.instance import MAX_ASSETS
from ..errors import InputError, did_you_mean
from ..io.files import write_folder
from ..io.json_text import json_text
from ..io.swap import finish_swaps
from ..model.base import BaseModel, is_local, public_name
from ..model.embedding import use_assets
from ..model.families import ADAPTERS
from ..model.load_base import HUB_MODELS, has_layout, identify
from ..model.lora import AGAIN, LORA_CONFIG, LORA_WEIGHTS, Adapter, lend_adapter, lora_config, save_adapter
from ..prompts import BACKGROUND_TOKEN, add_asset_tokens, asset_token
from .catalogue import RECORD
from .files import ROWS, Files, parse_json, parse_tensors, read_bundle_files, weights_digest
from .pipeline import make_pipeline

SCHEMA = 1
KIND = "bundle"  # of its manifest
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Bundle:
    """What `learn` hands to `synthesize`: the contract between them. All of it was read at one moment; what happens to the folder
    afterwards changes nothing."""

    name: str
    folder: Path
    base_name: str
    base_source: str
    """Hub id or folder that the base model came from; empty for a folder that the bundle does not name."""
    base_fingerprint: str
    tokens: tuple[str, ...]
    words: tuple[str, ...] | None
    token_embeddings: torch.Tensor
    """(N, D) fp32"""
    config: LearnConfig
    metadata: dict[str, Any] = field(default_factory=dict)
    """Everything else of bundle.json: versions, seconds, memory, attention shares."""
    lora: Mapping[str, Adapter] = field(default_factory=dict)
    """By the names in `ADAPTERS`; phase 2 may have been left out."""
    digest: str = ""
    """Of the token embeddings and the adapters."""
    instance: str | None = None
    """`references.instance_digest` of the kept instance; None for a bundle that does not hold its photo."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of an embedding in each text encoder; what stands one behind another in `token_embeddings`."""
        return tuple(self.metadata.get("embedding_widths") or (self.token_embeddings.shape[1],))

    @property
    def adapters(self) -> tuple[str, ...]:
        """Which of `families.ADAPTERS` the bundle has."""
        return tuple(a for a in ADAPTERS if a in self.lora)

    def to_pipeline(self, base: BaseModel) -> Any:
        """diffusers' own `StableDiffusionPipeline` or `StableDiffusionXLPipeline` with the assets, for prompts that name them.

        The base model stays as it is; boxes are not part of it. Raises InputError when the bundle was learned on another base.
        """
        check_base(base, self)
        return make_pipeline(base, self.tokens, self.token_embeddings, self.lora)


# --- on a base model ----------------------------------------------------------------------------


@contextmanager
def attach(base: BaseModel, bundle: Bundle, lora_scale: float = 1.0) -> Iterator[BaseModel]:
    """Lends the bundle's assets and adapters to the base model; afterwards the weights are as they were.

    The asset tokens stay in the tokenizer, where they do no harm. Raises InputError when the bundle was learned on another
    base model, or does not fit it.
    """
    check_fits(base, bundle)
    known = base.tokenizer.get_added_vocab()
    add_asset_tokens(base.tokenizer, [t for t in bundle.tokens if t not in known])
    ids = [base.tokenizer.get_added_vocab()[t] for t in bundle.tokens]
    parts = base.layout.adapters
    with ExitStack() as stack:
        stack.enter_context(use_assets(base.text_encoders, ids, bundle.token_embeddings))
        for name in bundle.adapters:
            stack.enter_context(lend_adapter(base.parts[parts[name]], bundle.lora[name], bundle.folder / name, lora_scale))
        yield base


def check_fits(base: BaseModel, bundle: Bundle) -> None:
    """Raises InputError when the bundle was learned on another base model, or does not fit it."""
    check_base(base, bundle)
    width = base.text_width
    if bundle.token_embeddings.shape[1] != width:
        raise InputError(
            f"{bundle.folder / 'assets.safetensors'} has embeddings of {bundle.token_embeddings.shape[1]} numbers, but the base "
            f"model {base.name} takes {width}; learn the bundle again"
        )
    if extra := [name for name in bundle.adapters if name not in base.layout.adapters]:
        raise InputError(f"{bundle.folder} has {extra[0]}, but {base.name} ({base.layout.title}) has no such part; {AGAIN}")


def base_of_bundle(bundle: Bundle) -> str:
    """The name by which `load_base_model` finds the bundle's own base model: a known name, a hub id, or a local folder.

    A bundle may come from a stranger, so of the hub's models only those in HUB_MODELS are taken, and a folder only if the model
    in it has the bundle's own fingerprint; nothing relative is followed. Raises InputError otherwise.
    """
    source = bundle.base_source
    if source == "toybox":
        return source
    if not os.path.isabs(source):
        for name, mirrors in HUB_MODELS.items():
            if source and (name == bundle.base_name or source in (repo for repo, _ in mirrors)):
                return name
    elif has_layout(Path(source)) and identify(Path(source))(bundle.base_fingerprint):
        return source
    asked_for = f"{bundle.base_name[:200]!r} (fingerprint {bundle.base_fingerprint[:10]})"
    raise InputError(f"{asked_for}, and {_why_not_found(source)}; give it with --model-path")


def _why_not_found(source: str) -> str:
    if not source:
        return "the bundle does not say where that local folder or file lies"
    if os.path.isabs(source):
        there = "what is there is no base model, or another one than it was"
        return f"the bundle names {source[:300]!r}, but {there if os.path.exists(source) else 'there is no such folder'}"
    if HUB_ID.fullmatch(source):
        return f"{source[:200]!r} is no model that mifo knows, which is not fetched only because a bundle names it"
    return f"{source[:200]!r} is neither toybox nor a hub id"


def check_base(base: BaseModel, bundle: Bundle) -> None:
    """Raises InputError when the bundle was not learned on this very base model."""
    if not base.matches(bundle.base_fingerprint):
        if base.family == "toybox" and bundle.base_source == "toybox":
            photo = f" ({bundle.folder / 'instance'} holds a copy)" if bundle.instance is not None else ""
            raise InputError(
                f"the bundle '{bundle.name}' was learned with another version's embedded model (fingerprint "
                f"{bundle.base_fingerprint[:10]}, this one has {base.fingerprint[:10]}); learn its photo again{photo}"
            )
        raise InputError(
            f"the bundle '{bundle.name}' was learned on {bundle.base_name} (fingerprint {bundle.base_fingerprint[:10]}), but "
            f"the base model is {base.name} (fingerprint {base.fingerprint[:10]}); give the one it was learned on with "
            "--model-path, or learn it again"
        )


# --- writing ------------------------------------------------------------------------------------


def save_bundle(folder: Path, base: BaseModel, tokens: tuple[str, ...], words: tuple[str, ...] | None, vectors: torch.Tensor,
                adapters: dict[str, PeftModel], config: LearnConfig, metadata: dict[str, Any],
                write_images: Callable[[Path], None] | None = None, overwrite: bool = False,
                keep_base_path: bool = False) -> Bundle:  # fmt: skip
    """Writes everything into a temporary folder beside `folder` and renames it; with `overwrite` a bundle of that name, in which
    all is as it was written, is replaced whole.

    Where a local base model lies is not written unless `keep_base_path`: its last name and its fingerprint find it again.

    `write_images` gets the temporary folder. Raises InputError when the disk is full, the folder
    cannot be written or holds anything else, or a learned value is not finite; what was there before is then untouched.
    """
    source = "" if is_local(base.source) and not keep_base_path else base.source
    with write_folder(folder, KIND, overwrite) as temporary:
        save_file({t: r.detach().float().cpu().clone() for t, r in zip(tokens, vectors, strict=True)},
                  temporary / "assets.safetensors")  # fmt: skip
        for name, adapter in adapters.items():
            save_adapter(adapter, temporary / name, source or base.public_name)
        if write_images:
            write_images(temporary)
        record = {
            "schema": SCHEMA,
            "name": folder.name,
            "base": {"name": base.public_name, "source": source, "revision": base.revision, "fingerprint": base.fingerprint},
            "tokens": list(tokens),
            "words": list(words) if words else None,
            "adapters": sorted(adapters),
            **({"embedding_widths": base.text_widths} if len(base.text_encoders) > 1 else {}),
            "config": to_dict(config),
            **metadata,
        }
        (temporary / RECORD).write_text(json_text(record, indent=2) + "\n")
        load_bundle(temporary)  # what cannot be read again replaces nothing
    return load_bundle(folder)


def is_bundle(folder: Path) -> bool:
    """True for a folder that has a bundle in it, whoever put it there."""
    return os.path.isfile(folder / "bundle.json")


# --- reading ------------------------------------------------------------------------------------


def find_bundle(model_id: str, output_dir: Path) -> Path:
    """The folder of `model_id`: a name under `output_dir`, or a path. Raises InputError listing what there is."""
    folders = [output_dir / model_id, Path(model_id)] if model_id else []
    for folder in folders:
        finish_swaps(folder.parent)
        if is_bundle(folder):
            return folder
    for folder in folders:
        if os.path.isdir(folder):
            raise InputError(f"{folder} is no learned bundle: it has no bundle.json; learn it again")
    names = sorted(p.parent.name for p in output_dir.glob("*/bundle.json") if not p.parent.name.startswith("."))
    there = f"there are {', '.join(names)}" if names else f"{output_dir} has none; run 'learn' first"
    raise InputError(f"there is no learned bundle '{model_id[:200]}': {there}{did_you_mean(model_id, names)}")


def load_bundle(folder: Path) -> Bundle:
    """Reads a bundle whole, and checks it. Raises InputError when a file is missing or corrupt or the schema is newer."""
    files, instance = read_bundle_files(folder)
    path, record = folder / RECORD, parse_json(files, folder, RECORD)
    try:
        schema = record["schema"]
        if type(schema) is not int or schema < 1:
            raise ValueError(f"the schema {str(schema)[:20]}")
        if schema > SCHEMA:
            raise InputError(f"{folder} has bundle schema {schema}, this version reads up to {SCHEMA}; update mifo")
        tokens, words = _read_tokens(record), _read_words(record)
        base = {k: str(record["base"][k]) for k in ("name", "source", "fingerprint")}
        base["name"] = public_name(base["name"], base["source"])  # older bundles have the path
        config = from_dict(LearnConfig, record["config"], native_latents=16 if base["source"] == "toybox" else 64)
        listed = [str(a) for a in record.get("adapters", ())]
    except InputError as error:
        raise InputError(f"{error} (reading {path})") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path} lacks or garbles {error}; {AGAIN}") from None
    vectors = _read_vectors(files, folder, tokens)
    lora = {}
    for name in ADAPTERS:
        if any(file.startswith(f"{name}/") for file in files):
            config_file = f"{name}/{LORA_CONFIG}"
            read = lora_config(parse_json(files, folder, config_file), folder / config_file)
            lora[name] = Adapter(read, parse_tensors(files, folder, f"{name}/{LORA_WEIGHTS}"))
        elif name in listed:
            raise InputError(f"{folder} is missing {name}/; {AGAIN}")
    _check_widths(record.get("embedding_widths"), vectors, path)
    metadata = {k: v for k, v in record.items() if k not in ("schema", "base", "tokens", "words", "config")}
    return Bundle(folder.resolve().name, folder, base["name"], base["source"], base["fingerprint"], tokens, words, vectors,
                  config, metadata, lora, weights_digest(files), instance)  # fmt: skip


def _read_tokens(record: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = record["tokens"]
    things = tokens[:-1] if tokens[-1:] == [BACKGROUND_TOKEN] else tokens
    if len(things) > MAX_ASSETS:  # before anything is done for each of them
        raise InputError(f"it has {len(things)} assets, but at most {MAX_ASSETS} are read; {AGAIN}")
    if not things or things != [asset_token(i) for i in range(len(things))]:
        raise ValueError(f"tokens {str(tokens)[:100]}, expected <asset0>, <asset1>, ...")
    return tuple(tokens)


def _read_words(record: Mapping[str, Any]) -> tuple[str, ...] | None:
    words = record["words"] or ()
    if len(words) > MAX_ASSETS + 1:
        raise InputError(f"it has words for {len(words)} assets, but at most {MAX_ASSETS} are read; {AGAIN}")
    return tuple(str(w) for w in words) or None


def _check_widths(widths: Any, vectors: torch.Tensor, path: Path) -> None:
    """Raises InputError unless the text encoders' widths add up to the embeddings'."""
    counts = isinstance(widths, list) and all(type(w) is int and w > 0 for w in widths)
    if widths is not None and not (counts and len(widths) == 2 and sum(widths) == vectors.shape[1]):
        shown = str(widths)[:50]
        raise InputError(f"{path} has embedding_widths {shown}, but its embeddings have {vectors.shape[1]} numbers; {AGAIN}")


def _read_vectors(files: Files, folder: Path, tokens: tuple[str, ...]) -> torch.Tensor:
    """(N, D) fp32"""
    found, path = parse_tensors(files, folder, ROWS), folder / ROWS
    missing = [t for t in tokens if t not in found]
    if missing:
        raise InputError(f"{path} has no row for {', '.join(missing)}; {AGAIN}")
    vectors = [found[t].float() for t in tokens]
    if any(v.ndim != 1 or v.shape != vectors[0].shape for v in vectors):
        raise InputError(f"{path} holds something else than finite vectors of one length; {AGAIN}")
    return torch.stack(vectors)
