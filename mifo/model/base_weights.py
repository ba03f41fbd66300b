"""The weight files of a base model's parts: plain or half-precision names, one file or shards."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..errors import InputError
from ..io.read_files import check_regular, read_regular
from ..io.terminal import command_line

#: part -> how diffusers and transformers name its weights
STEMS = {"text_encoder": "model", "text_encoder_2": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}
#: in the order in which they are taken; None is the plain name
VARIANTS = (None, "fp16", "bf16")
MAX_FILE_BYTES = 1 << 34
"""More than the largest checkpoint of Stable Diffusion XL, in fp32."""
MAX_CONFIG_BYTES = 1 << 24
#: What libraries open in the parts' folders.
READ_SUFFIXES = (".json", ".txt", ".safetensors", ".model")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def weighted_parts(folder: Path) -> tuple[str, ...]:
    """The parts with weights that a folder in diffusers' layout has: SDXL's have a second text encoder."""
    return tuple(part for part in STEMS if part != "text_encoder_2" or (folder / part).is_dir())


def has_weights(folder: Path, part: str, variant: str | None) -> bool:
    """Whether the part's folder holds weights of that variant, in one file or in shards with their index."""
    return any((folder / part / name).is_file() for name in _names(part, variant))


def variant_of(folder: Path, part: str) -> str | None:
    """Which variant of the part is there. Raises InputError when there is none; a pickle is never loaded."""
    for variant in VARIANTS:
        if has_weights(folder, part, variant):
            return variant
    wanted = f"{folder / part} has no {_names(part, None)[0]} (nor one named .fp16 or in shards)"
    if any(p.suffix in PICKLES for p in (folder / part).iterdir()):
        raise InputError(f"{wanted}, only a pickle, which could run code; if you trust it, convert it: {_convert_folder(folder)}")
    raise InputError(f"{wanted}; fetch or copy the base model again")


def weight_files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The files that hold the part's weights, each checked to be regular and of sane size. Raises InputError otherwise."""
    single, index = (folder / part / name for name in _names(part, variant))
    files = [single] if single.is_file() else [folder / part / name for name in _shards(index)]
    for path in files:
        check_file(path)
    return files


def check_file(path: Path) -> None:
    """Raises InputError unless `path` is a regular file of a size that a base model's weights can have."""
    try:
        check_regular(path, MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(f"{path} is no part of a Stable Diffusion model: {error.strerror}; fetch or copy the base "
                         "model again") from None  # fmt: skip


def check_files(folder: Path) -> None:
    """Raises InputError where something that a library would open in the parts' folders is no regular file: a pipe would be
    waited for, in C, where no signal is heard."""
    for path in (p for part in sorted(folder.iterdir()) if part.is_dir() for p in sorted(part.iterdir())):
        if path.suffix in READ_SUFFIXES and os.path.exists(path):
            check_file(path)


def _names(part: str, variant: str | None) -> tuple[str, str]:
    """File names of the weights in one file, and of the index of shards."""
    stem, suffix = STEMS[part], f".{variant}" if variant else ""
    return f"{stem}{suffix}.safetensors", f"{stem}.safetensors.index{suffix}.json"


def _shards(index: Path) -> list[str]:
    try:
        check_file(index)
        names = sorted(set(json.loads(read_regular(index, MAX_CONFIG_BYTES))["weight_map"].values()))
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index} is no index of safetensors files; fetch or copy the base model again") from None
    return names


def _convert_folder(folder: Path) -> str:
    return command_line("python", "-c", "from diffusers import StableDiffusionPipeline as P; "
                        f"P.from_pretrained({str(folder)!r}, use_safetensors=False)"
                        f".save_pretrained({folder.name + '-safetensors'!r})")  # fmt: skip


def convert_file(path: Path) -> str:
    """The command line that turns a trusted checkpoint into safetensors, loading numbers only."""
    return command_line("python", "-c", "import torch, safetensors.torch as s; "
                        f"c = torch.load({str(path)!r}, map_location='cpu', weights_only=True); "
                        "s.save_file({k: v.clone() for k, v in c.get('state_dict', c).items() if hasattr(v, 'shape')}, "
                        f"{str(path.with_suffix('.safetensors'))!r})")  # fmt: skip


# --- from the hub -------------------------------------------------------------------------------


def plain_patterns(parts: tuple[str, ...]) -> list[str]:
    """What is fetched first: configurations, the tokenizer, and the plain weights; never pickles."""
    return ["model_index.json", *(f"{part}/*.json" for part in parts),
            *(f"{part}/merges.txt" for part in parts if part.startswith("tokenizer")),
            *(f"{part}/{pattern}" for part in STEMS for pattern in _patterns(part, None))]  # fmt: skip


def variant_patterns(folder: Path) -> list[str]:
    """The half-precision weights of those parts whose plain ones a repository does not have."""
    absent = [part for part in STEMS if (folder / part).is_dir() and not has_weights(folder, part, None)]
    return [f"{part}/{pattern}" for part in absent for pattern in _patterns(part, "fp16")]


def _patterns(part: str, variant: str | None) -> tuple[str, str]:
    stem, suffix = STEMS[part], f".{variant}" if variant else ""
    return f"{stem}{suffix}.safetensors", f"{stem}{suffix}-*-of-*.safetensors"
