"""The bundle on disk: whole or absent, bit-equal when read again, lent to a model and taken back, readable by other tools."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import ROOT, copy_bundle, edit_json, load_base, mifo, snapshot, tiny_base_folder, tiny_bundle_folder
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mifo.bundle.export import export_for_diffusers
from mifo.bundle.store import Bundle, attach, check_base, find_bundle, load_bundle, save_bundle
from mifo.config import LearnConfig, LoraPhase
from mifo.errors import InputError
from mifo.io.files import write_file, write_folder
from mifo.io.temporary import ABANDONED_AFTER
from mifo.model.base import BaseModel
from mifo.model.embedding import use_assets
from mifo.model.load_base import load_base_model
from mifo.model.lora import add_adapters, remove_adapter
from mifo.prompts import tokenize_prompt

PROMPT = "a photo of <asset0> and <asset1>"


@pytest.fixture(scope="module")
def shared_base() -> BaseModel:
    """For tests that give it back as it was."""
    return load_base()


@pytest.fixture
def base(shared_base: BaseModel) -> Iterator[BaseModel]:
    before = outputs(shared_base, "a photo")
    yield shared_base
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(shared_base, "a photo"), strict=True))


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(tiny_bundle_folder())


@torch.no_grad()
def outputs(base: BaseModel, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states (1, L, D) and the UNet's prediction (1, C, h, w)."""
    states = base.encode_prompt(torch.tensor([tokenize_prompt(base.tokenizer, prompt, []).input_ids])).states
    size = int(base.unet.config["sample_size"])
    latents = torch.randn((1, 12, size, size), generator=torch.Generator().manual_seed(5)).to(base.dtype)
    return states, base.unet(latents, torch.tensor(300), states).sample


def random_rows(count: int = 2, width: int = 128) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def randomize(adapters: dict[str, PeftModel]) -> None:
    """Fresh LoRA changes nothing until its second matrix is trained."""
    generator = torch.Generator().manual_seed(4)
    for adapter in adapters.values():
        for name, weight in adapter.named_parameters():
            if "lora_" in name:
                weight.data = 0.05 * torch.randn(weight.shape, generator=generator)


def save(base: BaseModel, folder: Path, rows: torch.Tensor, adapters: dict[str, PeftModel], **facts: Any) -> Bundle:
    return save_bundle(folder, base, ("<asset0>", "<asset1>")[: len(rows)], None, rows, adapters, LearnConfig(seed=7), facts,
                       overwrite=True, keep_base_path=True)  # fmt: skip


# --- there and back -----------------------------------------------------------------------------


def test_rows_and_adapters_come_back_bit_equal(base: BaseModel, tmp_path: Path):
    rows = random_rows()
    adapters = add_adapters(base, 3, text_encoder=True)
    randomize(adapters)
    states = {n: get_peft_model_state_dict(a, save_embedding_layers=False) for n, a in adapters.items()}
    expected = {n: {k: v.half().clone() for k, v in s.items()} for n, s in states.items()}
    saved = save(base, tmp_path / "cups", rows, adapters, seconds=1.5)
    for adapter in adapters.values():
        remove_adapter(adapter)
    again = load_bundle(tmp_path / "cups")
    assert again.tokens == ("<asset0>", "<asset1>") and again.config == LearnConfig(seed=7) and again.metadata["seconds"] == 1.5
    assert torch.equal(again.token_embeddings, rows) and torch.equal(saved.token_embeddings, rows)
    assert again.token_embeddings.dtype == torch.float32
    assert (again.base_name, again.base_source, again.base_fingerprint) == (base.public_name, base.source, base.fingerprint)
    for name in adapters:
        weights = load_file(tmp_path / "cups" / name / "adapter_model.safetensors")
        assert {k: v.dtype for k, v in weights.items()} == dict.fromkeys(expected[name], torch.float16)
        assert all(torch.equal(weights[k], v) for k, v in expected[name].items())
    with attach(base, again):
        for name, part in (("unet_lora", base.unet), ("text_lora", base.text_encoder)):
            attached = get_peft_model_state_dict(part, save_embedding_layers=False)
            assert {f"base_model.model.{k}" for k in attached} == set(expected[name])
            assert all(torch.equal(v, expected[name][f"base_model.model.{k}"].float()) for k, v in attached.items())


