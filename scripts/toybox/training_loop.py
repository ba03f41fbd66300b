"""What training the toybox needs besides models: a stage's clock and checkpoints, threads that share weights, Muon."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from mifo.io.json_text import record_text

CHECKPOINT_SECONDS = 180
STABLE_SHARE = 0.7  # of the samples at the peak rate; a longer run can start from there


class Stage:
    """One training stage's progress, checkpoint, learning rate and log.

    The budget is in samples, so a busy machine trains later, not less, and the same seed makes the same run.
    """

    def __init__(self, name: str, workdir: Path, budget: int, peak_lr: float):
        self.name, self.workdir, self.budget, self.peak_lr = name, workdir, budget, peak_lr
        self.path = workdir / f"{name}.pt"
        self.elapsed_s, self.step, self.samples = 0.0, 0, 0
        self._saved = time.monotonic()
        self._losses: list[float] = []

    @property
    def progress(self) -> float:
        return min(1.0, self.samples / self.budget) if self.budget else 1.0

    def learning_rate(self) -> float:
        """Linear warm-up over 100 steps, the peak for STABLE_SHARE of the budget, then a half cosine down to 2 %."""
        falling = max(0.0, self.progress - STABLE_SHARE) / (1 - STABLE_SHARE)
        return self.peak_lr * min(1, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * falling)))

    def resume(self, state: dict[str, torch.nn.Module | torch.optim.Optimizer | EMAModel]) -> bool:
        if not self.path.exists():
            return False
        saved = torch.load(self.path, map_location="cpu", weights_only=False)
        self.elapsed_s, self.step, self.samples = saved["elapsed_s"], saved["step"], saved["samples"]
        for name, part in state.items():
            part.load_state_dict(saved["state"][name])
        torch.set_rng_state(saved["rng"])
        return True

    def save(self, state: dict[str, Any]) -> None:
        saved = {"elapsed_s": self.elapsed_s, "step": self.step, "samples": self.samples, "rng": torch.get_rng_state(),
                 "state": {name: part.state_dict() for name, part in state.items()}}  # fmt: skip
        temporary = self.path.with_suffix(".tmp")
        torch.save(saved, temporary)
        os.replace(temporary, self.path)
        self._saved = time.monotonic()

    def run(self, state: dict[str, Any], step: Callable[[], tuple[float, int]], optimizers: list[torch.optim.Optimizer],
            after: Callable[[], None] | None = None, on_save: Callable[[], None] | None = None) -> None:  # fmt: skip
        """Calls `step`, which leaves gradients and returns (loss, samples seen), until the budget is spent."""
        bar = tqdm(total=self.budget, initial=self.samples, desc=self.name, unit=" samples", mininterval=30)
        while self.samples < self.budget:
            start = time.monotonic()
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate() * group.get("lr_scale", 1.0)
            loss, count = step()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if after:
                after()
            self.step, self.samples = self.step + 1, self.samples + count
            self._losses.append(loss)
            self.elapsed_s += time.monotonic() - start
            bar.update(count)
            if self.step % 50 == 0:
                self.log()
                bar.set_postfix(step=self.step, loss=f"{np.mean(self._losses[-50:]):.4f}")
            if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
                self.save(state)
                if on_save:
                    on_save()
        self.save(state)
        if on_save:
            on_save()
        bar.close()

    def log(self, **extra: float) -> None:
        row = {"stage": self.name, "step": self.step, "samples": self.samples, "elapsed_s": round(self.elapsed_s, 1),
               "loss": round(float(np.mean(self._losses[-50:])), 5) if self._losses else None, **extra}  # fmt: skip
        with (self.workdir / "log.jsonl").open("a") as log:
            log.write(record_text(row) + "\n")


class Replicas:
    """Copies of a model that share its weights: each thread takes a part of the batch, gradients are averaged.

    The threads run torch's operations on one core each, without waiting for one another inside an operation.
    """

    def __init__(self, model: torch.nn.Module, count: int, pool: ThreadPoolExecutor):
        self.model, self.pool = model, pool
        self.copies = [model, *(copy.deepcopy(model) for _ in range(count - 1))]
        for replica in self.copies[1:]:
            for own, shared in zip(replica.parameters(), model.parameters(), strict=True):
                own.data = shared.data

    def backward(self, loss_of: Callable[..., Any], batches: list[Any]) -> float:
        """`loss_of(replica, batch)` for each batch, backward, mean gradients in the model. Returns the mean loss."""

        def work(replica: torch.nn.Module, batch: Any) -> float:
            loss = loss_of(replica, batch)
            loss.backward()
            return float(loss.detach())

        losses = list(self.pool.map(work, self.copies, batches))
        if len(self.copies) > 1:
            for own, *others in zip(*(r.parameters() for r in self.copies), strict=True):
                if own.grad is None:
                    continue
                for other in others:
                    own.grad += other.grad
                    other.grad = None
                own.grad /= len(self.copies)
        return sum(losses) / len(losses)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized by Newton-Schulz (Jordan et al. 2024), scaled to AdamW's step size (Liu et al. 2025).

    For matrices and convolution kernels (flattened to matrices); in fp32 because CPUs without bf16 units are the target.
    """

    def __init__(self, params: Any, lr: float, pool: ThreadPoolExecutor, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._pool = pool

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            with_gradient = [p for p in group["params"] if p.grad is not None]
            list(self._pool.map(lambda p, group=group: self._update(p, group), with_gradient))

    @torch.no_grad()
    def _update(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = torch.zeros_like(p)
        buffer = self.state[p]["momentum"]
        buffer.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(buffer, group["momentum"]).flatten(1)
        update = orthogonalize(update) * 0.2 * max(update.shape) ** 0.5
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-group["lr"])


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Nearest semi-orthogonal matrix, roughly: five quintic Newton-Schulz steps, x <- (a + b g + c g^2) x with g = x x^T.

    Each step's polynomial commutes with g, so all five are multiplied on the small side first and meet the long one once.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-7)  # (n, m), n <= m
    gram: torch.Tensor = x @ x.T  # (n, n)
    product: torch.Tensor | None = None
    for _ in range(5):
        step = torch.addmm(-4.7750 * gram, gram, gram, alpha=2.0315)
        step.diagonal().add_(3.4445)
        product = step if product is None else step @ product
        gram = step @ gram @ step
    assert product is not None
    result: torch.Tensor = product @ x
    return result.T if tall else result


def build_optimizers(modules: list[torch.nn.Module], lr: float, pool: ThreadPoolExecutor) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices and kernels, AdamW for the rest (embeddings, norms, biases)."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for module in modules:
        for name, p in module.named_parameters():
            is_matrix = p.ndim >= 2 and "embedding" not in name and "conv_in" not in name and "conv_out" not in name
            (matrices if is_matrix else rest).append(p)
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr, pool), adam]


def save_sheet(path: Path, images: torch.Tensor, columns: int) -> None:
    """(N, 3, H, W) in [-1, 1] -> a PNG grid, doubled in size."""
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    n, h, w, _ = pixels.shape
    sheet = Image.new("RGB", (columns * (w + 2), math.ceil(n / columns) * (h + 2)))
    for i, image in enumerate(pixels):
        sheet.paste(Image.fromarray(image), ((i % columns) * (w + 2), (i // columns) * (h + 2)))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)
