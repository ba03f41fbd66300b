"""A frozen base model: Stable Diffusion 1.x and 2.x, or Stable Diffusion XL. `load_base.py` loads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..config import MemoryConfig
from ..errors import InputError
from .families import SD, SDXL, Family
from .fingerprint import KIND, file_fingerprint
from .finite import check_latents, check_pixels
from .prompt_embeds import ImageSize, PromptEmbeds, first_weight
from .samplers import OWN, check_steps, make_scheduler
from .shapes import native_latents


@dataclass
class BaseModel:
    """The frozen parts of Stable Diffusion (XL). All on the UNet's device, but for those that `memory` keeps on the CPU."""

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
    text_encoder_2: Any = None
    """SDXL's second one, a CLIPTextModelWithProjection."""
    padding_2: int = 0
    """With what the second text encoder's tokenizer fills up; else it is as the first one."""
    zero_negative: bool = False
    """Whether an empty negative prompt stands for zeros instead of its embeds, as SDXL was published."""
    local_lora: Any = None
    """Adapters that act by place, a `local_lora.LocalLora`, while several bundles are lent."""

    def matches(self, bundle_fingerprint: str) -> bool:
        """Whether a bundle with this fingerprint was learned on this very model. Older bundles have that of the files' bytes."""
        if bundle_fingerprint == self.fingerprint:
            return True
        old = self.folder is not None and not bundle_fingerprint.startswith(KIND)
        return old and self.folder is not None and file_fingerprint(self.folder) == bundle_fingerprint

    def sampler(self, name: str, spacing: str = OWN) -> Any:
        """A fresh sampler, one of `samplers.SCHEDULERS` or 'own', on this model's noise schedule. Raises InputError."""
        return make_scheduler(name, self.own_scheduler or self.scheduler, spacing)

    def check_steps(self, name: str, steps: int, spacing: str = OWN) -> None:
        """Raises InputError for a number of steps that the sampler cannot take."""
        check_steps(name, self.own_scheduler or self.scheduler, steps, spacing)

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
        """Whose presets fit: 'toybox', 'stable-diffusion' or 'sdxl'."""
        return "toybox" if self.source == "toybox" else self.layout.name

    @property
    def layout(self) -> Family:
        """Which parts it has, and what its UNet is told."""
        return SDXL if self.text_encoder_2 is not None else SD

    @property
    def text_encoders(self) -> tuple[Any, ...]:
        return tuple(self.parts[name] for name in self.layout.encoders)

    @property
    def text_widths(self) -> list[int]:
        """Numbers of a token's embedding in each text encoder."""
        return [int(encoder.config.hidden_size) for encoder in self.text_encoders]

    @property
    def text_width(self) -> int:
        """Numbers of a token's embedding, in all text encoders together."""
        return sum(self.text_widths)

    @property
    def is_small(self) -> bool:
        """On a CPU, and so small that an operation gains nothing from several threads."""
        return self.family == "toybox" and self.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        return first_weight(self.unet).device

    @property
    def dtype(self) -> torch.dtype:
        return first_weight(self.unet).dtype

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
    def multiple(self) -> int:
        """Pixels of which a picture's sides must be multiples, so that the UNet can halve and double them."""
        return int(self.vae_factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1))

    @property
    def parts(self) -> dict[str, torch.nn.Module]:
        """By their names in the folder."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder, **second, "unet": self.unet, "vae": self.vae}

    def check_side(self, name: str, pixels: int) -> None:
        """Raises InputError unless pictures of this side fit: a multiple that the UNet can halve and double, not too large."""
        multiple = self.multiple
        if pixels < multiple or pixels % multiple:
            nearest = max(multiple, round(pixels / multiple) * multiple)
            raise InputError(f"{name} is {pixels}; {self.name} needs a multiple of {multiple} pixels, such as {nearest}")
        if pixels > 8 * self.resolution:
            raise InputError(
                f"{name} is {pixels}; {self.name} was trained at {self.resolution} pixels, give at most {8 * self.resolution}"
            )

    def encode_prompt(self, input_ids: torch.Tensor, *sizes: ImageSize | None) -> PromptEmbeds:
        """(B, L) token ids -> a row for each, on the UNet's device in its dtype. Runs where the text encoders live.

        `sizes`: of the pictures that the texts are about, one for all or one each, where the family is told it; by default that
        at which the model was trained.
        """
        ids = input_ids.to(self.text_encoder.device)
        if not self.layout.pooled:
            return PromptEmbeds(self.text_encoder(ids)[0].to(self.device, self.dtype))
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(self._padded_for_second(ids), output_hidden_states=True)
        layer = self.layout.hidden_layer
        states = torch.cat([found.hidden_states[layer] for found in (first, second)], dim=-1)
        states, pooled = (tensor.to(self.device, self.dtype) for tensor in (states, second[0]))
        return PromptEmbeds(states, pooled, self._time_ids(sizes, len(ids)))

    def encode_negative(self, input_ids: torch.Tensor, size: ImageSize | None = None) -> PromptEmbeds:
        """The same of negative prompts, of which empty ones may stand for zeros."""
        found = self.encode_prompt(input_ids, size)
        if not self.zero_negative or found.pooled is None:
            return found
        end = self.tokenizer.eos_token_id
        written = ((input_ids == end).int().argmax(1) > 1).to(self.device, self.dtype)  # (B,): anything between start and end
        return PromptEmbeds(found.states * written[:, None, None], found.pooled * written[:, None], found.time_ids)

    def _padded_for_second(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids as the second tokenizer gives them: what stands behind the first end of text is its padding."""
        ends = (ids == self.text_encoder_2.config.eos_token_id).int()
        behind = ends.cumsum(1) - ends > 0
        return torch.where(behind, self.padding_2, ids)

    def _time_ids(self, sizes: Sequence[ImageSize | None], rows: int) -> torch.Tensor:
        native = ImageSize((self.resolution, self.resolution), (self.resolution, self.resolution))
        numbers = [(size or native).numbers for size in sizes or (None,)]
        return torch.tensor(numbers * (rows if len(numbers) == 1 else 1), device=self.device, dtype=self.dtype)

    @contextmanager
    def lend_vae(self) -> Iterator[AutoencoderKL]:
        """The VAE on the UNet's device, in fp32 where it overflows in fp16 (`force_upcast`); afterwards it is as it was."""
        home, dtype = self.vae.device, self.vae.dtype
        upcast = dtype == torch.float16 and bool(self.vae.config.get("force_upcast"))
        try:
            self.vae.to(self.device)
            yield self.vae.to(torch.float32) if upcast else self.vae
        finally:
            self.vae.to(home)
            if upcast:
                self.vae.to(dtype)

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
        with self.lend_vae() as vae:
            scaled = latents.to(vae.dtype) / self.vae.config["scaling_factor"]
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
