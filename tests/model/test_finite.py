"""What is not finite: never a black picture and exit status 0, never `NaN` in a file that should be JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from _tiny import (
    ROOT,
    copy_bundle,
    edit_json,
    learn_arguments,
    load_base,
    mifo,
    snapshot,
    tiny_base_folder,
    tiny_bundle_folder,
    write_instance,
)
from safetensors.torch import load_file, save_file

from mifo.bundle.store import attach, load_bundle
from mifo.config import PriorConfig
from mifo.errors import InputError, NotFinite
from mifo.io.json_text import json_text, record_text
from mifo.io.tensor_file import Damaged, read_state, write_state
from mifo.learning.checkpoints import Checkpointing, latest, open_checkpoints
from mifo.learning.prior import make_prior
from mifo.model.base import BaseModel
from mifo.model.finite import LIMIT

WEIGHTS = {"unet": "unet/diffusion_pytorch_model.safetensors", "vae": "vae/diffusion_pytorch_model.safetensors"}
PRIOR = PriorConfig(num_class_images=2, sampling_steps=2)


def spoiled_base(folder: Path, part: str, value: float) -> Path:
    """The tiny model with one wrong weight in its last layer."""
    base = Path(shutil.copytree(tiny_base_folder(), folder))
    path = base / WEIGHTS[part]
    weights = load_file(path)
    name = next(n for n in reversed(sorted(weights)) if "conv_out.weight" in n and ("decoder" in n or part == "unet"))
    weights[name].view(-1)[0] = value
    save_file(weights, path, metadata={"format": "pt"})
    return base


def bundle_on(base: Path, folder: Path) -> Path:
    """The tiny bundle, as if it had been learned on `base`."""
    from mifo.model.load_base import load_base_model

    bundle = copy_bundle(folder)
    record = json.loads((bundle / "bundle.json").read_text())
    loaded = load_base_model(str(base))
    edit_json(bundle / "bundle.json", base={**record["base"], "source": str(base), "fingerprint": loaded.fingerprint})
    return bundle


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_base_with_a_broken_weight_draws_nothing(tmp_path: Path, part: str, value: float):
    base = spoiled_base(tmp_path / "base", part, value)
    bundle = bundle_on(base, tmp_path / "bundles")
    command = ["synthesize", bundle, "--model-path", base, "--prompt", "a photo of <asset0>", "--steps", 1]
    result = mifo(*command, "--output-path", tmp_path / "out", "--json", exit_code=2)
    assert f"the base model's {part} has weights that are not finite, or larger than" in result.stderr
    assert result.stdout == "" and not (tmp_path / "out").exists()


def test_every_job_that_draws_refuses_a_broken_base(tmp_path: Path):
    base = spoiled_base(tmp_path / "base", "unet", float("nan"))
    bundle, instance = bundle_on(base, tmp_path / "bundles"), write_instance(tmp_path / "cups")
    drawing = [bundle, "--model-path", base, "--steps", 1, "--output-path", tmp_path / "out"]
    image, mask = instance / "img.png", instance / "mask0.png"
    for command in (["edit", *drawing, "--init-image", image, "--mask", mask, "--prompt", "a photo of <asset0>"],
                    ["decompose", *drawing], ["variations", *drawing, "--count", 1],
                    ["evaluate", *drawing, "--backend", "toybox", "--samples", 1],
                    ["learn", instance, "--model-path", base, "--output-dir", tmp_path / "learned", "--phase1-train-steps", 1,
                     "--phase2-train-steps", 1, "--num-class-images", 1]):  # fmt: skip
        result = mifo(*command, exit_code=2)
        assert "the base model's unet has weights that are not finite" in result.stderr, (command[0], result.stderr)
        assert not [p for p in (tmp_path / "out", tmp_path / "learned" / "cups") if p.exists()], command[0]
    assert not list((tmp_path / "learned").rglob("*.safetensors"))  # no prior is kept either


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, InputError), (torch.float16, NotFinite)])
def test_whose_fault_it_is(dtype: torch.dtype, error: type[Exception]):
    """In fp16 a sane model and a sane bundle may overflow: that is not the user's input."""
    base = load_base()
    with attach(base, load_bundle(tiny_bundle_folder())), pytest.raises(error) as refused:
        base.unet.to(dtype)
        base.decode(torch.full((1, 12, 16, 16), float("nan")))
    assert re.search("--lora-scale" if dtype == torch.float32 else "--mixed-precision bf16 or no", str(refused.value))


