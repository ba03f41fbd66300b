"""At which sizes a base model looks at masks while it learns: its latents', and those of the supervised attention maps."""

from __future__ import annotations

import os
from pathlib import Path

from ..attention.sites import choose_sites, levels_within
from ..config import LearnConfig
from ..data.instance import bucket
from ..data.mask_sizes import MaskSizes
from ..errors import InputError
from ..model.base import BaseModel
from ..model.families import family_of
from ..model.load_base import TOYBOX_FOLDER, model_configs
from ..model.shapes import SHAPES, native_latents, shape_of
from ..model.single_file import is_single_file
from ..presets import learn_preset

BUCKET = 64  # pixels: SDXL's own step between aspect ratios


def learned_size(base: BaseModel, config: LearnConfig, photo: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels at which a photo of (width, height) is learned."""
    side = config.resolution or base.resolution
    if config.aspect == "square":
        return side, side
    return bucket(photo, side, BUCKET if side >= 512 and BUCKET % base.multiple == 0 else base.multiple)


def sizes_of(base: BaseModel, config: LearnConfig) -> MaskSizes:
    """At which sizes this model supervises masks under this configuration."""
    resolution = config.resolution or base.resolution
    latent = resolution // base.vae_factor
    maps = set()
    for terms in (config.embedding.attention, config.lora.attention):
        if terms.loss != "none" or terms.relative_penalty_weight:
            maps |= {site.map_size(latent, latent)[0] for site in choose_sites(base.unet, terms.blocks, terms.levels)}
    return MaskSizes(resolution, latent, tuple(sorted(maps, reverse=True)))


def sizes_by_name(name: str, resolution: int | None = None) -> MaskSizes:
    """The same for a model that is not loaded: from its configuration files where it is local, from what is known of its name, or
    as Stable Diffusion 1.x and 2.x. Raises InputError for a folder without them."""
    folder = TOYBOX_FOLDER if name == "toybox" else Path(name).expanduser()
    native, factor, depth, family = 64, 8, 4, "stable-diffusion"
    local = name and name not in SHAPES and os.path.exists(folder) and (folder.is_dir() or is_single_file(folder))
    if local or name in SHAPES:
        configs = model_configs(folder) if local else shape_of(name)
        family = "toybox" if name == "toybox" else family_of(configs["unet"]).name
        native, depth = native_latents(configs["unet"]), len(configs["unet"]["block_out_channels"])
        factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    config = learn_preset(family)
    latent = (resolution or native * factor) // factor
    if latent < 1:
        raise InputError(f"the resolution {resolution} is below one latent pixel ({factor}); give at least {16 * factor}")
    terms = (config.embedding.attention, config.lora.attention)
    levels = {level for each in terms for level in levels_within(each.levels, depth)}
    maps = sorted({-(-latent // level) for level in levels}, reverse=True)
    return MaskSizes(latent * factor, latent, tuple(maps))
