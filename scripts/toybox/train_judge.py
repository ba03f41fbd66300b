"""Trains the judge on drawn scenes, then examines it on scenes it never saw.

    python -m scripts.toybox.train_judge --minutes 15

  draw      scenes of 1-4 things, a fifth of them of the rare classes, cached in the work folder
  train     with blur, noise, colour, flip, shift and zoom, since it will judge decoded and generated pictures
  examine   on held-out scenes; weights (fp16) to `--output`, figures to `--report`

`--vae` puts a random half of the training scenes through an AutoencoderKL first. `--exam-vae` examines on its pictures.
Resumable: run the same command again. A checkpoint is written every minute, atomically.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn
from tqdm import tqdm

from mifo.io.json_text import record_text
from mifo.toybox.draw import BACKGROUNDS, RARE_CLASSES
from mifo.toybox.judge import (
    GRID,
    VOCABULARY,
    WEIGHTS,
    Finding,
    Judge,
    Maps,
    Verdict,
    box_ious,
    cell_centers,
    decode_boxes,
    judge_images,
    load_judge,
    match,
)
from mifo.toybox.world import Scene, Thing, draw_scene, placed, random_scene, random_thing

TRAIN_SEED = 2_000_000
TEST_SEED = 900_000
RARE_TEST_SEED = 950_000
TEST_SCENES = 1_000
RARE_TEST_SCENES = 300
RECONSTRUCTED_TEST_SCENES = 300  # the first of the ordinary ones

MAX_THINGS = 4
RARE_SHARE = 0.2
ODD_SIZE_SHARE = 0.4  # of the scenes; their things are resized by a factor in ODD_SIZES
ODD_SIZES = (0.8, 1.3)
TOUCHING_IOU = 0.03  # training things may overlap this much, as generated ones do

REPORT = Path(__file__).parents[1] / "results/judge.json"
CHECKPOINT_SECONDS = 60
HIT_IOU = 0.5
ABSENT = -1  # label of a slot without a thing

# --- scenes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Pictures and what is in them; `boxes` xyxy normalized, `labels` in VOCABULARY's order, ABSENT in empty slots."""

    pixels: torch.Tensor  # (B, 3, 128, 128) in [0, 1]
    boxes: torch.Tensor  # (B, MAX_THINGS, 4)
    labels: torch.Tensor  # (B, MAX_THINGS, 4) int64
    backgrounds: torch.Tensor  # (B,) int64


def resized(thing: Thing, factor: float) -> Thing:
    """The same thing `factor` times as large, moved to lie inside the picture."""
    x0, y0, x1, y1 = thing.box
    w, h = (x1 - x0) * factor, (y1 - y0) * factor
    center = (float(np.clip((x0 + x1) / 2, w / 2, 1 - w / 2)), float(np.clip((y0 + y1) / 2, h / 2, 1 - h / 2)))
    return placed(thing, center, max(w, h))


def crowded_scene(seed: int, rare_share: float = RARE_SHARE, odd_share: float = ODD_SIZE_SHARE) -> Scene:
    """1-4 things, all counts alike, some just touching; `rare_share` counts things, `odd_share` scenes."""
    rng = np.random.default_rng(seed)
    count, odd = int(rng.integers(1, MAX_THINGS + 1)), rng.random() < odd_share
    things: list[Thing] = []
    for _ in range(50 * count):
        if len(things) == count:
            break
        rare = str(rng.choice(list(RARE_CLASSES))) if rng.random() < rare_share else None
        thing = random_thing(rng, count, rare)
        if odd:
            thing = resized(thing, rng.uniform(*ODD_SIZES))
        if not things or box_ious([thing.box], [t.box for t in things]).max() < TOUCHING_IOU:
            things.append(thing)
    return Scene(tuple(things), str(rng.choice(BACKGROUNDS)), seed)


