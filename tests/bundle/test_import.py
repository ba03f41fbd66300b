"""Files that other programs trained become a bundle that draws what they drew, or a message that says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import mifo, snapshot, tiny_base_folder, tiny_bundle_folder, tiny_xl_bundle_folder, tiny_xl_folder
from safetensors.torch import load_file, save_file
from test_pipeline import close, drawn_by, drawn_by_mifo

from mifo.bundle.store import load_bundle
from mifo.model.load_base import load_base_model


def run_import(*files: Path, to: Path, model: Path | None = None, exit_code: int = 0, words: str = "") -> Any:
    more = ["--words", words] if words else []
    return mifo("import", *files, "--model-path", model or tiny_base_folder(), "--output-dir", to, "--name", "taken", *more,
                "--json", exit_code=exit_code)  # fmt: skip


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_there_and_back_again(tmp_path: Path, family: str, layout: str) -> None:
    model, own = {"sd": (tiny_base_folder(), tiny_bundle_folder()), "sdxl": (tiny_xl_folder(), tiny_xl_bundle_folder())}[family]
    mifo("export", own, "--format", layout, "--output-path", tmp_path / "files")
    files = sorted((tmp_path / "files").glob("*.safetensors"))
    before = snapshot(tmp_path / "files")
    found = json.loads(run_import(*files, to=tmp_path / "models", model=model).stdout)
    assert found["tokens"] == ["<asset0>", "<asset1>"] and found["notes"] == [] and snapshot(tmp_path / "files") == before
    bundle, base = load_bundle(tmp_path / "models" / "taken"), load_base_model(str(model))
    assert bundle.adapters == load_bundle(own).adapters and bundle.metadata["imported"] == [file.name for file in files]
    assert close(drawn_by_mifo(base, bundle), drawn_by_mifo(base, load_bundle(own)))


def peft_lora(model: Any, targets: list[str], ranks: dict[str, int], alpha: int) -> dict[str, torch.Tensor]:
    """As another program trains it: more kinds of layers, ranks of their own, an alpha that is not the rank."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, lora_alpha=alpha, target_modules=targets, rank_pattern=ranks))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = (0.1 * torch.randn_like(weight)).half().float()  # as bundles keep them
    found: dict[str, torch.Tensor] = convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
    return found