def test_the_same_adapters_are_saved_as_the_same_bytes(base: BaseModel, tmp_path: Path):
    adapters = add_adapters(base, 3, text_encoder=False)
    save(base, tmp_path / "a", random_rows(), adapters)
    save(base, tmp_path / "b", random_rows(), adapters)
    remove_adapter(adapters["unet_lora"])
    first, second = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    for name in ("bundle.json", "manifest.json"):  # the name, and its digest
        del first[name], second[name]
    assert first == second
    targets = json.loads((tmp_path / "a" / "unet_lora" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)  # peft keeps a set, whose order changes from process to process


def test_a_bundle_without_adapters_has_rows_only(base: BaseModel, tmp_path: Path):
    bundle = save(base, tmp_path / "rows", random_rows(), {})
    assert bundle.adapters == ()
    with attach(base, bundle):
        assert not any(isinstance(m, LoraLayer) for m in base.unet.modules())
        assert not torch.equal(outputs(base, PROMPT)[0], outputs(base, "a photo of a and a")[0])


def test_files_have_the_rights_that_new_files_get(tmp_path: Path):
    (tmp_path / "plain").touch()
    with write_folder(tmp_path / "bundle", "bundle") as temporary:
        save_file({"x": torch.zeros(1)}, temporary / "x.safetensors")  # its own are the owner's alone
    assert (tmp_path / "bundle" / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_bundle_at_the_default_rank_stays_below_5_mib(base: BaseModel, bundle: Bundle):
    assert json.loads((bundle.folder / "unet_lora" / "adapter_config.json").read_text())["r"] == LoraPhase().rank
    assert sum(p.stat().st_size for p in bundle.folder.rglob("*") if p.is_file()) < 5 * 2**20


def test_nothing_in_a_bundle_is_a_pickle(bundle: Bundle):
    assert {p.suffix for p in bundle.folder.rglob("*") if p.is_file()} == {".json", ".safetensors", ".png", ".webp"}


# --- lending and giving back --------------------------------------------------------------------


def state_of(base: BaseModel) -> list[tuple[str, str, bool]]:
    modules = [(name, type(m).__name__, m.training) for p in (base.unet, base.text_encoder) for name, m in p.named_modules()]
    weights = [(name, "", w.requires_grad) for p in (base.unet, base.text_encoder) for name, w in p.named_parameters()]
    return modules + weights


def test_attaching_changes_the_model_and_gives_it_back_bit_equal(base: BaseModel, bundle: Bundle):
    modules = state_of(base)
    before = outputs(base, "a red car")
    for _ in range(2):  # the second time must not warn of remains of the first
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            with attach(base, bundle):
                during = outputs(base, "a red car")
        assert not torch.equal(before[0], during[0]) and not torch.equal(before[1], during[1])
        after = outputs(base, "a red car")
        assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
        assert state_of(base) == modules


def test_an_exception_inside_gives_the_model_back_too(base: BaseModel, bundle: Bundle):
    modules = state_of(base)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), attach(base, bundle):
            raise error
    assert state_of(base) == modules  # the fixture compares the outputs


def test_an_adapter_that_does_not_fit_leaves_nothing_behind(base: BaseModel, tmp_path: Path):
    folder = copy_bundle(tmp_path)
    path = folder / "text_lora" / "adapter_model.safetensors"  # attached after the rows and the UNet's
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)
    modules = state_of(base)
    with pytest.raises(InputError, match="does not fit"), attach(base, load_bundle(folder)):
        pass
    assert state_of(base) == modules


