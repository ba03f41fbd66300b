"""The toybox base model's shape: small parts of Stable Diffusion's own kinds, and a tokenizer of the world's words.

The weights come from scripts/toybox/train_toybox.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..io.json_text import json_text
from .draw import COLORS, PATTERNS
from .world import BACKGROUND_PHRASES, CLASS_NAMES


@dataclass(frozen=True)
class Shape:
    """Sizes that go together: pixels of a picture's side, pixels of a latent's side, channels of a latent, the VAE's blocks."""

    image_size: int
    vae_factor: int
    latent_channels: int
    vae_blocks: tuple[int, ...]
    vae_middle_attention: bool


SHIPPED = Shape(128, 8, 12, (16, 32, 64, 128), False)
TEXT_WIDTH = 128
MAX_TOKENS = 40
EXTRA_WORDS = ("a", "an", "the", "of", "and", "photo", "picture", "toy", "object", "thing", "background", "with", "two",
               "three", "one", "four", "small", "large", "left", "right")  # fmt: skip


def build_vae(shape: Shape = SHIPPED) -> AutoencoderKL:
    blocks = len(shape.vae_blocks)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=shape.vae_blocks, layers_per_block=1, latent_channels=shape.latent_channels, norm_num_groups=8,
        sample_size=shape.image_size, scaling_factor=1.0, mid_block_add_attention=shape.vae_middle_attention,
    )  # fmt: skip


def build_unet(shape: Shape = SHIPPED) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=shape.image_size // shape.vae_factor, in_channels=shape.latent_channels,
        out_channels=shape.latent_channels, block_out_channels=(64, 128), layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=(4, 4),
    )  # fmt: skip


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=4 * TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def scheduler_config() -> dict[str, Any]:
    """v-prediction down to pure noise (zero terminal SNR, Lin et al. 2023): flat backgrounds come out flat."""
    return {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
            "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}  # fmt: skip


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes vocab.json and merges.txt (CLIP's byte-pair format) and loads them. Each word of the world is one token."""
    words = list(dict.fromkeys(
        w for text in (*COLORS, *PATTERNS, *CLASS_NAMES, *BACKGROUND_PHRASES.values(), *EXTRA_WORDS) for w in text.split()
    ))  # fmt: skip
    symbols = _byte_symbols()
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _segment(word, merges)
        while len(pieces) > 1:  # join what earlier merges leave apart; later merges never disturb earlier words
            merges.append((pieces[0], pieces[1]))
            pieces = _segment(word, merges)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = list(dict.fromkeys(tokens))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json_text({s: i for i, s in enumerate(vocab)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS,
                         pad_token="<|endoftext|>")  # fmt: skip


def _segment(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one lower-case word: the earliest-learned merge first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while candidates := [(merges.index(p), i) for i, p in enumerate(pairwise(pieces)) if p in merges]:
        _, i = min(candidates)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE uses (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    codes = {b: b for b in printable} | {b: 256 + k for k, b in enumerate(rest)}
    return [chr(codes[b]) for b in [*printable, *rest]]
