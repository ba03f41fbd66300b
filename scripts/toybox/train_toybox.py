"""Trains the toybox base model from nothing: VAE, then text encoder and UNet together.

    python -m scripts.toybox.train_toybox --image-size 128 --workdir runs/toybox128 --output runs/toybox128/model

Stages, each with its own budget of samples:
  vae     AutoencoderKL on random crops, half as wide as the picture, three quarters of them near things
  crops   UNet + text encoder on close-ups of one object, 8x8 latents (cheap: shape, colour, words)
  scenes  the same weights on whole scenes, 16x16 latents (placement, several objects, backgrounds)
  decoder the VAE's second half once more, on whole scenes (only with `--samples-decoder`); latents stay valid
  export  EMA weights in fp16 to `--output`, a folder that StableDiffusionPipeline.from_pretrained reads

On a CPU each core works on a part of the batch by itself (`--workers`): small tensors do not split well inside an operation.
Resumable: run the same command again (`--no-resume` begins anew). A checkpoint is written every three minutes, atomically.
`log.jsonl` in the work folder keeps the curves; `samples_*.png` what the model draws. `--export-only` writes what there is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from mifo.attention.record import AttentionRecorder, RecordingProcessor
from mifo.attention.sites import Processor, Site, attention_sites
from mifo.io.json_text import json_text
from mifo.toybox.architecture import (
    MAX_TOKENS,
    SHIPPED,
    Shape,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    scheduler_config,
)
from mifo.toybox.draw import BACKGROUNDS
from mifo.toybox.world import (
    CaptionParts,
    Scene,
    draw_scene,
    random_caption_parts,
    random_scene,
    random_thing,
)
from scripts.hub_names import use_hub_names
from scripts.toybox.training_loop import Replicas, Stage, build_optimizers, save_sheet

TRAIN_SEED = 1_000_000  # scene seeds below this are kept for examples, the judge's test and the benches
CAPTIONS_PER_IMAGE = 6
MAX_THINGS = 4
COUNT_SHARES = (0.24, 0.44, 0.22, 0.10)  # of scenes with 1, 2, 3, 4 things: two are what words have to keep apart
THING_WEIGHT = 3.0
UNIFORM_SHARE = 0.1  # of the timesteps; the others are logit-normal, which hardly reaches the two ends
HELD_OUT = 192  # last rows of each baked set, never trained on

# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A picture (H, W, 3) uint8, its things' masks (MAX_THINGS, H / f, W / f) uint8, and what its captions say.

    `owners[c]` (MAX_TOKENS,) int8: which thing each token of caption c speaks of, -1 for none.
    """

    image: np.ndarray[Any, Any]
    masks: np.ndarray[Any, Any]
    captions: list[str]
    owners: np.ndarray[Any, Any]


def _scene_job(seed: int, shape: Shape) -> Example:
    rng = np.random.default_rng([seed, 1])
    scene = random_scene(seed, int(rng.choice([1, 2, 3, 4], p=COUNT_SHARES)))
    drawing = draw_scene(scene, shape.image_size)
    return _example(scene, drawing.image, drawing.masks, rng, shape.vae_factor)


