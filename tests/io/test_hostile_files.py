"""Files from strangers: nothing outside their own folder is read, no code is run, nothing hangs, and messages stay harmless."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from _tiny import (
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

from mifo.bundle.store import attach, base_of_bundle, load_bundle
from mifo.data.instance import load_instance
from mifo.errors import InputError
from mifo.evaluation.toybox_backend import load_truth
from mifo.io.terminal import MAX_MESSAGE, shown
from mifo.model.load_base import load_base_model
from mifo.prompts import check_prompt


class Canary:
    """A pickle that writes a file as soon as it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


# --- bundles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["assets.safetensors", "bundle.json", "unet_lora", "text_lora/adapter_model.safetensors",
                                  "instance", "instance/img.png", "instance/mask1.png"])  # fmt: skip
def test_a_link_out_of_a_bundle_is_refused(tmp_path: Path, name: str):
    folder = copy_bundle(tmp_path / "bundles")
    outside = tmp_path / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(InputError, match=r"is a link out of the bundle"):
        load_bundle(folder)


def test_a_link_inside_a_bundle_and_to_a_bundle_are_fine(tmp_path: Path):
    folder = copy_bundle(tmp_path / "bundles")
    (folder / "assets.safetensors").rename(folder / "rows.safetensors")
    (folder / "assets.safetensors").symlink_to("rows.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert len(load_bundle(tmp_path / "link").token_embeddings) == 2


@pytest.mark.parametrize("path", ["../../outside", "/outside", "unet_lora/../../../outside"])
def test_names_in_a_bundle_lead_nowhere(tmp_path: Path, path: str):
    """The names of adapters, tokens and files in bundle.json are never joined to a path."""
    folder = copy_bundle(tmp_path / "bundles")
    shutil.copytree(folder / "unet_lora", tmp_path / "outside")
    edit_json(folder / "bundle.json", adapters=[path, "unet_lora"], name=path, losses=path, preview=path)
    bundle = load_bundle(folder)
    assert bundle.adapters == ("unet_lora", "text_lora") and bundle.name == "two_cups"
    edit_json(folder / "bundle.json", tokens=[path, "<asset1>"])
    with pytest.raises(InputError, match="expected <asset0>"):
        load_bundle(folder)


@pytest.mark.parametrize("source", ["../../base", "./base", "a/b/c", "~/base", "https://there/base", "../x", "a/..", ""])
def test_a_bundle_cannot_name_a_base_model_by_a_relative_path(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch):
    folder = copy_bundle(tmp_path / "bundles")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny_base_folder())
    record = json.loads((folder / "bundle.json").read_text())
    edit_json(folder / "bundle.json", base={**record["base"], "name": "../base", "source": source})
    with pytest.raises(InputError, match="neither toybox nor a hub id" if source else "does not say where"):
        base_of_bundle(load_bundle(folder))


def test_a_bundles_own_base_is_taken_only_if_it_is_that_model(tmp_path: Path):
    folder = copy_bundle(tmp_path)
    record = json.loads((folder / "bundle.json").read_text())
    assert base_of_bundle(load_bundle(folder)) == str(tiny_base_folder())
    for source in (tiny_base_folder(1), tmp_path, Path("/proc"), tiny_bundle_folder()):
        edit_json(folder / "bundle.json", base={**record["base"], "source": str(source)})
        with pytest.raises(InputError, match=r"give it with --model-path"):
            base_of_bundle(load_bundle(folder))
    edit_json(folder / "bundle.json", base={**record["base"], "name": "../x", "source": "owner/name"})
    with pytest.raises(InputError, match=r"no model that mifo knows.* give it with --model-path"):
        base_of_bundle(load_bundle(folder))
    edit_json(folder / "bundle.json", base={**record["base"], "name": "sd1.5", "source": "owner/name"})
    assert base_of_bundle(load_bundle(folder)) == "sd1.5"


