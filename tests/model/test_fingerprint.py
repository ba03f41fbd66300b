"""A base model's fingerprint: the same for the same model however it was saved, another as soon as a picture could change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import copy_bundle, edit_json, load_base, tiny_base_folder
from safetensors.torch import load_file, save_file

from mifo.bundle.store import attach, base_of_bundle, load_bundle
from mifo.errors import InputError
from mifo.model import fingerprint as module
from mifo.model.fingerprint import file_fingerprint, fingerprint, weight_name
from mifo.model.load_base import load_base_model

WEIGHTS = {"text_encoder": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
           "unet": "diffusion_pytorch_model.safetensors"}  # fmt: skip


def change_weights(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / part / WEIGHTS[part]
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder(), tmp_path / "base"))


# --- the same -----------------------------------------------------------------------------------


def saved_again_in_shards(folder: Path) -> None:
    """By the libraries that are installed, whatever they name the weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    for part, kind in (("text_encoder", CLIPTextModel), ("vae", AutoencoderKL), ("unet", UNet2DConditionModel)):
        model = kind.from_pretrained(folder / part)
        shutil.rmtree(folder / part)
        model.save_pretrained(folder / part, max_shard_size="1MB")
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1


def saved_by_an_older_transformers(folder: Path) -> None:
    positions = {"text_model.embeddings.position_ids": torch.arange(40)[None]}
    change_weights(folder, "text_encoder", lambda w: {**{"text_model." + k.removeprefix("text_model."): v for k, v in w.items()},
                                                      **positions})  # fmt: skip
    edit_json(folder / "text_encoder" / "config.json", torch_dtype="float32", transformers_version="4.20.0")


def named_fp16(folder: Path) -> None:
    for part, name in WEIGHTS.items():
        (folder / part / name).rename(folder / part / name.replace(".safetensors", ".fp16.safetensors"))


def with_the_tokenizers_older_files(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    path.unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))


def with_defaults_left_out(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if v is not None and k != "act_fn"}))


def with_another_sampler(folder: Path) -> None:
    edit_json(folder / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler")


@pytest.mark.parametrize(
    "save",
    [saved_again_in_shards, saved_by_an_older_transformers, named_fp16, with_the_tokenizers_older_files, with_defaults_left_out,
     with_another_sampler],
)  # fmt: skip
def test_the_same_model_saved_in_another_way_keeps_its_fingerprint_and_its_bundles(save: Callable[[Path], None], copy: Path):
    before = fingerprint(copy)
    save(copy)
    assert fingerprint(copy) == before
    with attach(load_base_model(str(copy)), load_bundle(copy_bundle(copy.parent))):
        pass


def test_weights_in_half_precision_are_the_same_in_full(copy: Path):
    change_weights(copy, "unet", lambda w: {k: v.half() for k, v in w.items()})
    half = fingerprint(copy)
    change_weights(copy, "unet", lambda w: {k: v.float() for k, v in w.items()})
    assert fingerprint(copy) == half != fingerprint(tiny_base_folder())


def test_a_vaes_attention_has_one_name():
    old = ["encoder.mid_block.attentions.0.query.weight", "encoder.mid_block.attentions.0.proj_attn.bias"]
    assert [weight_name("vae", n) for n in old] == [n.replace("query", "to_q").replace("proj_attn", "to_out.0") for n in old]


# --- another ------------------------------------------------------------------------------------


def one_weight(folder: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        some = weights["conv_in.weight"].flatten()
        some[7] = torch.nextafter(some[7], torch.tensor(9.0))
        return weights

    change_weights(folder, "unet", change)


def two_words(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    record = json.loads(path.read_text())
    vocabulary: dict[str, int] = record["model"]["vocab"]
    first, second = "car</w>", "house</w>"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(record))


def a_merge(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    record = json.loads(path.read_text())
    del record["model"]["merges"][-1]
    path.write_text(json.dumps(record))


def setting(path: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / path, **changes)


@pytest.mark.parametrize(
    "change",
    [one_weight, two_words, a_merge, setting("tokenizer/tokenizer_config.json", pad_token="a</w>"),
     setting("tokenizer/tokenizer_config.json", model_max_length=30), setting("vae/config.json", scaling_factor=0.5),
     setting("scheduler/scheduler_config.json", beta_end=0.02),
     setting("scheduler/scheduler_config.json", prediction_type="epsilon"), setting("unet/config.json", norm_eps=1e-6),
     setting("text_encoder/config.json", hidden_act="quick_gelu")],
)  # fmt: skip
def test_whatever_changes_pictures_changes_the_fingerprint(change: Callable[[Path], None], copy: Path):
    before = fingerprint(copy)
    change(copy)
    assert fingerprint(copy) != before


def test_digests_of_large_files_are_remembered_until_a_file_changes(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("mifo.model.digest_cache.LARGE", 1)
    hashed: list[str] = []
    original = module._files_digest
    monkeypatch.setattr(module, "_files_digest", lambda part, files: hashed.append(part) or original(part, files))

    def anew() -> str:
        module._fingerprint.cache_clear()
        hashed.clear()
        return fingerprint(copy)

    before = anew()
    assert sorted(hashed) == ["text_encoder", "unet", "vae"] and before == fingerprint(tiny_base_folder())
    assert anew() == before and not hashed
    one_weight(copy)
    assert anew() != before and hashed == ["unet"]
    for entry in (cache / "mifo" / "digests").iterdir():
        entry.write_text("spoiled")
    assert anew() != before and len(hashed) == 3
    shutil.rmtree(cache)
    cache.write_text("a file of the user's")
    assert anew() != before and cache.read_text() == "a file of the user's"
    module._fingerprint.cache_clear()


# --- older bundles ------------------------------------------------------------------------------


def test_a_bundle_with_a_fingerprint_of_bytes_still_fits_its_base_and_no_other(tmp_path: Path, copy: Path):
    folder = copy_bundle(tmp_path)
    record = json.loads((folder / "bundle.json").read_text())
    assert record["base"]["fingerprint"].startswith("2:")
    record["base"]["fingerprint"] = file_fingerprint(tiny_base_folder())
    (folder / "bundle.json").write_text(json.dumps(record))
    bundle = load_bundle(folder)
    assert base_of_bundle(bundle) == str(tiny_base_folder().resolve())
    with attach(load_base(), bundle):
        pass
    one_weight(copy)
    with pytest.raises(InputError, match="was learned on"), attach(load_base_model(str(copy)), bundle):
        pass
    with pytest.raises(InputError, match="or another one than it was"):
        base_of_bundle(replace(bundle, base_source=str(copy)))
