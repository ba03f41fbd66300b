"""Trains the toybox base model from nothing: VAE, then text encoder and UNet together.

    python scripts/train_toybox.py --workdir runs/toybox --minutes-vae 12 --minutes-crops 30 --minutes-scenes 60

Stages, each with its own time budget (minutes of training, pauses not counted):
  vae     AutoencoderKL on random 32x32 crops of drawn scenes
  crops   UNet + text encoder on close-ups of one object, 8x8 latents (cheap: shape, colour, words)
  scenes  the same weights on whole scenes, 16x16 latents (placement, several objects, backgrounds)
  decoder the VAE's second half once more, on whole scenes (only with `--minutes-decoder`); latents stay valid
  export  EMA weights in fp16 to `--output`, a folder that StableDiffusionPipeline.from_pretrained reads

On a CPU each core works on a part of the batch by itself (`--workers`): small tensors do not split well inside an operation.
Resumable: run the same command again (`--no-resume` begins anew). A checkpoint is written every two minutes, atomically.
`log.jsonl` in the work folder keeps the curves; `samples_*.png` what the model draws.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from hub_names import use_hub_names
from PIL import Image
from tqdm import tqdm
from training_loop import Replicas, Stage, build_optimizers, save_sheet
from transformers import CLIPTextModel, CLIPTokenizer

from mifo.attention.record import AttentionRecorder, RecordingProcessor
from mifo.attention.sites import Processor, Site, attention_sites
from mifo.toybox.architecture import (
    MAX_TOKENS,
    VAE_FACTOR,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    scheduler_config,
)
from mifo.toybox.draw import BACKGROUNDS
from mifo.toybox.world import (
    IMAGE_SIZE,
    CaptionParts,
    Scene,
    draw_scene,
    random_caption_parts,
    random_scene,
    random_thing,
)

TRAIN_SEED = 1_000_000  # scene seeds below this are kept for examples, the judge's test and the benches
CAPTIONS_PER_IMAGE = 6
MAX_THINGS = 4
COUNT_SHARES = (0.30, 0.44, 0.16, 0.10)  # of scenes with 1, 2, 3, 4 things: two are what words have to keep apart
THING_WEIGHT = 3.0
GROUNDING = 0.05
HELD_OUT = 192  # last rows of each baked set, never trained on

# --- data ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A picture (H, W, 3) uint8, its things' masks (MAX_THINGS, H / f, W / f) uint8, and what its captions say.

    `owners[c]` (MAX_TOKENS,) int8: which thing each token of caption c speaks of, -1 for none.
    """

    image: np.ndarray
    masks: np.ndarray
    captions: list[str]
    owners: np.ndarray


def _scene_job(seed: int) -> Example:
    rng = np.random.default_rng([seed, 1])
    scene = random_scene(seed, int(rng.choice([1, 2, 3, 4], p=COUNT_SHARES)))
    drawing = draw_scene(scene)
    return _example(scene, drawing.image, drawing.masks, rng)