def test_pickles_in_a_bundle_are_never_read(tmp_path: Path):
    folder, canary = copy_bundle(tmp_path), tmp_path / "canary"
    content = pickle.dumps(Canary(canary))
    for name in ("assets.pt", "assets.bin", "unet_lora/adapter_model.bin", "unet_lora/pytorch_model.bin", "config.pkl"):
        (folder / name).write_bytes(content)
    with attach(load_base(), load_bundle(folder)):
        pass
    (folder / "unet_lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors is missing"):
        load_bundle(folder)
    (folder / "assets.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        load_bundle(folder)
    assert not canary.exists()
    pickle.loads(content)  # the canary does sing
    assert canary.exists()


def test_pickles_and_code_in_a_base_model_are_never_read(tmp_path: Path):
    base, canary = Path(shutil.copytree(tiny_base_folder(), tmp_path / "base")), tmp_path / "canary"
    (base / "unet" / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    edit_json(base / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"}, trust_remote_code=True)
    edit_json(base / "unet" / "config.json", auto_map={"AutoModel": "evil.Evil"}, _class_name="evil.Evil")
    load_base_model(str(base))
    (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"x": Canary(canary)}, base / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="only a pickle, which could run code"):
        load_base_model(str(base))
    assert not canary.exists()


def test_a_truth_of_unknown_things_is_refused(tmp_path: Path):
    """A bundle's instance may have one; its words are looked up and printed."""
    folder = write_instance(tmp_path / "cups")
    thing = {"class_name": "car", "main": "red", "second": "white", "pattern": "plain", "box": [0, 0, 1, 1]}
    for change in ({"class_name": []}, {"main": "x" * 10**6}, {"pattern": None}, {"second": {}}, {"box": [0, 0, 1]}, {"box": 3},
                   {"box": [10**400] * 4}, {"more": 1}):  # fmt: skip
        (folder / "truth.json").write_text(json.dumps({"things": [thing, {**thing, **change}]}))
        with pytest.raises(InputError, match=r"truth\.json cannot be read as a drawn scene's truth"):
            load_truth(load_instance(folder))
    (folder / "truth.json").write_text(json.dumps({"things": [thing, thing]}))
    assert len(load_truth(load_instance(folder)) or ()) == 2


def test_weights_of_other_kinds_are_refused(tmp_path: Path):
    for index, dtype in enumerate((torch.int64, torch.float64, torch.bool, torch.uint8)):
        folder = copy_bundle(tmp_path / str(index))
        for name in ("assets.safetensors", "unet_lora/adapter_model.safetensors"):
            before = (folder / name).read_bytes()
            save_file({k: v.to(dtype) for k, v in load_file(folder / name).items()}, folder / name)
            with pytest.raises(InputError, match="expected fp32, fp16 or bf16"):
                load_bundle(folder)
            (folder / name).write_bytes(before)


def test_weights_larger_than_any_bundles_are_not_read(tmp_path: Path):
    folder = copy_bundle(tmp_path)
    header = json.dumps({f"<asset{i}>": {"dtype": "F32", "shape": [2**30], "data_offsets": [i * 2**32, (i + 1) * 2**32]}
                         for i in range(2)}).encode()  # fmt: skip
    with (folder / "assets.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**33)  # sparse: takes no room on the disk
    with pytest.raises(InputError, match="it has 8192 MiB, and at most 512 MiB are read"):
        load_bundle(folder)


@pytest.mark.parametrize("schema", [0, -5, 0.5, True, "1", None, [], 1e400])
def test_schemas_that_are_no_version(tmp_path: Path, schema: object):
    folder = copy_bundle(tmp_path)
    edit_json(folder / "bundle.json", schema=schema)
    with pytest.raises(InputError, match="garbles"):
        load_bundle(folder)


# --- things that are no files -------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with a name")
@pytest.mark.parametrize("name", ["img.png", "mask1.png", "words.txt", "unet_lora/adapter_config.json"])
def test_a_pipe_instead_of_a_file_is_refused_at_once(tmp_path: Path, name: str):
    """Reading it would wait for ever."""
    bundle, instance = copy_bundle(tmp_path / "out"), write_instance(tmp_path / "cups")
    path = (bundle if "/" in name else instance) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    if "/" in name:
        with pytest.raises(InputError, match="is no file"):
            load_bundle(bundle)
    else:
        result = mifo(*learn_arguments(instance, tmp_path / "new"), exit_code=2)
        assert f"{name} cannot be read (it is no file, but a pipe)" in result.stderr and not (tmp_path / "new").exists()


# --- prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    ["<\u0430sset0>", "\uff1casset0\uff1e", "<asset\uff10>", "<asset\u0660>", "<as\u200bset0>", "<\uff41sset0>",
     "<\U0001d41asset0>", "\u2039asset0\u203a", "<as\u202eset0>", "<as\ufe0fset0>", "<asse\u034ft0>", "<as\u3164set0>",
     "<\xe1sset0>", "\u27e8\u0430sset0\u27e9", "\u0430sset0"],
)  # fmt: skip
def test_what_only_looks_like_an_asset_is_refused(odd: str):
    with pytest.raises(InputError, match=r"looks like an asset but is written with other characters \(U\+") as refused:
        check_prompt(f"a photo of {odd} and <asset1>", ("<asset0>", "<asset1>"))
    assert str(refused.value).isprintable()


def test_other_languages_are_prompts():
    for prompt in ("فنجان <asset0> على الطاولة", "תמונה של <asset0>", "чашка <asset0> на столе", "一张<asset0>", "☕ <asset0>"):
        check_prompt(prompt, ("<asset0>",))


def test_a_prompt_of_a_megabyte(tmp_path: Path):
    for text in ("a " * 2**19, "<asset7>" * 2**17, "asset9" * 2**17, "<" * 2**20):
        for option in ("--prompt", "--negative-prompt"):
            given = {"--prompt": "a photo of <asset0>", option: text}
            options = [word for pair in given.items() for word in pair]
            result = mifo("synthesize", tiny_bundle_folder(), *options, "--output-path", tmp_path / "new", exit_code=2)
            assert "rompt" in result.stderr and len(result.stderr) < MAX_MESSAGE + 100
    assert snapshot(tmp_path) == {}


# --- messages -----------------------------------------------------------------------------------


def test_messages_hold_one_printable_line():
    """Names come from files: they must not clear the terminal, write into its title, or fill it."""
    message = shown("no \x1b[2J\x1b]0;title\x07 \u202etxt.exe \udcff\nerror: fine")
    assert message == r"no \x1b[2J\x1b]0;title\x07 \u202etxt.exe \udcff\nerror: fine"
    assert len(shown("x" * 10**6)) < MAX_MESSAGE + 20 and shown("x" * 10**6 + "choose another").endswith("choose another")


def test_a_folder_with_an_escape_in_its_name(tmp_path: Path):
    folder = write_instance(tmp_path / "cups\x1b[31m")
    (folder / "mask0.png").unlink()
    result = mifo(*learn_arguments(folder, tmp_path / "out"), exit_code=2)
    assert "\x1b" not in result.stderr and re.search(r"cups\\x1b\[31m has mask1\.png", result.stderr)


# --- boxes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (json.dumps([[0, 0, 1, 1]] * 50_000), "There are 50000 boxes, but at most 100 can be drawn"),
        (json.dumps({"x" * 10**5: [0, 0, 1, 1]}), "There is a box for 'xxx.*expected <asset0>"),
        (json.dumps({"asset" + "9" * 10**5: [0, 0, 1, 1]}), "There is a box for 'asset99"),
        (json.dumps({"\x1b[2J": [0, 0, 1, 1]}), r"There is a box for '\\x1b\[2J'"),
    ],
    ids=["many", "a long name", "a large number", "an escape"],
)
def test_boxes_that_would_take_minutes_to_draw(tmp_path: Path, boxes: str, message: str):
    (tmp_path / "boxes.json").write_text(boxes)
    result = mifo("boxes", tmp_path / "boxes.json", "--output-path", tmp_path / "new" / "boxes.png", exit_code=2)
    assert re.search(message, result.stderr) and not (tmp_path / "new").exists()


# --- too much at once ---------------------------------------------------------------------------


def test_many_large_masks_are_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mifo.data.instance.MAX_MASK_MEGAPIXELS", 0.01)
    folder = write_instance(tmp_path / "cups")
    result = mifo(*learn_arguments(folder, tmp_path / "out"), exit_code=2)
    assert "has 2 masks of 96x64 pixels, 0 megapixels together" in result.stderr

