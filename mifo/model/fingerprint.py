"""What a base model is, as a short digest: its weights, its tokenizer and the settings that change pictures.

Computed from tensors and meaning, not from files' bytes: the same model saved again by another version of diffusers or
transformers, in shards or under half-precision names, has the same fingerprint; one changed weight gives another.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTokenizer

from ..errors import InputError
from ..io.json_text import json_text
from ..io.read_files import read_regular
from .base_config import read_configs
from .base_weights import MAX_CONFIG_BYTES, check_files, variant_of, weight_files, weighted_parts
from .digest_cache import remembered, stamp
from .families import family_of
from .samplers import read_scheduler
from .shapes import native_latents

KIND = "2:"
"""Stands before fingerprints of this kind; those without it are of files' bytes, as bundles had them before."""
PIECE = 1 << 22
"""Weights that are hashed at a time: 16 MiB in fp32."""
UNET_SETTINGS = (
    "down_block_types", "mid_block_type", "up_block_types", "layers_per_block", "attention_head_dim", "num_attention_heads",
    "norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos", "freq_shift", "center_input_sample", "downsample_padding",
    "mid_block_scale_factor", "only_cross_attention", "dual_cross_attention", "resnet_time_scale_shift",
    "resnet_out_scale_factor", "resnet_skip_time_act", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act",
    "cross_attention_norm",
)  # fmt: skip
VAE_SETTINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "norm_num_groups", "act_fn", "layers_per_block",
                "down_block_types", "up_block_types")  # fmt: skip
TEXT_SETTINGS = ("num_attention_heads", "num_hidden_layers", "hidden_act", "layer_norm_eps", "max_position_embeddings")
SCHEDULE_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
                     "rescale_betas_zero_snr")  # fmt: skip
#: how diffusers named a VAE's attention before 0.18
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def fingerprint(folder: Path) -> str:
    """Of a folder in diffusers' layout. Every weight is read: some seconds for a Stable Diffusion of 1 billion weights,
    the first time; it is remembered while the files stay as they are. Raises InputError for files that do not load."""
    files = {part: weight_files(folder, part, variant_of(folder, part)) for part in weighted_parts(folder)}
    others = [sub for sub in ("tokenizer", "tokenizer_2", "scheduler") if (folder / sub).is_dir()]
    small = [p for sub in (*others, *files) for p in (folder / sub).iterdir() if p.suffix in (".json", ".txt")]
    index = [folder / "model_index.json"] if (folder / "model_index.json").is_file() else []
    state = tuple((str(p), *stamp(p)) for p in sorted([*index, *small, *(p for each in files.values() for p in each)]))
    return _fingerprint(str(folder), state)


def fingerprint_of_parts(parts: Mapping[str, torch.nn.Module], configs: Mapping[str, Mapping[str, Any]], tokenizer: Any,
                         schedule: Any) -> str:  # fmt: skip
    """The same of loaded parts, whose weights must be those of the file: in its dtype, or in fp32."""
    digests = {part: _weights_digest(part, parts[part].state_dict().items()) for part in family_of(configs["unet"]).weighted}
    return _combine(digests, configs, tokenizer, schedule)


@lru_cache(maxsize=8)
def _fingerprint(folder_name: str, _: tuple[tuple[Any, ...], ...]) -> str:
    folder = Path(folder_name)
    check_files(folder)
    files = {part: weight_files(folder, part, variant_of(folder, part)) for part in weighted_parts(folder)}
    digests = {part: remembered(KIND + part, found, partial(_files_digest, part, found)) for part, found in files.items()}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        return _combine(digests, read_configs(folder), tokenizer, read_scheduler(folder))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever a wrong file leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"the base model in {folder} does not load ({reason}); fetch or copy it again") from None


def _combine(digests: Mapping[str, str], configs: Mapping[str, Mapping[str, Any]], tokenizer: Any, schedule: Any) -> str:
    text = CLIPTextConfig(**configs["text_encoder"])
    facts = {
        "weights": dict(digests),
        "unet": {**_settings(UNet2DConditionModel, configs["unet"], UNET_SETTINGS), "latents": native_latents(configs["unet"])},
        "vae": _settings(AutoencoderKL, configs["vae"], VAE_SETTINGS),
        "text_encoder": {name: getattr(text, name) for name in TEXT_SETTINGS},
        "schedule": {name: schedule.config.get(name) or None for name in SCHEDULE_SETTINGS},
        "tokenizer": tokenizer_meaning(tokenizer),
    }
    if "text_encoder_2" in digests:  # whose layers' settings are as the first one's but for these
        second = CLIPTextConfig(**configs["text_encoder_2"])
        facts["text_encoder_2"] = {name: getattr(second, name) for name in TEXT_SETTINGS}
    return KIND + hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()[:32]


