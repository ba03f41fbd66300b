"""What a job does on a GPU: with PyTorch's functions imitated where none is (marked `gpu`: the real ones), and what it does at
another precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from _tiny import load_base, mifo, tiny_base_folder, write_instance
from PIL import Image

from mifo.cli.options import Precision
from mifo.cli.parts import choose_device, choose_dtype
from mifo.data.instance import load_instance
from mifo.learning.learn import learn
from mifo.learning.optimizer import Stepper
from mifo.model.load_base import load_base_model
from mifo.model.peak_memory import GIB, PeakMemory, limit_memory, process_peak_gib, with_index
from mifo.presets import learn_preset


class Allocator:
    """Of two imitated GPUs; refuses what PyTorch's own functions refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.fractions: dict[int, float] = {}
        self.held, self.peak = [0, 0], [0, 0]
        for name in ("set_per_process_memory_fraction", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * GIB))

    def allocate(self, device: int, gib: int) -> None:
        self.held[device] += gib * GIB
        self.peak[device] = max(self.peak[device], self.held[device])

    def set_per_process_memory_fraction(self, fraction: float, device: Any = None) -> None:
        from torch.cuda._utils import _get_device_index

        self.fractions[_get_device_index(device)] = fraction

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak[device.index] = self.held[device.index]

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak[device.index]


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


@pytest.mark.parametrize("device, index", [("cuda", 1), ("cuda:0", 0)])
def test_a_budget_is_made_binding_on_the_device_asked_for(device: str, index: int, allocator: Allocator) -> None:
    """Before, "cuda", the default, went on without an index and raised a ValueError."""
    limit_memory(device, 12 * GIB)
    assert allocator.fractions == {index: 0.5}
    limit_memory(device, 48 * GIB)
    assert allocator.fractions == {index: 1.0}
    assert with_index("cpu") == torch.device("cpu")


def test_a_vram_budget_reaches_the_gpu(allocator: Allocator) -> None:
    from mifo.config import SynthesisConfig
    from mifo.planning.planner import RESERVE, Plan, Settings
    from mifo.planning.report import limit_gpu

    settings = Settings("synthesize", 64, torch.float32, learn_preset("toybox"), SynthesisConfig())
    plan = Plan("toybox", settings, (), 12 * GIB)
    limit_gpu(plan, "cuda")
    assert allocator.fractions == {1: (12 * GIB - RESERVE) / (24 * GIB)}
    limit_gpu(plan, "cpu")
    limit_gpu(replace(plan, budget=None), "cuda:0")
    assert list(allocator.fractions) == [1]


def test_each_job_has_its_own_peak_on_its_own_gpu(allocator: Allocator) -> None:
    allocator.allocate(1, 3)
    allocator.allocate(1, -1)
    with PeakMemory("cuda") as first:
        assert first.gib == 2 and first.of == "GPU"
        allocator.allocate(1, 4)
        allocator.allocate(1, -4)
        with PeakMemory("cuda:1") as inner, PeakMemory("cuda:0") as elsewhere:
            allocator.allocate(1, 1)
            allocator.allocate(1, -1)
            allocator.allocate(0, 7)
    allocator.allocate(1, 9)
    assert (first.gib, inner.gib, elsewhere.gib) == (6, 3, 7)
    with pytest.raises(ZeroDivisionError), PeakMemory("cuda") as failed:
        _ = 1 / 0
    assert failed.gib == 11 and not PeakMemory._open


def test_on_a_cpu_the_peak_is_the_processs() -> None:
    with PeakMemory("cpu") as peak:
        assert 0.05 < peak.gib <= process_peak_gib()
    assert peak.of == "process"


def test_auto_precision_on_a_gpu_is_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda supported=supported: supported)
        assert choose_dtype(Precision.auto, "cuda") is expected
    assert choose_dtype(Precision.fp16, "cuda:1") is torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("") == "cuda"


# --- precision ----------------------------------------------------------------------------------


def test_runs_of_different_precisions_follow_one_another_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the second raised: Accelerate's state was the whole process's."""
    monkeypatch.setattr("mifo.learning.learn.draw_preview", lambda *_: Image.new("RGB", (8, 8)))
    instance = load_instance(write_instance(tmp_path / "pair"))
    config = learn_preset("stable-diffusion")
    config = replace(config, embedding=replace(config.embedding, train_steps=1), prior=replace(config.prior, enabled=False),
                     lora=replace(config.lora, train_steps=1, rank=2))  # fmt: skip
    for dtype, name in ((torch.float32, "no"), (torch.bfloat16, "bf16"), (torch.float32, "no")):
        base = load_base_model(str(tiny_base_folder()), dtype=dtype)
        bundle = learn(instance, base, replace(config, mixed_precision=name), tmp_path / f"{name}_{dtype}")
        assert bundle.metadata["peak_of"] == "process" and bundle.config.mixed_precision == name


def test_only_half_precision_scales_its_gradients_and_a_step_that_overflows_is_left_out() -> None:
    cpu = torch.device("cpu")
    assert Stepper(cpu).scaler is None and Stepper(cpu, "bf16").scaler is None
    assert Stepper(torch.device("mps"), "fp16").scaler is None
    stepper, weight = Stepper(cpu, "fp16"), torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    stepper.backward((weight * torch.tensor([3.0, 4.0, 0.0, 0.0])).sum())
    norm = stepper.clip(optimizer, [weight], 1.0)
    assert float(norm) == pytest.approx(5.0) and stepper.step(optimizer)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.94, 0.92, 1.0, 1.0]))
    before, scale = weight.detach().clone(), stepper.scaler.get_scale()  # type: ignore[union-attr]
    optimizer.zero_grad()
    stepper.backward((weight * float("inf")).sum())
    stepper.clip(optimizer, [weight], 1.0)
    assert not stepper.step(optimizer)
    assert torch.equal(weight, before) and stepper.scaler.get_scale() < scale  # type: ignore[union-attr]


# --- real ---------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_job_on_a_gpu_keeps_to_its_budget_and_tells_its_own_peak(tmp_path: Path) -> None:
    instance = write_instance(tmp_path / "pair")
    for precision in ("no", "bf16", "fp16"):
        mifo("learn", instance, "--model-path", tiny_base_folder(), "--output-dir", tmp_path / precision, "--device", "cuda",
             "--vram-gib", 4, "--mixed-precision", precision, "--phase1-train-steps", 2, "--phase2-train-steps", 2,
             "--num-class-images", 1)  # fmt: skip
    base = load_base()
    base.unet.to("cuda")
    held = torch.empty(GIB // 4, device="cuda")  # 1 GiB in fp32
    del held
    with PeakMemory("cuda") as peak:
        torch.empty(1 << 20, device="cuda")
    assert peak.gib < 0.9
