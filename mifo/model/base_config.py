"""A base model's configuration files: what must hold for a text-to-image model of Stable Diffusion 1.x, 2.x or XL."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.read_files import read_regular
from .families import family_of

CONFIG_FILES = {**dict.fromkeys(("text_encoder", "text_encoder_2", "vae", "unet"), "config.json"),
                "scheduler": "scheduler_config.json"}  # fmt: skip
#: UNets that expect more latents than those they denoise: channels -> what they are for
OTHER_KINDS = {9: "an inpainting model", 8: "an image-to-image model", 7: "an upscaler", 5: "a depth model"}
#: conditions beside the text that mifo gives no UNet
EXTRA_CONDITIONS = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
USE_INSTEAD = "give the text-to-image model that it was made from, such as sd1.5, sd2.1 or sdxl, with --model-path"

#: of a picture's size and crop, that SDXL's UNet is told
SIZE_NUMBERS = 6

Configs = Mapping[str, Mapping[str, Any]]


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """part -> configuration, of a folder in diffusers' layout. Raises InputError for a file that is no JSON object."""
    configs = {}
    for part, name in CONFIG_FILES.items():
        path = folder / part / name
        if part == "text_encoder_2" and not path.parent.is_dir():
            continue
        try:
            configs[part] = json.loads(read_regular(path, 1 << 20))
            if not isinstance(configs[part], dict):
                raise ValueError
        except (OSError, ValueError, RecursionError):
            raise InputError(f"{path} is missing or is no configuration; fetch or copy the base model again") from None
    return configs


def check_configs(configs: Configs, where: Path) -> None:
    """Raises InputError with the file and the key for a value that cannot be right, and for a model of another kind."""
    for part, key, expected, holds in _RULES:
        if part not in configs:
            continue
        value = configs[part].get(key)
        needed = key == "block_out_channels"  # the defaults are no Stable Diffusion's
        if not (holds(value) if value is not None or needed else True):
            raise InputError(
                f"{_place(where, part)} has {key} {str(value)[:50]!r}, expected {expected}; fetch or copy the base model again"
            )
    _check_kind(configs, where)
    start, end = configs["scheduler"].get("beta_start"), configs["scheduler"].get("beta_end")
    if start is not None and end is not None and start > end:
        place = _place(where, "scheduler")
        raise InputError(f"{place} has beta_start {start} above beta_end {end}; fetch or copy the base model again")


def _check_kind(configs: Configs, where: Path) -> None:
    unet = configs["unet"]
    latent = configs["vae"].get("latent_channels", 4)
    takes, gives = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if (takes, gives) != (latent, latent):
        kind = f" ({OTHER_KINDS[takes]})" if takes in OTHER_KINDS and latent == 4 else ""
        raise InputError(
            f"{where} is no text-to-image model{kind}: its UNet takes {takes} channels and gives {gives}, but the VAE's latents "
            f"have {latent}; {USE_INSTEAD} ('edit' fills masks with those too)"
        )
    family = family_of(unet)
    allowed = ("addition_embed_type",) if family.pooled else ()
    if extra := [key for key in EXTRA_CONDITIONS if unet.get(key) is not None and key not in allowed]:
        raise InputError(
            f"the UNet of {where} wants more than a text: {_place(where, 'unet')} has {extra[0]} {str(unet[extra[0]])[:50]!r} "
            f"(as distilled models do); this version works with Stable Diffusion 1.x, 2.x and XL: {USE_INSTEAD}"
        )
    if absent := [part for part in family.encoders if part not in configs]:
        raise InputError(f"the UNet of {where} is {family.title}'s, but there is no {absent[0]}; fetch or copy the model again")
    width, wanted = sum(configs[part].get("hidden_size", 512) for part in family.encoders), unet.get("cross_attention_dim", 1280)
    if width != wanted:
        each = "the text encoder gives" if len(family.encoders) == 1 else "the text encoders give together"
        raise InputError(
            f"the parts of {where} are of different models: {each} {width} numbers a token (hidden_size), the "
            f"UNet takes {wanted} (cross_attention_dim); fetch or copy the base model again"
        )
    if family.pooled:
        pooled, takes = configs[family.encoders[-1]].get("projection_dim", 512), unet.get("projection_class_embeddings_input_dim")
        given = pooled + SIZE_NUMBERS * int(unet.get("addition_time_embed_dim") or 0)
        if takes != given:
            raise InputError(
                f"the parts of {where} are of different models: the UNet takes {takes} numbers of text and size "
                f"(projection_class_embeddings_input_dim), but {pooled} of the text and {SIZE_NUMBERS} of the size make {given}; "
                f"if this is a refiner, {USE_INSTEAD}"
            )


def _place(where: Path, part: str) -> Path:
    """The file that a part's settings came from; a single file holds all parts."""
    return where if where.suffix == ".safetensors" else where / part / CONFIG_FILES[part]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= 1 << 20


def _is_beta(value: Any) -> bool:
    return _is_number(value) and 0 < value < 1


def _are_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and 0 < len(value) <= 16 and all(map(_is_count, value))


def _is_size(value: Any) -> bool:
    return _is_count(value) or (_are_counts(value) and len(value) == 2 and value[0] == value[1])


_COUNT = ("a whole number above 0", _is_count)
_BETA = ("a number between 0 and 1", _is_beta)
_RULES: tuple[tuple[str, str, str, Callable[[Any], bool]], ...] = (
    ("vae", "scaling_factor", "a number above 0, such as 0.18215", _is_positive),
    ("vae", "shift_factor", "a number", _is_number),
    ("vae", "in_channels", "3", lambda v: v == 3),
    ("vae", "out_channels", "3", lambda v: v == 3),
    ("vae", "latent_channels", *_COUNT),
    ("vae", "block_out_channels", "a list of whole numbers above 0", _are_counts),
    ("unet", "sample_size", "a whole number above 0, such as 64, for a square", _is_size),
    ("unet", "in_channels", *_COUNT),
    ("unet", "out_channels", *_COUNT),
    ("unet", "cross_attention_dim", *_COUNT),
    ("unet", "block_out_channels", "a list of whole numbers above 0", _are_counts),
    ("text_encoder", "hidden_size", *_COUNT),
    ("text_encoder", "max_position_embeddings", *_COUNT),
    ("text_encoder", "layer_norm_eps", "a number above 0", _is_positive),
    ("text_encoder_2", "hidden_size", *_COUNT),
    ("text_encoder_2", "projection_dim", *_COUNT),
    ("unet", "addition_time_embed_dim", *_COUNT),
    ("unet", "projection_class_embeddings_input_dim", *_COUNT),
    ("scheduler", "num_train_timesteps", *_COUNT),
    ("scheduler", "beta_start", *_BETA),
    ("scheduler", "beta_end", *_BETA),
    ("scheduler", "trained_betas", "a list of numbers between 0 and 1",
     lambda v: isinstance(v, list) and bool(v) and all(map(_is_beta, v))),
)  # fmt: skip