def _closeup_job(seed: int, shape: Shape) -> Example:
    """A half-size window of a scene that holds one whole object."""
    rng = np.random.default_rng([seed, 2])
    thing = random_thing(rng, count=int(rng.choice([2, 3])))
    scene = Scene((thing,), str(rng.choice(BACKGROUNDS)), seed)
    size, grid = shape.image_size, shape.vae_factor
    drawing, window = draw_scene(scene, size), size // 2
    corner = []
    for low, high in ((thing.box[0], thing.box[2]), (thing.box[1], thing.box[3])):
        first = max(0, math.ceil((high * size - window) / grid))
        last = min((size - window) // grid, math.floor(low * size / grid))
        corner.append(grid * int(rng.integers(min(first, last), last + 1)))
    x, y = corner
    part = (x, y, x + window, y + window)
    return _example(scene, drawing.image.crop(part), [m.crop(part) for m in drawing.masks], rng, grid)


def _example(scene: Scene, image: Image.Image, masks: Sequence[Image.Image], rng: np.random.Generator,
             factor: int) -> Example:  # fmt: skip
    small = np.zeros((MAX_THINGS, image.height // factor, image.width // factor), np.uint8)
    for index, mask in enumerate(masks):
        small[index] = np.asarray(mask.reduce(factor))
    parts = [random_caption_parts(scene, rng) for _ in range(CAPTIONS_PER_IMAGE)]
    return Example(np.asarray(image), small, [p.text() for p in parts], np.stack([token_owners(p) for p in parts]))


def token_owners(parts: CaptionParts) -> np.ndarray[Any, Any]:
    """(MAX_TOKENS,) int8: the index of the thing that each token speaks of, -1 for none. A word is a token here."""
    owners = [-1, *(-1 for _ in parts.opening.split())]  # the first is the start of text
    for place, (index, phrase) in enumerate(parts.phrases):
        owners += [-1] * (place > 0)  # "and"
        owners += [-1 if word in ("a", "an", "and") else index for word in phrase.split()]
    return np.array((owners + [-1] * MAX_TOKENS)[:MAX_TOKENS], np.int8)


def draw_many(job: Callable[..., Any], seeds: range, label: str, workers: int) -> list[Example]:
    """Draws in parallel."""
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(job, seeds, chunksize=64), total=len(seeds), desc=label, mininterval=5))


def to_tensor(images: np.ndarray[Any, Any]) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- VAE ----------------------------------------------------------------------------------------


def near_things(masks: np.ndarray[Any, Any], crop: int, factor: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top left corner (x, y) in pixels of a crop that holds a random part of a thing. `masks` (things, h, w) at latent size."""
    rows, columns = np.nonzero(masks.any(0))
    pick = int(rng.integers(len(rows)))
    limit = masks.shape[-1] * factor - crop
    x, y = (int(np.clip(v[pick] * factor - rng.integers(0, crop - factor + 1), 0, limit)) for v in (columns, rows))
    return x, y


def train_vae(workdir: Path, budget: int, images: int, workers: int, device: str, shape: Shape) -> AutoencoderKL:
    """Returns the averaged (EMA) weights."""
    vae = build_vae(shape).to(device)
    ema = EMAModel(vae.parameters(), decay=0.998, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    stage = Stage("vae", workdir, budget, peak_lr=2e-3)
    pool = ThreadPoolExecutor(workers)
    optimizers = build_optimizers([vae], stage.peak_lr, pool)
    state = {"vae": vae, "ema": ema, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
    stage.resume(state)
    ema.to(device)
    if stage.progress < 1:
        job, seeds = partial(_scene_job, shape=shape), range(TRAIN_SEED, TRAIN_SEED + images)
        scenes = draw_many(job, seeds, "drawing for the VAE", workers)
        held_out = to_tensor(np.stack([job(i).image for i in range(64)])).to(device)
        crop, batch = shape.image_size // 2, 16
        replicas = Replicas(vae, workers, pool)

        def draw_crops() -> tuple[torch.Tensor, torch.Generator]:
            rng = np.random.default_rng(int(torch.randint(2**31, ())))
            cut = []
            for scene in (scenes[i] for i in rng.integers(0, len(scenes), batch // workers)):
                if rng.random() < 0.75 and scene.masks.any():
                    x, y = near_things(scene.masks, crop, shape.vae_factor, rng)
                else:
                    x, y = (int(v) for v in rng.integers(0, shape.image_size - crop + 1, 2))
                cut.append(scene.image[y : y + crop, x : x + crop])
            return to_tensor(np.stack(cut)).to(device), torch.Generator().manual_seed(int(rng.integers(2**31)))

        def loss_of(model: AutoencoderKL, crops: tuple[torch.Tensor, torch.Generator]) -> torch.Tensor:
            x, generator = crops
            posterior = model.encode(x).latent_dist
            decoded = model.decode(posterior.sample(generator)).sample
            coarse = reconstruction_loss(F.avg_pool2d(decoded, 2), F.avg_pool2d(x, 2))
            closeness: torch.Tensor = 2e-5 * posterior.kl().mean() / (crop / shape.vae_factor) ** 2
            return reconstruction_loss(decoded, x) + 0.25 * coarse + closeness

        def step() -> tuple[float, int]:
            return replicas.backward(loss_of, [draw_crops() for _ in range(workers)]), batch

        def report() -> None:
            ema.store(vae.parameters())
            ema.copy_to(vae.parameters())
            with torch.no_grad():
                decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
            ema.restore(vae.parameters())
            stage.log(psnr_db=round(psnr(decoded, held_out), 2))
            save_sheet(workdir / "samples_vae.png", torch.cat([held_out[:16], decoded[:16]]), 8)

        stage.run(state, step, optimizers, after=lambda: ema.step(vae.parameters()), on_save=report)
    ema.copy_to(vae.parameters())
    return vae.eval()


def psnr(decoded: torch.Tensor, truth: torch.Tensor) -> float:
    """dB, of pictures in [-1, 1]."""
    return -10 * math.log10(((decoded - truth) / 2).clamp(-1, 1).pow(2).mean().item())


def train_decoder(vae: AutoencoderKL, workdir: Path, budget: int, images: int, workers: int, device: str, first_seed: int,
                  bf16: bool, job: Callable[..., Any]) -> None:  # fmt: skip
    """The decoder alone, on whole scenes: latents, and all that was trained on them, stay valid."""
    decoder = Decoder(vae)
    stage = Stage("decoder", workdir, budget, peak_lr=5e-4)
    pool = ThreadPoolExecutor(workers)
    optimizers = build_optimizers([decoder], stage.peak_lr, pool)
    state = {"decoder": decoder, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
    stage.resume(state)
    seeds, batch = range(first_seed, first_seed + images), 8
    scenes = to_tensor(np.stack([e.image for e in draw_many(job, seeds, "drawing for the decoder", workers)]))
    held_out = to_tensor(np.stack([job(i).image for i in range(64)])).to(device)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x.to(device)).latent_dist.mode().cpu() for x in tqdm(scenes.split(64), desc="encoding")])
        held_out_latents = vae.encode(held_out).latent_dist.mode()
    replicas = Replicas(decoder, workers, pool)

    def loss_of(replica: Decoder, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        z, x = pair
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            decoded = replica(z + 0.03 * torch.randn_like(z))  # a denoiser's latents are never exact
        return reconstruction_loss(decoded.float(), x)

    def step() -> tuple[float, int]:
        picks = torch.randint(len(scenes), (workers, batch // workers))
        return replicas.backward(loss_of, [(latents[p].to(device), scenes[p].to(device)) for p in picks]), batch

    def report() -> None:
        with torch.no_grad():
            decoded = decoder(held_out_latents)
        stage.log(psnr_db=round(psnr(decoded, held_out), 2))
        save_sheet(workdir / "samples_decoder.png", torch.cat([held_out[:16], decoded[:16]]), 8)

    report()
    stage.run(state, step, optimizers, on_save=report)


class Decoder(torch.nn.Module):
    """A VAE's second half; shares its weights."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.decoder(self.post_quant_conv(latents))
        return decoded


def reconstruction_loss(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of their differences along both axes (edges and patterns)."""
    loss = (decoded - x).abs().mean() + 2 * (decoded - x).pow(2).mean()
    for dim in (2, 3):
        loss = loss + 0.5 * (decoded.diff(dim=dim) - x.diff(dim=dim)).abs().mean()
    return loss


# --- UNet and text encoder ----------------------------------------------------------------------


def normalize_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Folds a per-channel shift and scale into the VAE's two 1x1 convolutions: latents get mean 0 and deviation 1.

    Exact: decoded pictures stay what they were. `images` (N, 3, H, W) sets the statistics.
    """
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mode()
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        n = len(mean)
        quant, post = vae.quant_conv, vae.post_quant_conv
        quant.weight[:n] /= std[:, None, None, None]
        quant.bias[:n] = (quant.bias[:n] - mean) / std
        quant.bias[n:] -= 2 * std.log()  # the second half is the log variance
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]


@torch.no_grad()
def bake(vae: AutoencoderKL, job: Callable[..., Any], seeds: range, path: Path, tokenizer: CLIPTokenizer, workers: int,
         device: str) -> dict[str, torch.Tensor]:  # fmt: skip
    """Draws, encodes and caches: latents (N, C, h, w) fp16, masks (N, MAX_THINGS, h, w) uint8 and, for each of
    CAPTIONS_PER_IMAGE captions, tokens (N, captions, L) int16 and their owners (N, captions, L) int8."""
    if not path.exists():
        parts: dict[str, list[torch.Tensor]] = {"latents": [], "masks": [], "tokens": [], "owners": []}
        for first in range(seeds.start, seeds.stop, 4096):
            examples = draw_many(job, range(first, min(first + 4096, seeds.stop)), path.stem, workers)
            for chunk in to_tensor(np.stack([e.image for e in examples])).split(128):
                parts["latents"].append(vae.encode(chunk.to(device)).latent_dist.mode().half().cpu())
            ids = tokenizer([c for e in examples for c in e.captions], padding="max_length", truncation=True).input_ids
            parts["tokens"].append(torch.tensor(ids, dtype=torch.int16).view(len(examples), CAPTIONS_PER_IMAGE, -1))
            parts["masks"].append(torch.from_numpy(np.stack([e.masks for e in examples])))
            parts["owners"].append(torch.from_numpy(np.stack([e.owners for e in examples])))
        temporary = path.with_suffix(".tmp")
        torch.save({name: torch.cat(tensors) for name, tensors in parts.items()}, temporary)
        os.replace(temporary, path)
    baked: dict[str, torch.Tensor] = torch.load(path)
    return baked


@dataclass
class Batch:
    """Training rows: latents and noise (B, C, h, w), tokens and owners (B, L), masks (B, MAX_THINGS, h, w) in [0, 1]."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    tokens: torch.Tensor
    owners: torch.Tensor
    masks: torch.Tensor

    def to(self, device: str) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def take_rows(data: dict[str, torch.Tensor], picks: torch.Tensor, captions: torch.Tensor, noise: torch.Tensor,
              timesteps: torch.Tensor) -> Batch:  # fmt: skip
    return Batch(data["latents"][picks].float(), noise, timesteps, data["tokens"][picks, captions].long(),
                 data["owners"][picks, captions].long(), data["masks"][picks].float() / 255)  # fmt: skip


def draw_batch(data: dict[str, torch.Tensor], batch: int) -> Batch:
    """Random latents, one of each one's captions, noise, and timesteps: logit-normal (Esser et al. 2024, section 3.1),
    evenly spread over that distribution, and UNIFORM_SHARE of them uniform."""
    picks = torch.randint(len(data["latents"]) - HELD_OUT, (batch,))
    even = (torch.arange(batch) + torch.rand(batch)) / batch
    shares = torch.where(torch.rand(batch) < UNIFORM_SHARE, torch.rand(batch), torch.special.ndtri(even).sigmoid())
    timesteps = (shares * 1000).long().clamp(max=999)
    noise = torch.randn(batch, *data["latents"].shape[1:])
    return take_rows(data, picks, torch.randint(CAPTIONS_PER_IMAGE, (batch,)), noise, timesteps)


def fixed_batch(data: dict[str, torch.Tensor]) -> Batch:
    """The rows kept out of training, with fixed noise: one curve that runs can be compared by."""
    picks = torch.arange(HELD_OUT) + len(data["latents"]) - HELD_OUT
    noise = torch.randn(HELD_OUT, *data["latents"].shape[1:], generator=torch.Generator().manual_seed(0))
    return take_rows(data, picks, torch.zeros(HELD_OUT, dtype=torch.long), noise, torch.linspace(0, 999, HELD_OUT).long())


class FullPrecisionAttention(Processor):
    """Self-attention outside of autocast: the CPU's fused kernel runs its bf16 backward three times slower than fp32."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        with torch.autocast(query.device.type, enabled=False):
            return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=scale)


def grounding_loss(maps: dict[str, torch.Tensor], sites: Sequence[Site], batch: Batch) -> torch.Tensor:
    """Share of each word's attention that falls outside the thing it speaks of, squared (TokenCompose, section 3.2).

    Noisier pictures count less: in pure noise there is nothing to find yet.
    """
    owned = batch.owners >= 0  # (B, L)
    weight = owned * (1 - batch.timesteps / 1000)[:, None]
    rows = torch.arange(len(owned), device=owned.device)[:, None]
    total = maps[sites[0].name].new_zeros(())
    for site in sites:
        size = site.map_size(*batch.masks.shape[-2:])
        masks = F.adaptive_avg_pool2d(batch.masks, size).flatten(2)[rows, batch.owners.clamp(min=0)]  # (B, L, h * w)
        attention = maps[site.name].float().transpose(1, 2)  # (B, L, h * w)
        outside = 1 - (attention * masks).sum(-1) / attention.sum(-1).clamp(min=1e-6)
        total = total + (outside.square() * weight).sum() / weight.sum().clamp(min=1e-6)
    return total / len(sites)


class Denoiser(torch.nn.Module):
    """Text encoder and UNet as one trainable thing. `grounding`: weight of the loss that shows each word its thing."""

    def __init__(self, tokenizer: CLIPTokenizer, shape: Shape, grounding: float = 0.0):
        super().__init__()
        self.text_encoder, self.unet = build_text_encoder(tokenizer), build_unet(shape)
        self.scheduler, self.grounding = DDIMScheduler(**scheduler_config()), grounding
        self.sites = [site for site in attention_sites(self.unet) if site.is_cross]
        self.recorder = AttentionRecorder()
        if grounding:
            self.unet.set_attn_processor(
                {s.name: RecordingProcessor(s.name, self.recorder) if s.is_cross else FullPrecisionAttention()
                 for s in attention_sites(self.unet)})  # fmt: skip

    def load(self, source: Path) -> None:
        """Weights from another stage's checkpoint, or from a finished model's folder."""
        if source.is_dir():
            text_encoder = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32)
            self.text_encoder.load_state_dict(text_encoder.state_dict())
            self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(source / "unet").float().state_dict())
        else:  # the averaged weights
            ema = EMAModel(self.parameters())
            ema.load_state_dict(torch.load(source, map_location="cpu", weights_only=False)["state"]["ema"])
            ema.copy_to(self.parameters())

    def errors(self, batch: Batch) -> torch.Tensor:
        """Squared error of the predicted velocity, (B, h, w): the mean over channels."""
        states = self.text_encoder(batch.tokens)[0]  # (B, L, D)
        target = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        error: torch.Tensor = self.unet(noisy, batch.timesteps, states).sample.float() - target
        return error.square().mean(1)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Things count THING_WEIGHT times as much as their surroundings."""
        if self.grounding:
            self.recorder.open()
        errors = self.errors(batch)
        weights = 1 + (THING_WEIGHT - 1) * batch.masks.amax(1)  # (B, h, w)
        denoising = (errors * weights / weights.mean((1, 2), keepdim=True)).mean()
        if not self.grounding:
            return denoising
        return denoising + self.grounding * grounding_loss(self.recorder.take(), self.sites, batch)


Baked = dict[str, torch.Tensor]


def train_denoiser(name: str, workdir: Path, budget: int, peak_lr: float, sources: list[tuple[Baked, int, float]],
                   vae: AutoencoderKL, tokenizer: CLIPTokenizer, start_from: Path | None, device: str,
                   workers: int, bf16: bool, shape: Shape, grounding: float) -> None:  # fmt: skip
    """`sources`: (baked data, batch size, share of the steps). Starts from another stage's weights when given."""
    model = Denoiser(tokenizer, shape, grounding).to(device)
    if start_from:
        model.load(start_from)
    ema = EMAModel(model.parameters(), decay=0.997, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    stage = Stage(name, workdir, budget, peak_lr)
    pool = ThreadPoolExecutor(workers)
    optimizers = build_optimizers([model.text_encoder, model.unet], peak_lr, pool)
    state = {"model": model, "ema": ema, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
    stage.resume(state)
    ema.to(device)
    held_out = fixed_batch(sources[-1][0]).to(device)
    shares = torch.tensor([share for _, _, share in sources])
    saves = 0

    replicas = Replicas(model, workers, pool)

    def loss_of(replica: Denoiser, batch: Batch) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return replica.loss(batch)

    def step() -> tuple[float, int]:
        data, batch, _ = sources[int(torch.multinomial(shares, 1))]
        return replicas.backward(loss_of, [draw_batch(data, batch // workers).to(device) for _ in range(workers)]), batch

    def report() -> None:
        nonlocal saves
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
        with torch.no_grad():
            stage.log(held_out_loss=round(float(model.errors(held_out).mean()), 5))
        if saves % 4 == 0 or stage.progress >= 1:
            save_sheet(workdir / f"samples_{name}.png", sample_sheet(model, vae, tokenizer, device), 8)
        saves += 1
        ema.restore(model.parameters())

    stage.run(state, step, optimizers, after=lambda: ema.step(model.parameters()), on_save=report)


def as_pipeline(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(vae=vae, text_encoder=model.text_encoder, tokenizer=tokenizer, unet=model.unet,
                                   scheduler=model.scheduler, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)  # fmt: skip


def sample_sheet(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: str) -> torch.Tensor:
    """(16, 3, H, W) in [-1, 1]: full captions of held-out scenes with one thing (first row) and two."""
    prompts = [random_scene(seed, count=1 + seed // 8).caption() for seed in range(16)]
    pipe = as_pipeline(model, vae, tokenizer).to(device)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn: torch.Tensor = pipe(prompts, num_inference_steps=25, guidance_scale=2.0, output_type="pt", generator=generator).images
    return drawn * 2 - 1


def export(workdir: Path, stage: str, vae: AutoencoderKL, tokenizer: CLIPTokenizer, output: Path, shape: Shape) -> None:
    """EMA weights, fp16, in Stable Diffusion's folder layout."""
    model = Denoiser(tokenizer, shape)
    model.load(workdir / f"{stage}.pt")
    as_pipeline(model, vae.cpu(), tokenizer).to(dtype=torch.float16).save_pretrained(output, safe_serialization=True)
    use_hub_names(output / "text_encoder")
    for config in output.glob("*/config.json"):  # where this machine had the parts is nobody's business
        entries = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json_text(entries, indent=2) + "\n")


def main(
    workdir: Annotated[Path, typer.Option(help="Checkpoints, baked latents, log, sample sheets.")] = Path("runs/toybox"),
    output: Annotated[Path, typer.Option(help="Where the finished model is written.")] = Path("mifo/toybox/model"),
    samples_vae: int = 44_000, samples_crops: int = 120_000, samples_scenes: int = 530_000, samples_decoder: int = 0,
    grounding: Annotated[float, typer.Option(help="Weight of the loss that shows words their things, for scenes.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Peak, for crops; scenes take 0.7 of it.")] = 2e-3,
    scenes: Annotated[int, typer.Option(help="Whole scenes drawn (the VAE sees the first 6,000).")] = 24_000,
    closeups: int = 40_000,
    batch_crops: int = 48, batch_scenes: int = 24,
    crop_share: Annotated[float, typer.Option(help="Share of close-up steps in the scenes stage.")] = 0.3,
    start_from: Annotated[Path | None, typer.Option(help="A finished model's folder to train on: its VAE stays.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the work folder's checkpoints, or begin again.")] = True,
    workers: int = 2, device: str = "cpu",
    seed: Annotated[int, typer.Option(help="Another seed draws other scenes.")] = 0,
    export_only: Annotated[bool, typer.Option(help="Only write the model that the checkpoints hold.")] = False,
    bf16: Annotated[bool | None, typer.Option(help="Autocast; default: where the processor has the units for it.")] = None,
) -> None:  # fmt: skip
    """Trains the toybox base model. Run it again to go on where it stopped."""
    if not resume:
        for name in ("vae.pt", "crops.pt", "scenes.pt", "decoder.pt", "closeups.latents", "scenes.latents", "log.jsonl"):
            (workdir / name).unlink(missing_ok=True)
    torch.manual_seed(seed)
    if bf16 is None:
        bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    workdir.mkdir(parents=True, exist_ok=True)
    threads = workers if device == "cpu" else 1
    torch.set_num_threads(1 if threads > 1 else torch.get_num_threads())
    shape = SHIPPED
    scene_job, closeup_job = partial(_scene_job, shape=shape), partial(_closeup_job, shape=shape)
    tokenizer = build_tokenizer(workdir / "tokenizer")
    if start_from:
        vae = AutoencoderKL.from_pretrained(start_from / "vae").float().to(device).eval()
    else:
        vae = train_vae(workdir, samples_vae, min(scenes, 6000), threads, device, shape)
        normalize_latents(vae, to_tensor(np.stack([scene_job(TRAIN_SEED + i).image for i in range(256)])).to(device))
    if export_only:
        stage = "scenes" if (workdir / "scenes.pt").exists() else "crops"
        return export(workdir, stage, vae, tokenizer, output, shape)
    first = TRAIN_SEED + seed * 1_000_000
    crops = bake(vae, closeup_job, range(first, first + closeups), workdir / "closeups.latents", tokenizer, workers, device)
    if samples_crops:
        train_denoiser("crops", workdir, samples_crops, learning_rate, [(crops, batch_crops, 1.0)], vae, tokenizer, start_from,
                       device, threads, bf16, shape, 0.0)  # fmt: skip
    wholes = bake(vae, scene_job, range(first, first + scenes), workdir / "scenes.latents", tokenizer, workers, device)
    sources = [(crops, batch_crops, crop_share), (wholes, batch_scenes, 1 - crop_share)]
    train_denoiser("scenes", workdir, samples_scenes, 0.7 * learning_rate, sources, vae, tokenizer,
                   workdir / "crops.pt" if samples_crops else start_from, device, threads, bf16, shape, grounding)  # fmt: skip
    if samples_decoder:
        train_decoder(vae, workdir, samples_decoder, min(scenes, 6000), threads, device, first, bf16, scene_job)
    export(workdir, "scenes", vae, tokenizer, output, shape)


if __name__ == "__main__":
    typer.run(main)