def label(scene: Scene) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(MAX_THINGS, 4) boxes and (MAX_THINGS, 4) labels."""
    boxes = np.zeros((MAX_THINGS, 4), np.float32)
    labels = np.full((MAX_THINGS, 4), ABSENT, np.int64)
    for slot, thing in enumerate(scene.things):
        boxes[slot] = thing.box
        labels[slot] = [choices.index(getattr(thing, name)) for name, choices in VOCABULARY.items()]
    return boxes, labels


def draw_training_set(path: Path, count: int, vae: Path | None) -> dict[str, np.ndarray[Any, Any]]:
    """Draws once and caches: images (N, 128, 128, 3) uint8, boxes, labels, backgrounds (N,)."""
    if not path.exists():
        scenes = [crowded_scene(seed) for seed in range(TRAIN_SEED, TRAIN_SEED + count)]
        images = np.stack([np.asarray(draw_scene(s).image) for s in tqdm(scenes, desc="drawing", mininterval=5)])
        boxes, labels = (np.stack(part) for part in zip(*map(label, scenes), strict=True))
        if vae:
            half = np.random.default_rng(TRAIN_SEED).permutation(count)[: count // 2]
            images[half] = reconstruct(images[half], vae)
        backgrounds = np.array([BACKGROUNDS.index(s.background) for s in scenes])
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, images=images, boxes=boxes, labels=labels, backgrounds=backgrounds)
        os.replace(temporary, path)
    with np.load(path) as saved:
        return dict(saved)


@torch.no_grad()
def reconstruct(images: np.ndarray[Any, Any], vae: Path) -> np.ndarray[Any, Any]:
    """uint8 (N, 128, 128, 3) encoded and decoded by the AutoencoderKL in folder `vae`."""
    from diffusers import AutoencoderKL  # only needed with --vae

    model = AutoencoderKL.from_pretrained(vae).float().eval()
    decoded = []
    for chunk in tqdm(torch.from_numpy(images).split(32), desc="VAE", mininterval=5):
        x = chunk.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, 128, 128)
        x = model.decode(model.encode(x).latent_dist.mode()).sample
        decoded.append(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1))
    return torch.cat(decoded).numpy()


def draw_batch(data: dict[str, np.ndarray[Any, Any]], size: int) -> Batch:
    picks = torch.randint(len(data["images"]), (size,)).numpy()
    pixels = torch.from_numpy(data["images"][picks]).permute(0, 3, 1, 2).float() / 255
    rest = [torch.from_numpy(data[name][picks]) for name in ("boxes", "labels", "backgrounds")]
    return Batch(pixels, *rest)


# --- augmentation -------------------------------------------------------------------------------


def uniform(size: int, low: float, high: float) -> torch.Tensor:
    return torch.rand(size) * (high - low) + low


def move(batch: Batch) -> Batch:
    """Flips half, zooms by 0.9-1.1 and shifts by up to 6 % of its side; the boxes go along."""
    n = len(batch.pixels)
    flip = (torch.rand(n) < 0.5).float() * -2 + 1
    zoom = uniform(n, 0.9, 1.1)
    shift = torch.stack([uniform(n, -0.06, 0.06), uniform(n, -0.06, 0.06)], 1)  # in pictures
    x_row = torch.stack([flip / zoom, torch.zeros(n), -2 * shift[:, 0] * flip / zoom], 1)
    y_row = torch.stack([torch.zeros(n), 1 / zoom, -2 * shift[:, 1] / zoom], 1)
    where = F.affine_grid(torch.stack([x_row, y_row], 1), list(batch.pixels.shape), align_corners=False)
    pixels = F.grid_sample(batch.pixels, where, padding_mode="reflection", align_corners=False)
    corners = batch.boxes.view(n, -1, 2, 2) - 0.5  # (B, things, corner, xy)
    corners = corners * torch.stack([flip * zoom, zoom], 1)[:, None, None] + shift[:, None, None] + 0.5
    boxes = torch.cat([corners.amin(2), corners.amax(2)], -1).clamp(0, 1)
    return replace(batch, pixels=pixels, boxes=boxes)


def soften(pixels: torch.Tensor) -> torch.Tensor:
    """One blur for the whole of (B, 3, 128, 128): Gaussian, or down in size and up again."""
    if torch.rand(()) < 0.5:
        taps = torch.arange(-3, 4) / float(uniform(1, 0.4, 1.1))
        kernel = torch.exp(-0.5 * taps**2)
        kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)  # (3, 1, 1, 7)
        pixels = F.pad(pixels, (3, 3, 3, 3), "replicate")
        return F.conv2d(F.conv2d(pixels, kernel, groups=3), kernel.transpose(2, 3), groups=3)
    smaller = F.interpolate(pixels, scale_factor=float(uniform(1, 0.5, 0.9)), mode="bilinear", antialias=True)
    return F.interpolate(smaller, pixels.shape[-2:], mode="bilinear")


def augment(batch: Batch) -> Batch:
    """Moves every picture, softens half, shifts colours, adds noise."""
    batch = move(batch)
    n = len(batch.pixels)
    eighths = list(batch.pixels.chunk(8))
    pixels = torch.cat([soften(part) if i % 2 else part for i, part in enumerate(eighths)])
    gain, offset = uniform(n * 3, 0.93, 1.07).view(n, 3, 1, 1), uniform(n * 3, -0.03, 0.03).view(n, 3, 1, 1)
    noise = torch.randn_like(pixels) * uniform(n, 0, 0.05).view(n, 1, 1, 1)
    return replace(batch, pixels=(pixels * gain + offset + noise).clamp(0, 1))


# --- losses -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """What each cell should say. `share` is how much a cell speaks for its thing, 0 away from centres."""

    heat: torch.Tensor  # (B, G, G), 1 at each thing's central cell, falling off around it
    owner: torch.Tensor  # (B, G, G) slot of the thing
    share: torch.Tensor  # (B, G, G)


def make_targets(boxes: torch.Tensor, present: torch.Tensor, grid: int = GRID) -> Targets:
    """`boxes` (B, T, 4), `present` (B, T) bool. A bump per thing, 12 % of its box wide, at least half a cell."""
    centers, spreads = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) * 0.12
    distance = (cell_centers(grid) - centers[..., None]) / spreads.clamp(min=0.5 / grid)[..., None]  # (B, T, 2, G)
    bumps = torch.exp(-0.5 * (distance[:, :, 0, None, :] ** 2 + distance[:, :, 1, :, None] ** 2))  # (B, T, G, G)
    bumps = bumps / bumps.amax((2, 3), keepdim=True) * present[..., None, None]
    heat, owner = bumps.max(1)
    return Targets(heat, owner, heat * (heat > 0.3))


def heat_loss(logits: torch.Tensor, heat: torch.Tensor) -> torch.Tensor:
    """Quality focal loss (Li et al. 2020) per thing: cross-entropy weighted by the squared error. All (B, G, G)."""
    error = (logits.sigmoid() - heat) ** 2
    return (error * F.binary_cross_entropy_with_logits(logits, heat, reduction="none")).sum() / (heat == 1).sum()


def box_loss(boxes: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """1 - IoU plus the sides' absolute error; (..., 4) xyxy -> (...)."""
    sides = torch.minimum(boxes[..., 2:], truth[..., 2:]) - torch.maximum(boxes[..., :2], truth[..., :2])
    shared = sides.clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, truth)]
    iou = shared / (areas[0] + areas[1] - shared)
    return 1 - iou + 2 * (boxes - truth).abs().sum(-1)