@pytest.mark.parametrize("folder", [tiny_base_folder, tiny_xl_folder])
def test_layers_that_mifo_does_not_train(tmp_path: Path, folder: Any) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder())
    pipe.set_progress_bar_config(disable=True)
    targets = ["attn2.to_k", "to_q", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut"]
    weights = {f"unet.{k}": v for k, v in peft_lora(pipe.unet, targets, {"proj_in": 2}, alpha=8).items()}
    facts = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": targets, "unet.rank_pattern": {"proj_in": 2}}
    save_file(weights, tmp_path / "theirs.safetensors", metadata={"lora_adapter_metadata": json.dumps(facts)})
    prompt = "a photo of a red car at night"
    expected = drawn_by(pipe, prompt)
    pipe.unet.disable_adapters()
    bare = drawn_by(pipe, prompt)
    found = run_import(tmp_path / "theirs.safetensors", to=tmp_path, model=folder(), words="red car")
    assert "are 2 tokens" in found.stderr or "is 2 tokens" in found.stderr
    bundle = load_bundle(tmp_path / "taken")
    ours = drawn_by_mifo(load_base_model(str(folder())), bundle, prompt)
    assert close(ours, expected) and not close(ours, bare)
    assert bundle.words == ("red car",) and bundle.lora["unet_lora"].config.r == 4


def test_a_trigger_word_of_one_token_is_the_asset(tmp_path: Path) -> None:
    mifo("export", tiny_bundle_folder(), "--output-path", tmp_path / "files")
    run_import(tmp_path / "files" / "pytorch_lora_weights.safetensors", to=tmp_path, words="car")
    base, bundle = load_base_model(str(tiny_base_folder())), load_bundle(tmp_path / "taken")
    asset, word = (drawn_by_mifo(base, bundle, f"a photo of {name} at night") for name in ("<asset0>", "car"))
    assert close(asset, word)


def spoiled(tmp_path: Path, name: str) -> Path:
    """A file with something that a bundle cannot hold."""
    mifo("export", tiny_bundle_folder(), "--output-path", tmp_path / "files")
    weights = load_file(tmp_path / "files" / "pytorch_lora_weights.safetensors")
    first = next(iter(weights))
    row = load_file(tmp_path / "files" / "asset0.safetensors")["<asset0>"]
    made: dict[str, Any] = {
        "LoHa": {"lora_unet_x.hada_w1_a": torch.ones(2, 2), "lora_unet_x.hada_w1_b": torch.ones(2, 2)},
        "DoRA": {**weights, first.replace(".weight", ".dora_scale"): torch.ones(3)},
        "other layers": {k.replace("down_blocks.1", "down_blocks.7"): v for k, v in weights.items()},
        "other sizes": {k: v[:, :-1].contiguous() if v.shape[1] > 8 else v for k, v in weights.items()},
        "not finite": {**weights, first: weights[first] * torch.inf},
        "several vectors": {"emb_params": row.repeat(4, 1)},
        "another width": {"<x>": row[:-1].contiguous()},
        "a number for a matrix": {**weights, first: torch.tensor(1.0)},
        "no LoRA": {"model.weight": torch.ones(2, 3), "model.bias": torch.ones(2)},
    }
    save_file(made[name], tmp_path / "theirs.safetensors")
    return tmp_path / "theirs.safetensors"


@pytest.mark.parametrize(("name", "message"), [
    ("LoHa", "only plain LoRA"), ("DoRA", "is DoRA"), ("other layers", "cannot be placed"), ("other sizes", "another family"),
    ("not finite", "not finite"), ("several vectors", "has 4 vectors"), ("another width", "127 numbers, but"),
    ("no LoRA", "no such part"), ("a number for a matrix", "can be read"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, name: str, message: str) -> None:
    file = spoiled(tmp_path, name)
    result = run_import(file, to=tmp_path / "models", words="car", exit_code=2)
    assert message in result.output and not (tmp_path / "models" / "taken").exists()


@pytest.mark.parametrize("facts", ["[]", "{", '{"unet.lora_alpha": "much"}', '{"unet.alpha_pattern": 3}'])
def test_metadata_that_is_not_diffusers_own_is_refused(tmp_path: Path, facts: str) -> None:
    mifo("export", tiny_bundle_folder(), "--output-path", tmp_path / "files")
    weights = load_file(tmp_path / "files" / "pytorch_lora_weights.safetensors")
    save_file(weights, tmp_path / "theirs.safetensors", metadata={"lora_adapter_metadata": facts})
    result = run_import(tmp_path / "theirs.safetensors", to=tmp_path / "models", words="car", exit_code=2)
    assert "get the file again" in result.output and not (tmp_path / "models" / "taken").exists()


def test_what_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.pt").write_bytes(b"\x80\x04pickle")
    assert "can run code" in run_import(tmp_path / "old.pt", to=tmp_path / "models", words="car", exit_code=2).output
    assert "There is no file" in run_import(tmp_path / "no.safetensors", to=tmp_path / "models", exit_code=2).output
    mifo("export", tiny_bundle_folder(), "--output-path", tmp_path / "files")
    lora = tmp_path / "files" / "pytorch_lora_weights.safetensors"
    assert "--words" in run_import(lora, to=tmp_path / "models", exit_code=2).output
    assert "--words" in run_import(lora, to=tmp_path / "models", words="red\x1b[2Jcar", exit_code=2).output
    assert "second LoRA" in run_import(lora, lora, to=tmp_path / "models", words="car", exit_code=2).output
    both = [tmp_path / "files" / f"asset{k}.safetensors" for k in range(2)]
    assert "1 entries for 2" in run_import(lora, *both, to=tmp_path / "models", words="car", exit_code=2).output
    assert not (tmp_path / "models" / "taken").exists()


def test_a_bundle_of_that_name_stays(tmp_path: Path) -> None:
    mifo("export", tiny_bundle_folder(), "--output-path", tmp_path / "files")
    lora = tmp_path / "files" / "pytorch_lora_weights.safetensors"
    run_import(lora, to=tmp_path / "models", words="car")
    before = snapshot(tmp_path / "models")
    assert "--overwrite" in run_import(lora, to=tmp_path / "models", words="bus", exit_code=2).output
    assert snapshot(tmp_path / "models") == before
    mifo("synthesize", "taken", "--output-dir", tmp_path / "models", "--model-path", tiny_base_folder(), "--steps", "2",
         "--prompt", "a photo of <asset0>", "--boxes", "[[0.2, 0.2, 0.8, 0.8]]", "--output-path", tmp_path / "drawn")  # fmt: skip
    assert (tmp_path / "drawn" / "000000.png").is_file()


