"""The shapes of Stable Diffusion 1.5, 2.1 (at 512 and at 768 pixels) and XL as published: configurations without weights."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

VOCABULARY = 49408
"""CLIP's: `<|startoftext|>` and `<|endoftext|>` are the last two."""
WIDTH_DIVISORS = (1, 2, 4, 8)

_UNET = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
_VAE = {
    "sample_size": 512, "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.18215,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_TEXT = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 77, "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1,
    "pad_token_id": VOCABULARY - 1,
}  # fmt: skip
_SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip

_SD21 = {
    "unet": {**_UNET, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "vae": _VAE,
    "text_encoder": {**_TEXT, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                     "num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu"},
}  # fmt: skip

#: name -> part -> configuration. Stable Diffusion 2.1 was published twice: at 512 pixels, where it predicts noise ("2-1-base",
#: which `--model-path sd2.1` downloads), and at 768, where it predicts velocity.
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "sd1.5": {
        "unet": {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _VAE,
        "text_encoder": {**_TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                         "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu"},
        "scheduler": {**_SCHEDULER, "prediction_type": "epsilon"},
    },
    "sd2.1": {**_SD21, "scheduler": {**_SCHEDULER, "prediction_type": "epsilon"}},
    "sd2.1-768": {
        **_SD21,
        "unet": {**_SD21["unet"], "sample_size": 96},
        "vae": {**_VAE, "sample_size": 768},
        "scheduler": {**_SCHEDULER, "prediction_type": "v_prediction"},
    },
    "sdxl": {
        "unet": {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "norm_num_groups": 32,
            "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        "vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text_encoder": {**_TEXT, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                         "num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu"},
        "text_encoder_2": {**_TEXT, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                           "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"},
        "scheduler": {**_SCHEDULER, "prediction_type": "epsilon"},
    },
}  # fmt: skip


def native_latents(unet_config: Mapping[str, Any]) -> int:
    """Side of the latents that a UNet was trained at, by its configuration.

    Configurations from before diffusers 0.9 say 32 for Stable Diffusion 1.x, which was trained at 64; diffusers' own pipelines
    read them as 64 as well, and take 64 where nothing is said. Raises ValueError for a size that is not square.
    """
    size = unet_config.get("sample_size") or 64
    if isinstance(size, list | tuple):
        if len(set(size)) != 1:
            raise ValueError(f"sample_size {list(size)} is not square")
        size = size[0]
    before_0_9 = str(unet_config.get("_diffusers_version", "")).startswith(tuple(f"0.{minor}." for minor in range(9)))
    return max(64, int(size)) if before_0_9 else int(size)


def shape_of(name: str, width_divisor: int = 1) -> dict[str, dict[str, Any]]:
    """Configurations by part: unet, vae, text_encoder (and text_encoder_2), scheduler. `width_divisor` narrows every layer and
    keeps the rest.

    The number of layers, heads, sites and map sizes stays, so a narrow model takes the same paths as the real one. Raises
    KeyError for a name that is not in SHAPES, ValueError for a divisor that is not in WIDTH_DIVISORS.
    """
    if width_divisor not in WIDTH_DIVISORS:
        raise ValueError(f"the width divisor is {width_divisor}; choose one of {WIDTH_DIVISORS}")
    shape = deepcopy(SHAPES[name])
    for part, keys in (("unet", ("cross_attention_dim", "norm_num_groups")), ("vae", ("norm_num_groups",)),
                       *((name, ("hidden_size", "intermediate_size", "projection_dim"))
                         for name in ("text_encoder", "text_encoder_2") if name in shape)):  # fmt: skip
        for key in keys:
            shape[part][key] //= width_divisor
    if "text_encoder_2" in shape:
        shape["unet"]["addition_time_embed_dim"] //= width_divisor
        shape["unet"]["projection_class_embeddings_input_dim"] //= width_divisor
    for part in ("unet", "vae"):
        shape[part]["block_out_channels"] = [c // width_divisor for c in shape[part]["block_out_channels"]]
    return shape
