"""A whole checkpoint of Stable Diffusion 1.x, 2.x or XL in one safetensors file, in the layout of the original code.

diffusers converts the weights; it asks the hub for the configurations, which here come from the shapes that are known.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import InputError
from ..io.json_text import json_text
from .base_weights import PICKLES, check_file, convert_file
from .families import Family, family_of
from .shapes import WIDTH_DIVISORS, shape_of

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
#: SDXL's two text encoders
TEXT_1, TEXT_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
#: entries by which fine-tunes of SDXL say that they predict velocity, and down to pure noise
VELOCITY, PURE_NOISE = "v_pred", "ztsnr"
FIRST, LAST = UNET + "input_blocks.0.0.weight", UNET + "out.2.weight"
#: of the original SD 2.0 base at 512 pixels; the other checkpoints of SD 2 were trained on
STEPS_OF_THE_512_BASE = 875_000


def is_single_file(path: Path) -> bool:
    """Whether `path` stands for a checkpoint in one file. Raises InputError for a pickle, with the way to convert it."""
    if not path.is_file():
        return False
    if path.suffix.lower() in PICKLES:
        raise InputError(
            f"{path} is a pickle, which could run code, and is not opened; a checkpoint is converted, loading numbers only, "
            f"by: {convert_file(path)}"
        )
    return path.suffix == ".safetensors"


def configs_of_file(path: Path) -> dict[str, dict[str, Any]]:
    """part -> configuration, from the weights' shapes; the weights themselves are not read. Raises InputError for a file that is
    no whole Stable Diffusion 1.x, 2.x or XL checkpoint."""
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            shapes = {n: file.get_slice(n).get_shape() for n in (FIRST, LAST) if n in names}
            steps = int(file.get_tensor("global_step")) if "global_step" in names else None
    except Exception as error:  # whatever a hostile header makes safetensors raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} does not load ({reason}); fetch or copy it again") from None
    _check_parts(path, names)
    widths = {320 // divisor: divisor for divisor in WIDTH_DIVISORS}  # narrow ones are for trying things out
    if set(shapes) != {FIRST, LAST} or len(shapes[FIRST]) != 4 or shapes[FIRST][0] not in widths:
        raise InputError(f"{path} has no UNet of Stable Diffusion 1.x, 2.x or XL; give another --model-path")
    channels = {"in_channels": shapes[FIRST][1], "out_channels": shapes[LAST][0]}
    if is_xl(names):
        configs = shape_of("sdxl", widths[shapes[FIRST][0]])
        configs["unet"] |= channels
        if VELOCITY in names:
            configs["scheduler"] |= {"prediction_type": "v_prediction"}
        if PURE_NOISE in names:
            configs["scheduler"] |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return configs
    second = any(n.startswith(TEXT + "model.") for n in names)
    velocity = _predicts_velocity(path, second, steps)
    name = ("sd2.1-768" if velocity else "sd2.1") if second else "sd1.5"
    configs = shape_of(name, widths[shapes[FIRST][0]])
    configs["unet"] |= channels
    if velocity and not second:  # no such model was published, but its configuration says so
        configs["unet"]["sample_size"], configs["vae"]["sample_size"] = 96, 768
        configs["scheduler"]["prediction_type"] = "v_prediction"
    return configs


def _check_parts(path: Path, names: set[str]) -> None:
    parts = {"UNet": UNET, "VAE": VAE, "text encoder": TEXT}
    if is_xl(names):
        parts = {"UNet": UNET, "VAE": VAE, "first text encoder": TEXT_1, "second text encoder": TEXT_2}
    if missing := [part for part, prefix in parts.items() if not any(n.startswith(prefix) for n in names)]:
        raise InputError(
            f"{path} is no whole Stable Diffusion checkpoint: it has no {', '.join(missing)} (a LoRA or a VAE is no "
            "base model); give the whole checkpoint, or a folder in diffusers' layout"
        )


def is_xl(names: set[str]) -> bool:
    """Whether these are the weights of SDXL, or of its refiner."""
    return any(n.startswith("conditioner.") for n in names)


def _predicts_velocity(path: Path, second: bool, steps: int | None) -> bool:
    """As the original configuration beside the file says (same name, .yaml), else as diffusers takes it: 1.x predicts noise;
    2.x velocity at 768 pixels, unless its number of steps is that of the 512 base."""
    config = path.with_suffix(".yaml")
    if config.is_file():
        found = re.search(r"""^\s*parameterization:\s*["']?(v|eps)\b""", config.read_text(errors="replace"), re.MULTILINE)
        return found is not None and found[1] == "v"
    return second and steps != STEPS_OF_THE_512_BASE


def load_single_file(path: Path, tokenizer_folder: Path) -> dict[str, Any]:
    """part -> module in fp32, with "tokenizer" and "scheduler". Raises whatever diffusers raises for a wrong file."""
    import diffusers
    from diffusers import DDIMScheduler
    from diffusers.utils import logging
    from transformers import CLIPTokenizer

    configs = configs_of_file(path)
    family = family_of(configs["unet"])
    extra: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    tokenizer.model_max_length = min(tokenizer.model_max_length, configs["text_encoder"]["max_position_embeddings"])
    if family.pooled:
        extra = {"tokenizer_2": tokenizer, "add_watermarker": False}
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory(prefix="mifo-config-") as scratch:
            folder = Path(scratch)
            _write_configs(folder, configs, family)
            pipeline = getattr(diffusers, family.pipeline).from_single_file(
                str(path), config=str(folder), local_files_only=True, tokenizer=tokenizer,
                scheduler=DDIMScheduler(**configs["scheduler"]), **extra,
            )  # fmt: skip
    finally:
        if bar:
            logging.enable_progress_bar()
    return {name: getattr(pipeline, name) for name in (*family.weighted, "tokenizer", "scheduler")}


def _write_configs(folder: Path, configs: dict[str, dict[str, Any]], family: Family) -> None:
    """What diffusers would fetch from the hub."""
    texts = {text.encoder: ("transformers", text.kind) for text in family.texts}
    kinds = {**texts, "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL")}
    tokenizers = {text.tokenizer: ("transformers", "CLIPTokenizer") for text in family.texts}
    index = {"_class_name": family.pipeline, **kinds, **tokenizers, "scheduler": ("diffusers", "DDIMScheduler")}
    (folder / "model_index.json").write_text(json_text(index))
    for part, (_, kind) in kinds.items():
        (folder / part).mkdir()
        named = {"model_type": "clip_text_model"} if part in family.encoders else {"_class_name": kind}
        (folder / part / "config.json").write_text(json_text({**named, **configs[part]}))