def losses(maps: Maps, batch: Batch) -> dict[str, torch.Tensor]:
    """The parts, by name. Boxes and words count at the cells near a thing's centre only."""
    targets = make_targets(batch.boxes, batch.labels[..., 0] != ABSENT)
    b, row, column = targets.share.nonzero(as_tuple=True)  # the N cells that speak
    slot, share = targets.owner[b, row, column], targets.share[b, row, column]
    labels = batch.labels[b, slot]  # (N, 4)
    boxes = decode_boxes(maps.sides)[b, :, row, column]  # (N, 4)
    parts = {"heat": heat_loss(maps.heat, targets.heat),
             "box": (share * box_loss(boxes, batch.boxes[b, slot])).sum() / share.sum(),
             "background": F.cross_entropy(maps.background, batch.backgrounds)}  # fmt: skip
    plain = labels[:, list(VOCABULARY).index("pattern")] == VOCABULARY["pattern"].index("plain")
    for i, (name, logits) in enumerate(maps.words.items()):
        counts = share * ~plain if name == "second" else share
        each = F.cross_entropy(logits[b, :, row, column], labels[:, i], reduction="none")
        parts[name] = (counts * each).sum() / counts.sum()
    return parts


# --- training -----------------------------------------------------------------------------------


@dataclass
class Clock:
    """Time spent in training steps. Processor time sets the pace, so a busy computer trains later, not less."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of all threads together
    steps: int = 0


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up over 100 steps, then a cosine over the budget down to 1 %."""
    return peak * min(1, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_checkpoint(path: Path, judge: Judge, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"judge": judge.state_dict(), "optimizer": optimizer.state_dict(), "clock": vars(clock),
                "rng": torch.get_rng_state()}, temporary)  # fmt: skip
    os.replace(temporary, path)