def test_lora_scale_0_is_the_base_with_the_rows_only(base: BaseModel, bundle: Bundle):
    with attach(base, bundle, lora_scale=0.0):
        states, prediction = outputs(base, PROMPT)
    with attach(base, bundle, lora_scale=1.0):
        assert not torch.allclose(outputs(base, PROMPT)[1], prediction, atol=1e-4)
    ids = [base.tokenizer.get_added_vocab()[t] for t in bundle.tokens]
    with use_assets(base.text_encoders, ids, bundle.token_embeddings):
        rows_only = outputs(base, PROMPT)
    assert torch.equal(states, rows_only[0]) and torch.equal(prediction, rows_only[1])


def test_a_bundle_with_more_assets_follows_one_with_fewer(base: BaseModel, bundle: Bundle, tmp_path: Path):
    one = save(base, tmp_path / "one", random_rows(1), {})
    for each in (one, bundle, one):
        with attach(base, each):
            outputs(base, "a photo of <asset0>")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_fp32_and_the_base_is_not_touched(dtype: torch.dtype):
    base = load_base_model(str(tiny_base_folder()), dtype=dtype)
    frozen = {n: w.clone() for n, w in base.unet.named_parameters()}
    adapter = add_adapters(base, 2, text_encoder=False)["unet_lora"]
    trained = {n: w for n, w in adapter.named_parameters() if w.requires_grad}
    assert trained and all("lora_" in n and w.dtype == torch.float32 for n, w in trained.items())
    assert all(w.dtype == dtype for n, w in adapter.named_parameters() if "lora_" not in n)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        outputs_of_training(base).float().pow(2).mean().backward()
    optimizer.step()
    remove_adapter(adapter)
    assert all(torch.equal(frozen[n], w) for n, w in base.unet.named_parameters())


def outputs_of_training(base: BaseModel) -> torch.Tensor:
    size = int(base.unet.config["sample_size"])
    latents, states = torch.ones(1, 12, size, size, dtype=base.dtype), torch.ones(1, 4, 128, dtype=base.dtype)
    return base.unet(latents, torch.tensor(9), states).sample