def test_a_result_that_is_not_finite_and_nobodys_fault_ends_with_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def overflow(*_: object) -> None:
        raise NotFinite("the drawn latents are not finite")

    monkeypatch.setattr(BaseModel, "decode", overflow)
    command = ["synthesize", tiny_bundle_folder(), "--prompt", "a photo of <asset0>", "--steps", 1]
    result = mifo(*command, "--output-path", tmp_path / "out", exit_code=1)
    assert result.stderr.rstrip().endswith("error: the drawn latents are not finite") and snapshot(tmp_path) == {}


def test_latents_far_beyond_any_picture_are_refused_and_others_are_not():
    base = load_base()
    with pytest.raises(NotFinite, match=r"the drawn latents reach 1\.0e\+05, so there is no picture"):
        base.decode(torch.full((1, 12, 16, 16), 1e5))
    base.decode(torch.full((1, 12, 16, 16), LIMIT / 100))


# --- the prior's cache and checkpoints ------------------------------------------------------------


def test_a_garbled_but_finite_prior_is_drawn_again(tmp_path: Path):
    base = load_base()
    first = make_prior(base, PRIOR, 64, 0, tmp_path).latents
    (path,) = tmp_path.glob("*.safetensors")
    right = path.read_bytes()
    for index in (-1, -100):
        path.write_bytes(bytes(b ^ 0x10 if i == len(right) + index else b for i, b in enumerate(right)))
        assert torch.equal(make_prior(base, PRIOR, 64, 0, tmp_path).latents, first)
        assert torch.equal(read_state(path), first)  # written anew
    save_file({"latents": torch.zeros_like(first)}, path)  # as earlier versions wrote it, without a digest
    assert torch.equal(make_prior(base, PRIOR, 64, 0, tmp_path).latents, first)
    make_prior(base, PRIOR, 64, 1, tmp_path)
    (other,) = set(tmp_path.glob("*.safetensors")) - {path}
    path.write_bytes(other.read_bytes())  # whole, and another prior's
    assert torch.equal(make_prior(base, PRIOR, 64, 0, tmp_path).latents, first)


def test_a_whole_prior_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = load_base()
    first = make_prior(base, PRIOR, 64, 0, tmp_path).latents
    monkeypatch.setattr("mifo.learning.prior.denoise", lambda *_, **__: pytest.fail("it was drawn again"))
    assert torch.equal(make_prior(base, PRIOR, 64, 0, tmp_path).latents, first)


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "sparse", "link"])
def test_a_checkpoint_or_prior_that_is_no_file_is_never_opened(tmp_path: Path, kind: str):
    """The library that would open it waits in C, where no signal is heard."""
    from test_strangers_files import special

    path = tmp_path / ".checkpoints" / "cups" / "00000001.safetensors"
    path.parent.mkdir(parents=True)
    if kind == "link":
        write_state(tmp_path / "elsewhere", [1], "there", {})
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(60 << 30)
    else:
        special(path, kind)
    with pytest.raises(Damaged):
        read_state(path)
    assert latest(tmp_path / "cups") is None
    with open_checkpoints(tmp_path / "cups", {}, Checkpointing(resume=True)) as checkpoints:
        assert checkpoints.load() is None
        for step in (1, 2, 3):
            checkpoints.save({"step": step}, f"step {step}")
        assert checkpoints.load() == {"step": 3}
        checkpoints.clear()
    assert os.path.lexists(path) or kind == "sparse"  # no run wrote it; a damaged checkpoint is what a sparse file seems


def test_learn_goes_on_past_a_checkpoint_that_is_a_pipe(tmp_path: Path):
    path = tmp_path / ".checkpoints" / "cups" / "00000001.safetensors"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    mifo(*learn_arguments(write_instance(tmp_path / "instances" / "cups"), tmp_path, "--resume"))


# --- JSON -----------------------------------------------------------------------------------------


def test_records_have_null_and_a_reason_for_what_is_not_finite():
    record = {"a": {"b": [1.0, float("nan")]}, "c": (float("-inf"), None), "d": "x"}
    written = json.loads(record_text(record), parse_constant=lambda name: pytest.fail(name))
    assert written == {"a": {"b": [1.0, None]}, "c": [None, None], "d": "x", "not_finite": ["a.b.1 was nan", "c.0 was -inf"]}
    assert json.loads(record_text({"a": 1.5})) == {"a": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"a": float("nan")})
    assert len(json.loads(record_text({str(k): float("inf") for k in range(1000)}))["not_finite"]) == 21


def test_no_other_code_writes_json():
    """`json.dumps` writes NaN unless it is told not to."""
    sources = [p for folder in ("mifo", "scripts") for p in (ROOT / folder).rglob("*.py")]
    bare = [str(p.relative_to(ROOT)) for p in sources if re.search(r"\bdumps?\(|\bimport dumps?\b", p.read_text())
            and p.name != "json_text.py"]  # fmt: skip
    assert not bare, f"{bare}: use mifo.json_text"