def load_checkpoint(path: Path, judge: Judge, optimizer: torch.optim.Optimizer) -> Clock:
    if not path.exists():
        return Clock()
    saved = torch.load(path)
    judge.load_state_dict(saved["judge"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    return Clock(**saved["clock"])


def build_optimizer(judge: nn.Module, lr: float) -> torch.optim.Optimizer:
    kernels = [p for p in judge.parameters() if p.ndim > 1]
    rest = [p for p in judge.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": kernels, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=lr)


def train(data: dict[str, np.ndarray[Any, Any]], path: Path, minutes: float, batch_size: int, peak_lr: float,
          start_from: Path | None) -> tuple[Judge, Clock]:  # fmt: skip
    """Trains until `minutes` of processor time are spent, going on from the checkpoint at `path` when there is one."""
    judge = Judge()
    if start_from:
        judge.load_state_dict(load_file(start_from))
    judge = judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(judge, peak_lr)
    clock = load_checkpoint(path, judge, optimizer)
    budget_s, saved_at = minutes * 60, time.monotonic()
    smooth: dict[str, float] = {}
    bar = tqdm(total=round(budget_s), initial=round(clock.cpu_s), desc="judge", unit="s", mininterval=5)
    judge.train()
    while clock.cpu_s < budget_s:
        start = time.monotonic(), time.process_time()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak_lr, clock.steps, clock.cpu_s / budget_s)
        parts = train_step(judge, optimizer, augment(draw_batch(data, batch_size)))
        clock.steps += 1
        clock.wall_s += time.monotonic() - start[0]
        clock.cpu_s += time.process_time() - start[1]
        smooth = {name: 0.98 * smooth.get(name, value) + 0.02 * value for name, value in parts.items()}
        bar.update(min(round(clock.cpu_s), bar.total) - bar.n)
        bar.set_postfix({"step": clock.steps, **{k: f"{v:.3f}" for k, v in smooth.items()}}, refresh=False)
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            save_checkpoint(path, judge, optimizer, clock)
            saved_at = time.monotonic()
    save_checkpoint(path, judge, optimizer, clock)
    bar.close()
    return judge, clock


def train_step(judge: Judge, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    parts = losses(judge(batch.pixels.contiguous(memory_format=torch.channels_last)), batch)
    optimizer.zero_grad(set_to_none=True)
    torch.stack(list(parts.values())).sum().backward()
    nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
    optimizer.step()
    return {name: float(value.detach()) for name, value in parts.items()}


def export(judge: Judge, output: Path) -> None:
    """fp16 on disk."""
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    temporary = output.with_suffix(".tmp")
    temporary.write_bytes(save(state))
    os.replace(temporary, output)


# --- examination --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One true thing and what was found at its place."""

    thing: Thing
    found: Finding | None
    iou: float  # 0 when nothing was found


def answers(scene: Scene, verdict: Verdict) -> list[Answer]:
    found = match(verdict.findings, scene.things)
    return [Answer(t, f, float(box_ious([t.box], [f.box])[0, 0]) if f else 0.0)
            for t, f in zip(scene.things, found, strict=True)]  # fmt: skip


def swapped(thing: Thing, found: Finding) -> bool:
    """A checkered thing's two colours, both right, in the other order."""
    return thing.pattern == "checkered" and (found.main, found.second) == (thing.second, thing.main)


def share_of(values: list[bool] | list[float]) -> float | None:
    """Mean, rounded; None when there is nothing to average."""
    return round(float(np.mean(values)), 4) if values else None


def figures(scenes: list[Scene], verdicts: list[Verdict]) -> dict[str, float | int | None]:
    """Accuracies in [0, 1]. Class, colours and pattern over matched things, `second` over patterned ones among them."""
    rows = [a for s, v in zip(scenes, verdicts, strict=True) for a in answers(s, v)]
    hits, found_count = [a.iou >= HIT_IOU for a in rows], sum(len(v.findings) for v in verdicts)
    seen = [(a.thing, a.found) for a in rows if a.found]
    patterned = [(t, f) for t, f in seen if t.pattern != "plain"]
    return {
        "scenes": len(scenes),
        "things": len(rows),
        "detection_recall": share_of(hits),
        "detection_precision": round(sum(hits) / max(found_count, 1), 4),
        "mean_iou": share_of([a.iou for a in rows if a.found]),
        "class_name": share_of([t.class_name == f.class_name for t, f in seen]),
        "main": share_of([t.main == f.main for t, f in seen]),
        "main_swap_forgiven": share_of([t.main == f.main or swapped(t, f) for t, f in seen]),
        "second": share_of([t.second == f.second for t, f in patterned]),
        "second_swap_forgiven": share_of([t.second == f.second or swapped(t, f) for t, f in patterned]),
        "pattern": share_of([t.pattern == f.pattern for t, f in seen]),
        "background": share_of([s.background == v.background for s, v in zip(scenes, verdicts, strict=True)]),
    }


def swap_rates(scenes: list[Scene], verdicts: list[Verdict]) -> dict[str, float | None]:
    """Per class: how often a checkered thing's two colours come in the other order."""
    rows = [a for s, v in zip(scenes, verdicts, strict=True) for a in answers(s, v)]
    checkered = [(a.thing, a.found) for a in rows if a.found and a.thing.pattern == "checkered"]
    return {name: share_of([swapped(t, f) for t, f in checkered if t.class_name == name])
            for name in VOCABULARY["class_name"]}  # fmt: skip


def degrade(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Half the resolution and back, colour gain 1.05, noise of 3 %: a harsh stand-in for a generated picture."""
    rng = np.random.default_rng(0)
    degraded = []
    for image in images:
        whole = Image.fromarray(image)
        small = whole.reduce(2).resize(whole.size, Image.Resampling.BICUBIC)
        degraded.append(np.asarray(small) * 1.05 + rng.normal(0, 0.03 * 255, image.shape))
    return np.stack(degraded).clip(0, 255).astype(np.uint8)


def examine(judge: Judge, vae: Path | None) -> dict[str, dict[str, Any]]:
    """Every figure, on scenes the judge never saw; with `vae` also on its reconstructions of some."""
    ordinary = [random_scene(seed) for seed in range(TEST_SEED, TEST_SEED + TEST_SCENES)]
    rare_seeds = range(RARE_TEST_SEED, RARE_TEST_SEED + RARE_TEST_SCENES)
    rare = [crowded_scene(seed, rare_share=1.0, odd_share=0.0) for seed in rare_seeds]
    images = np.stack([np.asarray(draw_scene(s).image) for s in tqdm(ordinary, desc="examining", mininterval=5)])

    def look(pictures: np.ndarray[Any, Any]) -> list[Verdict]:
        return judge_images(judge, [Image.fromarray(p) for p in pictures])

    plainly = look(images)
    by_count = {}
    for count in range(1, MAX_THINGS + 1):
        picks = [i for i, s in enumerate(ordinary) if len(s.things) == count]
        by_count[str(count)] = figures([ordinary[i] for i in picks], [plainly[i] for i in picks])
    report: dict[str, dict[str, Any]] = {
        "held_out": figures(ordinary, plainly),
        "by_number_of_things": by_count,
        "rare_classes": figures(rare, look(np.stack([np.asarray(draw_scene(s).image) for s in rare]))),
        "degraded": figures(ordinary, look(degrade(images))),
        "checkered_swap_rate": swap_rates(ordinary, plainly),
    }
    if vae:
        some = slice(RECONSTRUCTED_TEST_SCENES)
        report["reconstructed"] = figures(ordinary[some], look(reconstruct(images[some], vae)))
        report["reconstructed_before"] = figures(ordinary[some], plainly[some])
    return report


def commit() -> str | None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return git.stdout.strip() if git.returncode == 0 else None


def write_report(path: Path, entries: dict[str, Any]) -> None:
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    command = " ".join(["python -m scripts.toybox.train_judge", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = {"command": command, "versions": versions, "commit": commit(), **entries}
    path.write_text(record_text(entries, indent=2) + "\n")


def main(
    workdir: Annotated[Path, typer.Option(help="Checkpoint and drawn scenes.")] = Path("runs/judge"),
    output: Annotated[Path, typer.Option(help="Where the weights are written.")] = WEIGHTS,
    report: Annotated[Path, typer.Option(help="Where the figures are written.")] = REPORT,
    minutes: Annotated[float, typer.Option(help="Training time: processor time of all threads.")] = 15,
    scenes: Annotated[int, typer.Option(help="Training scenes drawn.")] = 15_000,
    start_from: Annotated[Path | None, typer.Option(help="Finished weights to train on.")] = None,
    vae: Annotated[Path | None, typer.Option(help="An AutoencoderKL folder; half the scenes go through it.")] = None,
    exam_vae: Annotated[Path | None, typer.Option(help="Examine on reconstructions of this AutoencoderKL too.")] = None,
    batch_size: int = 32, peak_lr: float = 2.5e-3, threads: int = 2, seed: int = 0,
) -> None:  # fmt: skip
    """Trains and examines the judge. Run it again to go on where it stopped."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    workdir.mkdir(parents=True, exist_ok=True)
    data = draw_training_set(workdir / f"scenes_{scenes}{'_vae' if vae else ''}.npz", scenes, vae)
    judge, clock = train(data, workdir / "judge.pt", minutes, batch_size, peak_lr, start_from)
    export(judge, output)
    trained = {"scenes": scenes, "vae": vae is not None, "steps": clock.steps, "batch_size": batch_size,
               "wall_seconds": round(clock.wall_s), "cpu_seconds": round(clock.cpu_s)}  # fmt: skip
    size = {"parameters": sum(p.numel() for p in judge.parameters()),
            "weights_mib": round(output.stat().st_size / 2**20, 3)}  # fmt: skip
    entries: dict[str, Any] = {"training": trained, **size, **examine(load_judge(output), exam_vae)}
    write_report(report, entries)
    print(record_text(entries["held_out"], indent=2))


if __name__ == "__main__":
    typer.run(main)