# --- peft ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_peft_loads_our_adapters_whole_and_trainable_in_fp32(bundle: Bundle, dtype: torch.dtype):
    base = load_base_model(str(tiny_base_folder()), dtype=dtype)
    for part, name in ((base.unet, "unet_lora"), (base.text_encoder, "text_lora")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # "Found missing adapter keys", say
            model = PeftModel.from_pretrained(part, str(bundle.folder / name), is_trainable=True)
        saved = load_file(bundle.folder / name / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
        assert {k: v.half().tolist() for k, v in loaded.items()} == {k: v.tolist() for k, v in saved.items()}
        trained = [w for w in model.parameters() if w.requires_grad]
        assert len(trained) == len(saved) and all(w.dtype == torch.float32 for w in trained)


def test_ours_and_pefts_own_loading_draw_the_same(base: BaseModel, bundle: Bundle):
    with attach(base, bundle):
        states, prediction = outputs(base, "a red car")
    model = PeftModel.from_pretrained(base.unet, str(bundle.folder / "unet_lora"))
    with torch.no_grad():
        size = int(base.unet.config["sample_size"])
        latents = torch.randn((1, 12, size, size), generator=torch.Generator().manual_seed(5))
        theirs = base.unet(latents, torch.tensor(300), states).sample
    remove_adapter(model)
    assert torch.equal(prediction, theirs)


def test_adapters_learned_with_another_version_of_transformers_fit(base: BaseModel, bundle: Bundle, tmp_path: Path):
    folder = tmp_path / "cups"
    shutil.copytree(bundle.folder, folder)
    path, inner = folder / "text_lora" / "adapter_model.safetensors", "base_model.model."
    weights = load_file(path)
    other = {True: (f"{inner}text_model.", inner), False: (inner, f"{inner}text_model.")}
    old, new = other[any("text_model." in name for name in weights)]
    save_file({name.replace(old, new): weight for name, weight in weights.items()}, path)
    drawn = []
    for each in (bundle, load_bundle(folder)):
        with attach(base, each):
            drawn.append(outputs(base, PROMPT))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


# --- diffusers ----------------------------------------------------------------------------------


def test_diffusers_reads_the_export_and_predicts_the_same(base: BaseModel, bundle: Bundle, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    export_for_diffusers(bundle, tmp_path / "export")
    names = [f"{n}.safetensors" for n in ("asset0", "asset1", "pytorch_lora_weights")]
    assert sorted(os.listdir(tmp_path / "export")) == sorted([*names, "manifest.json"])
    exported = load_file(tmp_path / "export" / "pytorch_lora_weights.safetensors")
    text = [name for name in exported if not name.startswith("unet.")]
    assert text and all(name.startswith("text_encoder.text_model.encoder.") for name in text)  # as other programs read them
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base_folder())
    for token in ("asset0", "asset1"):
        pipe.load_textual_inversion(tmp_path / "export" / f"{token}.safetensors")
    pipe.load_lora_weights(tmp_path / "export")
    ids = torch.tensor([tokenize_prompt(pipe.tokenizer, PROMPT, bundle.tokens).input_ids])
    with attach(base, bundle):
        states, prediction = outputs(base, PROMPT)
    size = int(base.unet.config["sample_size"])
    latents = torch.randn((1, 12, size, size), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        their_states = pipe.text_encoder(ids)[0]
        theirs = pipe.unet(latents, torch.tensor(300), their_states).sample
        pipe.unload_lora_weights()
        bare = pipe.unet(latents, torch.tensor(300), their_states).sample
    assert torch.allclose(states, their_states, atol=1e-3)
    assert torch.allclose(prediction, theirs, atol=1e-3)
    assert (prediction - bare).abs().max() > 1e-2  # so the LoRA does matter


def test_kohyas_names_are_read_by_diffusers_as_the_same_adapter(base: BaseModel, bundle: Bundle, tmp_path: Path):
    from diffusers import StableDiffusionPipeline

    mifo("export", bundle.folder, "--format", "kohya", "--output-path", tmp_path / "kohya")
    names = list(load_file(tmp_path / "kohya" / "lora.safetensors"))
    assert any(name.startswith("lora_te_text_model_encoder_layers_0_") for name in names)  # no number with one text encoder
    pipe = StableDiffusionPipeline.from_pretrained(tiny_base_folder())
    pipe.load_lora_weights(tmp_path / "kohya" / "lora.safetensors")
    ids = torch.tensor([tokenize_prompt(pipe.tokenizer, "a photo of a red car", []).input_ids])
    size = int(base.unet.config["sample_size"])
    latents = torch.randn((1, 12, size, size), generator=torch.Generator().manual_seed(5))
    with attach(base, bundle):
        states, prediction = outputs(base, "a photo of a red car")
    with torch.no_grad():
        assert torch.allclose(states, pipe.text_encoder(ids)[0], atol=1e-3)
        assert torch.allclose(prediction, pipe.unet(latents, torch.tensor(300), states).sample, atol=1e-3)
        pipe.unload_lora_weights()
        assert (prediction - pipe.unet(latents, torch.tensor(300), states).sample).abs().max() > 1e-2


def test_an_export_replaces_an_export_and_nothing_else(base: BaseModel, bundle: Bundle, tmp_path: Path):
    export_for_diffusers(bundle, tmp_path / "export")
    one = save(base, tmp_path / "one", random_rows(1), {})
    before = snapshot(tmp_path / "export")
    with pytest.raises(InputError, match="holds an earlier run's export; give --overwrite"):
        export_for_diffusers(one, tmp_path / "export")
    assert snapshot(tmp_path / "export") == before
    export_for_diffusers(one, tmp_path / "export", overwrite=True)
    assert sorted(os.listdir(tmp_path / "export")) == ["asset0.safetensors", "manifest.json"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").touch()
    with pytest.raises(InputError, match="other things"):
        export_for_diffusers(bundle, tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == ["me.jpg"]


# --- whole or absent ----------------------------------------------------------------------------


def test_a_failure_while_saving_leaves_the_earlier_bundle(base: BaseModel, tmp_path: Path):
    folder = copy_bundle(tmp_path)
    before = snapshot(tmp_path)
    for error in (ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")):

        def fail(_: Path, error: BaseException = error) -> None:
            raise error

        with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
            save_bundle(folder, base, ("<asset0>",), None, random_rows(1), {}, LearnConfig(), {}, fail, overwrite=True)
        assert snapshot(tmp_path) == before


def test_rows_that_are_not_finite_replace_nothing(base: BaseModel, tmp_path: Path):
    folder = copy_bundle(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="finite"):
        save(base, folder, random_rows(1) * float("nan"), {})
    assert snapshot(tmp_path) == before


def test_a_folder_that_is_no_bundle_is_never_replaced(base: BaseModel, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "img.jpg").touch()
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="other things"):
        save(base, tmp_path / "photos", random_rows(), {})
    with pytest.raises(InputError, match="is a file"):
        save(base, tmp_path / "file", random_rows(), {})
    assert snapshot(tmp_path) == before


def test_through_a_link_the_folder_that_it_means_is_replaced(base: BaseModel, tmp_path: Path):
    copy_bundle(tmp_path, "real")
    (tmp_path / "link").symlink_to("real")
    save(base, tmp_path / "link", random_rows(1), {})
    assert (tmp_path / "link").is_symlink() and len(load_bundle(tmp_path / "real").tokens) == 1
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_the_swap_works_where_the_system_cannot_exchange(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mifo.io.swap.exchange", lambda first, second: False)
    folder = copy_bundle(tmp_path)
    save(base, folder, random_rows(1), {})
    assert os.listdir(tmp_path) == [folder.name] and len(load_bundle(folder).tokens) == 1
    before = snapshot(tmp_path)
    rename, calls = os.rename, []

    def fail_once(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr("os.rename", fail_once)
    with pytest.raises(KeyboardInterrupt):
        save(base, folder, random_rows(), {})
    assert snapshot(tmp_path) == before and len(calls) == 3


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from mifo.io import files, swap
from mifo.io.manifest import MANIFEST

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

moment, folder = sys.argv[1], Path(sys.argv[2])
if moment == "before the swap":
    files._put = kill
if moment == "after the swap":
    swap.remove_ours = kill
with files.write_folder(folder, "bundle", overwrite=True) as temporary:
    for name in os.listdir(folder):
        if (folder / name).is_file() and name != MANIFEST:
            (temporary / name).write_bytes((folder / name).read_bytes())
    if moment == "while writing":
        kill()
"""


@pytest.mark.parametrize("moment", ["while writing", "before the swap", "after the swap"])
def test_kill_9_leaves_the_old_bundle_or_the_new_one(base: BaseModel, tmp_path: Path, moment: str):
    folder = tmp_path / "two_cups"
    with write_folder(folder, "bundle") as temporary:
        shutil.copytree(tiny_bundle_folder(), temporary, dirs_exist_ok=True)
        edit_json(temporary / "bundle.json", adapters=[])  # the new one is the old one without its adapters
    code = subprocess.run([sys.executable, "-c", KILLED_SAVE, moment, folder], cwd=ROOT).returncode
    assert code == -signal.SIGKILL
    assert load_bundle(folder).adapters == (() if moment == "after the swap" else ("unet_lora", "text_lora"))
    assert find_bundle("two_cups", tmp_path) == folder
    leftover = [p for p in tmp_path.iterdir() if p != folder]
    assert len(leftover) == 1 and leftover[0].name.startswith(".")
    save(base, tmp_path / "other", random_rows(), {})
    assert leftover[0].exists()  # it could be another process's
    long_ago = time.time() - ABANDONED_AFTER - 1
    os.utime(leftover[0], (long_ago, long_ago))
    save(base, tmp_path / "other", random_rows(), {})
    assert sorted(os.listdir(tmp_path)) == ["other", "two_cups"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "new" / "deep" / "a"
    with pytest.raises(ValueError), write_file(path) as temporary:
        temporary.write_text("1")
        raise ValueError
    assert os.listdir(tmp_path) == []
    with write_file(path) as temporary:
        temporary.write_text("1")
    with pytest.raises(InputError, match="exists already; give --overwrite"), write_file(path) as temporary:
        pytest.fail("went on")
    with write_file(path, overwrite=True) as temporary:
        temporary.write_text("2")
    assert path.read_text() == "2"
    (path.parent / "b").mkdir()
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match="a folder has this name"), write_file(path.parent / "b", overwrite=True):
        pytest.fail("went on")
    assert snapshot(tmp_path) == before


# --- what cannot be read ------------------------------------------------------------------------


def test_another_base_is_refused_by_its_fingerprint(bundle: Bundle):
    other = load_base_model(str(tiny_base_folder(1)))
    modules = state_of(other)
    with pytest.raises(InputError, match=r"learned on .* but the base model is .*--model-path"), attach(other, bundle):
        pass
    assert state_of(other) == modules and "<asset0>" not in other.tokenizer.get_vocab()


def test_a_bundle_of_another_embedded_model_is_refused_and_says_where_its_photo_is(base: BaseModel, bundle: Bundle):
    """As those of the 64-pixel model are, whose base has the same name."""
    embedded = replace(base, source="toybox", fingerprint="f" * 64)
    old = replace(bundle, base_name="toybox", base_source="toybox", base_fingerprint="0" * 64, instance="digest")
    with pytest.raises(InputError, match=r"another version's embedded model.*learn its photo again.*instance holds a copy"):
        check_base(embedded, old)
    with pytest.raises(InputError) as refused:
        check_base(embedded, replace(old, instance=None))
    assert "learn its photo again" in str(refused.value) and "holds a copy" not in str(refused.value)


Spoiler = Callable[[Path], Any]


def without(name: str) -> Spoiler:
    return lambda f: (f / name).unlink()


def as_bytes(name: str, content: bytes) -> Spoiler:
    return lambda f: (f / name).write_bytes(content)


def with_keys(name: str, **changes: Any) -> Spoiler:
    return lambda f: edit_json(f / name, **changes)


def with_row(row: torch.Tensor) -> Spoiler:
    path = "assets.safetensors"
    return lambda f: save_file({**load_file(f / path), "<asset1>": row}, f / path)


RECORD, ROWS, UNET, TEXT = "bundle.json", "assets.safetensors", "unet_lora", "text_lora"
BROKEN = {
    "no bundle.json": (without(RECORD), r"bundle\.json is missing"),
    "no rows": (without(ROWS), r"assets\.safetensors is missing"),
    "no adapter": (lambda f: shutil.rmtree(f / UNET), "missing unet_lora"),
    "no weights": (without(f"{TEXT}/adapter_model.safetensors"), "is missing"),
    "no adapter config": (without(f"{TEXT}/adapter_config.json"), "is missing"),
    "rows cut short": (lambda f: (f / ROWS).write_bytes((f / ROWS).read_bytes()[:-9]), "corrupt"),
    "empty rows": (as_bytes(ROWS, b""), "corrupt"),
    "weights are no safetensors": (as_bytes(f"{UNET}/adapter_model.safetensors", b"PK\x03\x04 a pickle"), "corrupt"),
    "one row too few": (with_keys(RECORD, tokens=["<asset0>", "<asset1>", "<asset2>"]), "no row for <asset2>"),
    "a row of NaN": (with_row(torch.full((128,), float("nan"))), "values that are not finite"),
    "rows of two lengths": (with_row(torch.zeros(64)), "one length"),
    "a row that is a matrix": (with_row(torch.zeros(2, 128)), "finite vectors"),
    "newer schema": (with_keys(RECORD, schema=2), "schema 2, this version reads up to 1; update"),
    "schema is infinite": (with_keys(RECORD, schema=float("inf")), "garbles"),
    "unknown key": (with_keys(RECORD, config={"lorra": 1}), r"unknown keys .*lorra"),
    "foreign tokens": (with_keys(RECORD, tokens=["photo", "of"]), "expected <asset0>"),
    "no tokens": (with_keys(RECORD, tokens=[]), "expected <asset0>"),
    "tokens is a number": (with_keys(RECORD, tokens=2), "garbles"),
    "no base": (with_keys(RECORD, base=[]), "garbles"),
    "not JSON": (as_bytes(RECORD, b'{"schema": 1,'), "cannot be read as JSON"),
    "not text": (as_bytes(RECORD, b"\xff\xfe\x00"), "cannot be read as JSON"),
    "a list": (as_bytes(RECORD, b"[1]"), "expected an object"),
    "deeply nested": (as_bytes(RECORD, b"[" * 100_000), "cannot be read as JSON"),
    "huge": (as_bytes(RECORD, b" " * (5 << 20)), "5 MiB"),
    "adapter of another kind": (with_keys(f"{UNET}/adapter_config.json", target_modules=["lm_head"]), "no adapter"),
    "adapter rank is text": (with_keys(f"{UNET}/adapter_config.json", r="16"), "no adapter"),
    "adapter config is a list": (as_bytes(f"{UNET}/adapter_config.json", b"[]"), "expected an object"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_bundle_is_refused(tmp_path: Path, how: str):
    folder = copy_bundle(tmp_path)
    load_bundle(folder)
    spoil, message = BROKEN[how]
    spoil(folder)
    with pytest.raises(InputError, match=message) as refused:
        load_bundle(folder)
    assert len(str(refused.value)) < 600 and str(tmp_path) in str(refused.value)


def test_an_adapter_of_another_rank_than_it_says_is_refused(base: BaseModel, tmp_path: Path):
    folder = copy_bundle(tmp_path)
    edit_json(folder / "unet_lora" / "adapter_config.json", r=4)
    with pytest.raises(InputError, match="does not fit"), attach(base, load_bundle(folder)):
        pass


def test_rows_of_another_width_are_refused(base: BaseModel, tmp_path: Path):
    folder = copy_bundle(tmp_path)
    save_file({f"<asset{i}>": torch.zeros(64) for i in range(2)}, folder / "assets.safetensors")
    with pytest.raises(InputError, match=r"embeddings of 64 numbers.*takes 128"), attach(base, load_bundle(folder)):
        pass


def test_an_adapters_config_cannot_name_code_to_import(base: BaseModel, tmp_path: Path):
    folder = copy_bundle(tmp_path)
    edit_json(folder / "unet_lora" / "adapter_config.json", megatron_config={"a": 1}, megatron_core="this_module_is_not_here")
    with attach(base, load_bundle(folder)):
        pass


def test_finding_a_bundle_says_what_there_is(tmp_path: Path):
    copy_bundle(tmp_path, "cups")
    copy_bundle(tmp_path, ".cups.x.partial")
    (tmp_path / "photos").mkdir()
    assert find_bundle("cups", tmp_path) == tmp_path / "cups" and find_bundle(str(tmp_path / "cups"), Path("nowhere"))
    with pytest.raises(InputError, match=r"there is no learned bundle 'mugs': there are cups$"):
        find_bundle("mugs", tmp_path)
    with pytest.raises(InputError, match=r"has no bundle\.json"):
        find_bundle("photos", tmp_path)
    for odd in ("", "x" * 5000, "a\0b", ".."):
        with pytest.raises(InputError):
            find_bundle(odd, tmp_path)
    with pytest.raises(InputError, match=r"nowhere has none; run 'learn' first"):
        find_bundle("cups", Path("nowhere"))