def _closeup_job(seed: int) -> Example:
    """A half-size window of a scene that holds one whole object."""
    rng = np.random.default_rng([seed, 2])
    thing = random_thing(rng, count=int(rng.choice([2, 3])))
    scene = Scene((thing,), str(rng.choice(BACKGROUNDS)), seed)
    drawing = draw_scene(scene)
    window, grid = IMAGE_SIZE // 2, VAE_FACTOR
    corner = []
    for low, high in ((thing.box[0], thing.box[2]), (thing.box[1], thing.box[3])):
        first = max(0, math.ceil((high * IMAGE_SIZE - window) / grid))
        last = min((IMAGE_SIZE - window) // grid, math.floor(low * IMAGE_SIZE / grid))
        corner.append(grid * int(rng.integers(min(first, last), last + 1)))
    x, y = corner
    part = (x, y, x + window, y + window)
    return _example(scene, drawing.image.crop(part), [m.crop(part) for m in drawing.masks], rng)


def _example(scene: Scene, image: Image.Image, masks: Sequence[Image.Image], rng: np.random.Generator) -> Example:
    small = np.zeros((MAX_THINGS, image.height // VAE_FACTOR, image.width // VAE_FACTOR), np.uint8)
    for index, mask in enumerate(masks):
        small[index] = np.asarray(mask.reduce(VAE_FACTOR))
    parts = [random_caption_parts(scene, rng) for _ in range(CAPTIONS_PER_IMAGE)]
    return Example(np.asarray(image), small, [p.text() for p in parts], np.stack([token_owners(p) for p in parts]))


def token_owners(parts: CaptionParts) -> np.ndarray:
    """(MAX_TOKENS,) int8: the index of the thing that each token speaks of, -1 for none. A word is a token here."""
    owners = [-1, *(-1 for _ in parts.opening.split())]  # the first is the start of text
    for place, (index, phrase) in enumerate(parts.phrases):
        owners += [-1] * (place > 0)  # "and"
        owners += [-1 if word in ("a", "an", "and") else index for word in phrase.split()]
    return np.array((owners + [-1] * MAX_TOKENS)[:MAX_TOKENS], np.int8)


def draw_many(job: Callable, seeds: range, label: str, workers: int) -> list[Example]:
    """Draws in parallel."""
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(job, seeds, chunksize=64), total=len(seeds), desc=label, mininterval=5))


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- VAE ----------------------------------------------------------------------------------------


def train_vae(workdir: Path, minutes: float, images: int, workers: int, device: str) -> AutoencoderKL:
    vae = build_vae().to(device)
    stage = Stage("vae", workdir, minutes, peak_lr=2e-3)
    pool = ThreadPoolExecutor(workers)
    optimizers = build_optimizers([vae], stage.peak_lr, pool)
    state = {"vae": vae, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
    stage.resume(state)
    if stage.progress >= 1:
        return vae.eval()
    scenes = [e.image for e in draw_many(_scene_job, range(TRAIN_SEED, TRAIN_SEED + images), "drawing for the VAE", workers)]
    held_out = to_tensor(np.stack([_scene_job(i).image for i in range(64)])).to(device)
    crop, batch = IMAGE_SIZE // 2, 16

    replicas = Replicas(vae, workers, pool)

    def draw_crops() -> tuple[torch.Tensor, torch.Generator]:
        count = batch // workers
        picks = torch.randint(len(scenes), (count,)).tolist()
        corners = torch.randint(0, IMAGE_SIZE - crop + 1, (count, 2)).tolist()
        x = to_tensor(np.stack([scenes[i][y : y + crop, x : x + crop] for i, (y, x) in zip(picks, corners, strict=True)]))
        return x.to(device), torch.Generator().manual_seed(int(torch.randint(2**31, ())))

    def loss_of(model: AutoencoderKL, crops: tuple[torch.Tensor, torch.Generator]) -> torch.Tensor:
        x, generator = crops
        posterior = model.encode(x).latent_dist
        decoded = model.decode(posterior.sample(generator)).sample
        return reconstruction_loss(decoded, x) + 2e-5 * posterior.kl().mean() / (crop / VAE_FACTOR) ** 2

    def step() -> tuple[float, int]:
        return replicas.backward(loss_of, [draw_crops() for _ in range(workers)]), batch

    def report() -> None:
        with torch.no_grad():
            decoded = vae.decode(vae.encode(held_out).latent_dist.mode()).sample
        psnr = -10 * math.log10(((decoded - held_out) / 2).clamp(-1, 1).pow(2).mean().item())
        stage.log(psnr_db=round(psnr, 2))
        save_sheet(workdir / "samples_vae.png", torch.cat([held_out[:16], decoded[:16]]), 8)

    stage.run(state, step, optimizers, on_save=report)
    return vae.eval()


def train_decoder(vae: AutoencoderKL, workdir: Path, minutes: float, images: int, workers: int, device: str, first_seed: int,
                  bf16: bool) -> None:  # fmt: skip
    """The decoder alone, on whole scenes: latents, and all that was trained on them, stay valid."""
    decoder = Decoder(vae)
    stage = Stage("decoder", workdir, minutes, peak_lr=5e-4)
    pool = ThreadPoolExecutor(workers)
    optimizers = build_optimizers([decoder], stage.peak_lr, pool)
    state = {"decoder": decoder, **{f"optimizer{i}": o for i, o in enumerate(optimizers)}}
    stage.resume(state)
    seeds, batch = range(first_seed, first_seed + images), 8
    scenes = to_tensor(np.stack([e.image for e in draw_many(_scene_job, seeds, "drawing for the decoder", workers)]))
    held_out = to_tensor(np.stack([_scene_job(i).image for i in range(64)])).to(device)
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
        psnr = -10 * math.log10(((decoded - held_out) / 2).clamp(-1, 1).pow(2).mean().item())
        stage.log(psnr_db=round(psnr, 2))
        save_sheet(workdir / "samples_decoder.png", torch.cat([held_out[:16], decoded[:16]]), 8)

    report()
    stage.run(state, step, optimizers, on_save=report)


class Decoder(torch.nn.Module):
    """A VAE's second half; shares its weights."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents))


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
def bake(vae: AutoencoderKL, job: Callable, seeds: range, path: Path, tokenizer: CLIPTokenizer, workers: int,
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
    return torch.load(path)


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
    """Random latents, one of each one's captions, noise, and timesteps spread evenly over the schedule."""
    picks = torch.randint(len(data["latents"]) - HELD_OUT, (batch,))
    timesteps = ((torch.arange(batch) + torch.rand(batch)) / batch * 1000).long().clamp(max=999)
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
    """Text encoder and UNet as one trainable thing."""

    def __init__(self, tokenizer: CLIPTokenizer):
        super().__init__()
        self.text_encoder, self.unet = build_text_encoder(tokenizer), build_unet()
        self.scheduler = DDIMScheduler(**scheduler_config())
        self.sites = [site for site in attention_sites(self.unet) if site.is_cross]
        self.recorder = AttentionRecorder()
        self.unet.set_attn_processor(
            {s.name: RecordingProcessor(s.name, self.recorder) if s.is_cross else FullPrecisionAttention()
             for s in attention_sites(self.unet)})  # fmt: skip

    def load(self, source: Path) -> None:
        """Weights from another stage's checkpoint, or from a finished model's folder."""
        if source.is_dir():
            text_encoder = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32)
            self.text_encoder.load_state_dict(text_encoder.state_dict())
            self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(source / "unet").float().state_dict())
        else:
            self.load_state_dict(torch.load(source, map_location="cpu", weights_only=False)["state"]["model"])

    def errors(self, batch: Batch) -> torch.Tensor:
        """Squared error of the predicted velocity, (B, h, w): the mean over channels."""
        states = self.text_encoder(batch.tokens)[0]  # (B, L, D)
        target = self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
        noisy = self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        return (self.unet(noisy, batch.timesteps, states).sample.float() - target).square().mean(1)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Things count THING_WEIGHT times as much as their surroundings; each word is shown its thing."""
        self.recorder.open()
        errors = self.errors(batch)
        maps = self.recorder.take()
        weights = 1 + (THING_WEIGHT - 1) * batch.masks.amax(1)  # (B, h, w)
        denoising = (errors * weights / weights.mean((1, 2), keepdim=True)).mean()
        return denoising + GROUNDING * grounding_loss(maps, self.sites, batch)


def train_denoiser(name: str, workdir: Path, minutes: float, peak_lr: float, sources: list[tuple[dict, int, float]],
                   vae: AutoencoderKL, tokenizer: CLIPTokenizer, start_from: Path | None, device: str,
                   workers: int, bf16: bool) -> None:  # fmt: skip
    """`sources`: (baked data, batch size, share of the steps). Starts from another stage's weights when given."""
    model = Denoiser(tokenizer).to(device)
    if start_from:
        model.load(start_from)
    ema = EMAModel(model.parameters(), decay=0.997, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    stage = Stage(name, workdir, minutes, peak_lr)
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
    return pipe(prompts, num_inference_steps=25, guidance_scale=3.0, output_type="pt", generator=generator).images * 2 - 1


def export(workdir: Path, stage: str, vae: AutoencoderKL, tokenizer: CLIPTokenizer, output: Path) -> None:
    """EMA weights, fp16, in Stable Diffusion's folder layout."""
    model = Denoiser(tokenizer)
    ema = EMAModel(model.parameters())
    ema.load_state_dict(torch.load(workdir / f"{stage}.pt", map_location="cpu", weights_only=False)["state"]["ema"])
    ema.copy_to(model.parameters())
    as_pipeline(model, vae.cpu(), tokenizer).to(dtype=torch.float16).save_pretrained(output, safe_serialization=True)
    use_hub_names(output / "text_encoder")
    for config in output.glob("*/config.json"):  # where this machine had the parts is nobody's business
        entries = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(entries, indent=2) + "\n")