def _settings(kind: Callable[..., Any], config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The configuration's values, or the class's own defaults: older files leave out what was the default then."""
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    found = {name: config.get(name, defaults.get(name)) for name in names}
    if isinstance(found.get("attention_head_dim"), int):  # one number stands for all blocks
        found["attention_head_dim"] = [found["attention_head_dim"]] * len(config.get("block_out_channels", (1,) * 4))
    return found


def tokenizer_meaning(tokenizer: Any, padding: bool = True) -> str:
    """A digest of what a freshly loaded CLIP tokenizer does to a text: vocabulary, merges, special tokens, longest prompt;
    without `padding`, whatever it fills up with."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        merges = json.loads(backend.to_str())["model"]["merges"]
    else:  # transformers 4's tokenizer in Python
        merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    special = ("bos_token", "eos_token", *(("pad_token",) if padding else ()), "unk_token")
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "special": [str(getattr(tokenizer, name)) for name in special],
        "length": tokenizer.model_max_length,
    }
    return hashlib.sha256(json_text(facts, sort_keys=True).encode()).hexdigest()


# --- weights ------------------------------------------------------------------------------------


def _files_digest(part: str, files: Iterable[Path]) -> str:
    def tensors() -> Iterable[tuple[str, torch.Tensor]]:
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    yield name, file.get_tensor(name)

    try:
        return _weights_digest(part, tensors())
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a hostile header makes safetensors raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"the base model's weights in {', '.join(map(str, files))} do not load ({reason}); fetch or copy it "
                         "again") from None  # fmt: skip


def _weights_digest(part: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """One digest a tensor, two at a time: hashing runs outside of Python's lock."""
    with ThreadPoolExecutor(2) as pool:
        waiting = {name: pool.submit(_tensor_digest, t) for given, t in tensors if (name := weight_name(part, given))}
        found = sorted((name, digest.result()) for name, digest in waiting.items())
    return hashlib.sha256(json_text(found).encode()).hexdigest()


def weight_name(part: str, name: str) -> str:
    """The weight's name whatever version saved it; empty for what is no weight."""
    if name.endswith("position_ids"):
        return ""  # 0, 1, 2, ...: saved by transformers before 4.31
    if part in ("text_encoder", "text_encoder_2"):
        return name.removeprefix("text_model.")
    return re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{OLD_NAMES[m[1]]}.", name) if part == "vae" else name


def _tensor_digest(tensor: torch.Tensor) -> str:
    """Of the shape and the values. Half-precision values are compared as the fp32 numbers that they are, so a model that was
    only saved at a higher precision is the same."""
    digest = hashlib.sha256(json_text(list(tensor.shape)).encode())
    for piece in tensor.detach().cpu().flatten().split(PIECE):
        digest.update(piece.float().contiguous().numpy().data)
    return digest.hexdigest()


# --- as bundles had it before -------------------------------------------------------------------


def file_fingerprint(folder: Path) -> str:
    """Of files' bytes, as bundles made before `KIND` have it: configurations and weights, of files above 64 MiB in samples."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "unet", "vae", "scheduler"):
        for path in sorted((folder / part).iterdir()):
            if not path.is_file():
                continue
            if path.suffix == ".json" and "config" in path.name:
                try:
                    config = json.loads(read_regular(path, MAX_CONFIG_BYTES))
                    settings = {k: v for k, v in config.items() if not k.startswith("_")}
                    described = json_text([part, path.name, settings], sort_keys=True)
                except (OSError, ValueError, AttributeError, RecursionError):
                    raise InputError(f"{path} is no JSON object; fetch or copy the base model again") from None
                digest.update(described.encode())
            elif path.suffix == ".safetensors":
                digest.update(_sample_weights(path))
    return digest.hexdigest()[:32]


def _sample_weights(path: Path) -> bytes:
    """A small file whole; of a large one its start, with the header, and 64 spread pieces, the last at the end."""
    size, piece, pieces = path.stat().st_size, 1 << 16, 64
    if size <= 1 << 26:
        return path.read_bytes()
    with path.open("rb") as file:
        parts = [str(size).encode(), file.read(1 << 20)]
        for k in range(pieces):
            file.seek((size - piece) * k // (pieces - 1))
            parts.append(file.read(piece))
    return b"".join(parts)
