"""A random model in the toybox's shape, instances to learn on it, and a bundle learned in seconds, for the tests of files
and commands. What the pictures show does not matter there."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner, Result

from mifo.cli import app

ROOT = Path(__file__).resolve().parent.parent
FAST = ["--phase1-train-steps", "2", "--phase2-train-steps", "2", "--num-class-images", "1", "--lora-rank", "2",
        "--keep-base-path"]  # fmt: skip


@functools.cache
def _scratch() -> Path:
    """One folder for all test files of a run; it vanishes with the process."""
    holder = tempfile.TemporaryDirectory(prefix="mifo-tests-")
    _holders.append(holder)
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory] = []


@functools.cache
def tiny_base_folder(seed: int = 0) -> Path:
    """A Stable Diffusion folder of random weights, as diffusers itself writes it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    from mifo.toybox.architecture import build_text_encoder, build_tokenizer, build_unet, build_vae, scheduler_config

    torch.manual_seed(seed)
    # the toybox's layers, a fraction as wide: commands run on it hundreds of times
    unet = UNet2DConditionModel(**{**_settings(build_unet()), "block_out_channels": (16, 32), "norm_num_groups": 8})
    vae = AutoencoderKL(**{**_settings(build_vae()), "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4})
    folder = _scratch() / f"base{seed}"
    tokenizer = build_tokenizer(_scratch() / f"tokenizer{seed}")
    StableDiffusionPipeline(
        vae=vae, text_encoder=build_text_encoder(tokenizer), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler.from_config(scheduler_config()), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _settings(part: Any) -> dict[str, Any]:
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


@functools.cache
def tiny_xl_folder(seed: int = 0) -> Path:
    """A Stable Diffusion XL folder of random weights: two text encoders of different widths, sizes, a second padding."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from mifo.toybox.architecture import build_tokenizer

    torch.manual_seed(seed)
    folder, words = _scratch() / f"xl{seed}", _scratch() / f"xl_tokenizer{seed}"
    tokenizer = build_tokenizer(words)
    second = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=40, pad_token="!")

    def text(width: int, layers: int, eos: int) -> CLIPTextConfig:
        return CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
                              num_attention_heads=4, max_position_embeddings=40, projection_dim=24, eos_token_id=eos)  # fmt: skip

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=80,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )  # fmt: skip
    for name, weight in unet.named_parameters():
        if ".to_q." in name or ".to_k." in name:
            weight.data.mul_(3)  # uneven maps
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1, scaling_factor=0.13025,
                        sample_size=128)  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae, text_encoder=CLIPTextModel(text(32, 2, tokenizer.eos_token_id)), tokenizer=tokenizer, tokenizer_2=second,
        text_encoder_2=CLIPTextModelWithProjection(text(48, 3, 2)), unet=unet, add_watermarker=False,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                set_alpha_to_one=False, steps_offset=1),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_instance(folder: Path, assets: int = 2, size: tuple[int, int] = (96, 64)) -> Path:
    """`assets` coloured squares in a row on grey, and their masks."""
    folder.mkdir(parents=True)
    image = Image.new("RGB", size, "grey")
    for index in range(assets):
        left = index * size[0] // assets
        box = (left + 2, size[1] // 4, left + size[0] // assets - 3, 3 * size[1] // 4)
        ImageDraw.Draw(image).rectangle(box, fill=(200 - 30 * index % 200, 60 * index % 255, 90))
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        mask.save(folder / f"mask{index}.png")
    image.save(folder / "img.png")
    return folder


def load_base() -> Any:
    """A fresh copy of the tiny model, which a test may spoil."""
    from mifo.model.load_base import load_base_model

    return load_base_model(str(tiny_base_folder()))


@functools.cache
def tiny_bundle_folder() -> Path:
    """A bundle of two assets learned on the tiny model. Never write into it: `copy_bundle` gives one to spoil."""
    return _learn_two_cups(load_base(), "two_cups")


@functools.cache
def tiny_xl_bundle_folder() -> Path:
    """The same on the tiny XL model."""
    from mifo.model.load_base import load_base_model

    return _learn_two_cups(load_base_model(str(tiny_xl_folder())), "two_xl_cups")


def _learn_two_cups(base: Any, name: str) -> Path:
    from mifo.data.instance import load_instance
    from mifo.learning.learn import learn
    from mifo.presets import learn_preset

    config = learn_preset(base.family)
    config = replace(
        config,
        embedding=replace(config.embedding, train_steps=2),
        lora=replace(config.lora, train_steps=2, learning_rate=1e-2),  # so large that the adapters do something
        prior=replace(config.prior, num_class_images=1, sampling_steps=2),
    )
    instance = load_instance(write_instance(_scratch() / name))
    return learn(instance, base, config, _scratch() / "bundles" / name, keep_base_path=True).folder


def copy_bundle(parent: Path, name: str = "two_cups") -> Path:
    return Path(shutil.copytree(tiny_bundle_folder(), parent / name))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def mifo(*arguments: object, exit_code: int = 0) -> Result:
    """The command line in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == exit_code, result.output
    return result


def learn_arguments(instance: Path, output: Path, *more: object) -> Sequence[object]:
    """A short `learn` of an instance folder on the tiny model."""
    return ["learn", instance, "--model-path", tiny_base_folder(), "--output-dir", output, *FAST, *more]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` (hidden ones too) with its content; None for folders."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