def main(
    workdir: Annotated[Path, typer.Option(help="Checkpoints, baked latents, log, sample sheets.")] = Path("runs/toybox"),
    output: Annotated[Path, typer.Option(help="Where the finished model is written.")] = Path("mifo/toybox/model"),
    minutes_vae: float = 11, minutes_crops: float = 25, minutes_scenes: float = 60, minutes_decoder: float = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak, for crops; scenes take 0.7 of it.")] = 2e-3,
    scenes: Annotated[int, typer.Option(help="Whole scenes drawn (the VAE sees the first 6,000).")] = 40_000,
    closeups: int = 40_000,
    batch_crops: int = 48, batch_scenes: int = 24,
    crop_share: Annotated[float, typer.Option(help="Share of close-up steps in the scenes stage.")] = 0.3,
    start_from: Annotated[Path | None, typer.Option(help="A finished model's folder to train on: its VAE stays.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the work folder's checkpoints, or begin again.")] = True,
    workers: int = 2, device: str = "cpu",
    seed: Annotated[int, typer.Option(help="Another seed draws other scenes.")] = 0,
    bf16: Annotated[bool | None, typer.Option(help="Autocast; default: where the processor has the units for it.")] = None,
) -> None:  # fmt: skip
    """Trains the toybox base model. Run it again to go on where it stopped."""
    if not resume:
        shutil.rmtree(workdir, ignore_errors=True)
    torch.manual_seed(seed)
    if bf16 is None:
        bf16 = device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    workdir.mkdir(parents=True, exist_ok=True)
    threads = workers if device == "cpu" else 1
    torch.set_num_threads(1 if threads > 1 else torch.get_num_threads())
    if start_from:
        vae = AutoencoderKL.from_pretrained(start_from / "vae").float().to(device).eval()
    else:
        vae = train_vae(workdir, minutes_vae, min(scenes, 6000), threads, device)
        normalize_latents(vae, to_tensor(np.stack([_scene_job(TRAIN_SEED + i).image for i in range(256)])).to(device))
    tokenizer = build_tokenizer(workdir / "tokenizer")
    first = TRAIN_SEED + seed * 1_000_000
    seeds = range(first, first + closeups)
    crops = bake(vae, _closeup_job, seeds, workdir / "closeups.latents", tokenizer, workers, device)
    if minutes_crops:
        train_denoiser("crops", workdir, minutes_crops, learning_rate, [(crops, batch_crops, 1.0)], vae, tokenizer, start_from,
                       device, threads, bf16)  # fmt: skip
    seeds = range(first, first + scenes)
    wholes = bake(vae, _scene_job, seeds, workdir / "scenes.latents", tokenizer, workers, device)
    sources = [(crops, batch_crops, crop_share), (wholes, batch_scenes, 1 - crop_share)]
    train_denoiser("scenes", workdir, minutes_scenes, 0.7 * learning_rate, sources, vae, tokenizer,
                   workdir / "crops.pt" if minutes_crops else start_from, device, threads, bf16)  # fmt: skip
    if minutes_decoder:
        train_decoder(vae, workdir, minutes_decoder, min(scenes, 6000), threads, device, first, bf16)
    export(workdir, "scenes", vae, tokenizer, output)


if __name__ == "__main__":
    typer.run(main)
