"""Bundles, instances and base models from strangers: what is read, how much of it, and when. Beside `test_hostile_files`."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import ROOT, copy_bundle, edit_json, learn_arguments, load_base, mifo, snapshot, tiny_base_folder, write_instance
from PIL import Image
from safetensors.torch import load_file, save_file

from mifo.boxes import parse_layout
from mifo.bundle.export import export_for_diffusers
from mifo.bundle.instance_copy import keep_instance, kept_crops, kept_instance
from mifo.bundle.store import attach, base_of_bundle, load_bundle
from mifo.cli import parts
from mifo.data.instance import MAX_ASSETS, fit_instance, load_instance
from mifo.errors import InputError
from mifo.evaluation.cases import read_cases
from mifo.evaluation.toybox_backend import load_truth
from mifo.io.read_files import UnusableFile, read_regular
from mifo.model.load_base import load_base_model, resolve
from mifo.synthesis import resumable as batch
from mifo.synthesis.variations import read_prompts

SPARSE = 3 << 30


def sparse(path: Path, size: int = SPARSE) -> None:
    """As large as it says, and no room on the disk."""
    with path.open("wb") as file:
        file.truncate(size)


def special(path: Path, kind: str) -> None:
    """Something at `path` that is no file that can be read whole."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            os.chdir(path.parent)  # a socket's path may have 107 characters
            try:
                listener.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        sparse(path)


def other_bundle(folder: Path) -> None:
    """The bundle learned anew: other rows, other adapters, another photo."""
    for name in ("assets.safetensors", "unet_lora/adapter_model.safetensors", "text_lora/adapter_model.safetensors"):
        save_file({k: v + 0.5 for k, v in load_file(folder / name).items()}, folder / name)
    photo = Image.open(folder / "instance" / "img.png")
    Image.fromarray(255 - np.asarray(photo)).save(folder / "instance" / "img.png")


def replace(folder: Path) -> None:
    """As `learn` does it: another folder of the same name."""
    new = Path(shutil.copytree(folder, folder.with_name("new")))
    other_bundle(new)
    folder.rename(folder.with_name("old"))
    new.rename(folder)
    shutil.rmtree(folder.with_name("old"))


# --- one bundle, read at one moment ---------------------------------------------------------------


def states(base, bundle) -> list[torch.Tensor]:
    with attach(base, bundle), torch.no_grad():
        ids = [base.tokenizer("a photo of <asset0>", padding="max_length").input_ids]
        encoded = base.encode_prompt(torch.tensor(ids)).states
        latents = torch.ones(1, int(base.unet.config["in_channels"]), 16, 16)
        return [encoded, base.unet(latents, torch.tensor(300), encoded).sample]


def test_a_bundle_replaced_after_it_was_read_draws_what_was_read(tmp_path: Path):
    """The base model may load for a minute in between."""
    folder, base = copy_bundle(tmp_path), load_base()
    bundle = load_bundle(folder)
    before, digest = states(base, bundle), bundle.digest
    export_for_diffusers(bundle, tmp_path / "before")
    replace(folder)
    assert all(torch.equal(a, b) for a, b in zip(before, states(base, bundle), strict=True))
    export_for_diffusers(bundle, tmp_path / "after")
    assert snapshot(tmp_path / "before") == snapshot(tmp_path / "after")
    with batch.open_job(tmp_path / "out", tmp_path, "variations", [], base, bundle) as job:
        assert job.facts["bundle"] == digest
    assert load_bundle(folder).digest != digest
    for use in (kept_instance, kept_crops):
        assert use(bundle.folder, bundle.tokens)
        with pytest.raises(InputError, match="was replaced while it was being used"):
            use(bundle.folder, bundle.tokens, bundle.instance)


def test_a_bundle_replaced_while_the_base_loads_draws_one_bundles_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, load = copy_bundle(tmp_path), parts.load_base_of
    command = ["synthesize", folder, "--prompt", "a photo of <asset0>", "--steps", 2, "--seed", 4]
    mifo(*command, "--output-path", tmp_path / "expected")

    def slowly(*arguments):
        replace(folder)
        return load(*arguments)

    monkeypatch.setattr("mifo.cli.draw.load_base_of", slowly)
    mifo(*command, "--output-path", tmp_path / "drawn")
    pictures = [np.asarray(Image.open(tmp_path / name / "000004.png")) for name in ("expected", "drawn")]
    assert (pictures[0] == pictures[1]).all()


def test_a_bundle_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mifo.bundle import files as bundle_files

    folder, read = copy_bundle(tmp_path), bundle_files.read_regular
    calls = []

    def slowly(path: Path, most: int) -> bytes:
        if path.name == "adapter_model.safetensors" and not calls:
            calls.append(path)
            replace(folder)
        return read(path, most)

    monkeypatch.setattr(bundle_files, "read_regular", slowly)
    bundle = load_bundle(folder)
    assert calls and bundle.digest == load_bundle(folder).digest


def test_values_that_no_learning_leads_to_are_refused(tmp_path: Path):
    """Finite, but they overflow on the way to the picture, which was then black."""
    for index, name in enumerate(("assets.safetensors", "unet_lora/adapter_model.safetensors")):
        folder = copy_bundle(tmp_path / str(index))
        save_file({k: torch.full_like(v.float(), 1e30) for k, v in load_file(folder / name).items()}, folder / name)
        result = mifo("synthesize", folder, "--prompt", "a photo of <asset0>", "--output-path", tmp_path / "out", exit_code=2)
        assert f"{name} holds values up to 1.0e+30" in result.stderr and not (tmp_path / "out").exists()


# --- what is opened -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.safetensors", "unet_lora/x.safetensors", "other/adapter_config.json", "instance/notes.txt"])
def test_what_a_bundle_has_beside_its_own_files_is_never_read(tmp_path: Path, name: str):
    folder = copy_bundle(tmp_path)
    digest = load_bundle(folder).digest
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    bundle = load_bundle(folder)
    with batch.open_job(tmp_path / "out", tmp_path, "variations", [], load_base(), bundle) as job:
        assert job.facts["bundle"] == digest
    assert kept_instance(folder, bundle.tokens, bundle.instance).count == 2


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "sparse"])
@pytest.mark.parametrize("name", ["bundle.json", "assets.safetensors", "unet_lora/adapter_config.json",
                                  "text_lora/adapter_model.safetensors"])  # fmt: skip
def test_a_bundles_file_that_is_none_is_refused_at_once(tmp_path: Path, name: str, kind: str):
    folder = copy_bundle(tmp_path)
    special(folder / name, kind)
    started = time.monotonic()
    with pytest.raises(InputError, match=rf"{Path(name).name} cannot be read \(it (is no file, but a {kind}|has 3072 MiB)"):
        load_bundle(folder)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "sparse"])
def test_nothing_but_a_regular_file_is_read(tmp_path: Path, kind: str):
    special(tmp_path / "x", kind)
    with pytest.raises(UnusableFile, match=r"is no file, but a|3072 MiB, and at most 1 MiB"):
        read_regular(tmp_path / "x", 1 << 20)
    (tmp_path / "y").write_bytes(b"1234")
    assert read_regular(tmp_path / "y", 4) == b"1234"
    with pytest.raises(UnusableFile, match="4 bytes, and at most 3 bytes"):
        read_regular(tmp_path / "y", 3)
    if os.path.exists("/proc/self/maps"):  # says that it has 0 bytes
        with pytest.raises(UnusableFile, match="more than the 10 bytes"):
            read_regular(Path("/proc/self/maps"), 10)


# --- instances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["img.png", "mask1.png", "words.txt", "truth.json"])
def test_a_link_out_of_an_instance_is_refused(tmp_path: Path, name: str):
    """A stranger's folder would put a private file into the bundle."""
    folder, private = write_instance(tmp_path / "cups"), tmp_path / "private"
    private.write_text("secret\nsecret\n")
    if (folder / name).exists():
        shutil.move(folder / name, private)
    (folder / name).symlink_to(private)
    private.chmod(0o600)
    result = mifo(*learn_arguments(folder, tmp_path / "out"), exit_code=2)
    assert f"{name} is a link out of its folder" in result.stderr and not (tmp_path / "out").exists()


def test_a_link_inside_an_instance_is_fine(tmp_path: Path):
    folder = write_instance(tmp_path / "cups")
    (folder / "img.png").rename(folder / "photo.png")
    (folder / "img.png").symlink_to("photo.png")
    (tmp_path / "link").symlink_to(folder)
    assert load_instance(tmp_path / "link").count == 2


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "sparse"])
@pytest.mark.parametrize("name", ["img.png", "mask1.png", "words.txt", "truth.json"])
def test_an_instances_file_that_is_none_is_refused_at_once(tmp_path: Path, name: str, kind: str):
    folder = write_instance(tmp_path / "cups")
    special(folder / name, kind)
    with pytest.raises(InputError, match=rf"{name} cannot be read \(it (is no file, but a {kind}|has 3072 MiB)"):
        load_instance(folder)


def test_only_a_drawn_scenes_truth_goes_into_the_bundle(tmp_path: Path):
    folder = write_instance(tmp_path / "cups")
    for index, content in enumerate((b'{"password": 1}', b"[]", b"\xff", b"[" * 5000)):
        (folder / "truth.json").write_bytes(content)
        (target := tmp_path / f"kept{index}").mkdir()
        keep_instance(target, load_instance(folder), fit_instance(load_instance(folder), 64))
        assert not (target / "instance" / "truth.json").exists()
    (folder / "truth.json").write_text(json.dumps({"things": []}))
    (folder / "truth.json").chmod(0o600)
    (tmp_path / "kept").mkdir()
    keep_instance(tmp_path / "kept", load_instance(folder), fit_instance(load_instance(folder), 64))
    kept, plain = tmp_path / "kept" / "instance" / "truth.json", tmp_path / "plain"
    plain.touch()
    assert kept.read_text() == '{"things": []}' and kept.stat().st_mode == plain.stat().st_mode


# --- how many -------------------------------------------------------------------------------------


def test_a_bundle_of_thousands_of_assets_is_refused_before_any_loop(tmp_path: Path):
    folder = copy_bundle(tmp_path)
    edit_json(folder / "bundle.json", tokens=[f"<asset{k}>" for k in range(5000)])
    save_file({f"<asset{k}>": torch.ones(128) for k in range(5000)}, folder / "assets.safetensors")
    started = time.monotonic()
    with pytest.raises(InputError, match=f"5000 assets, but at most {MAX_ASSETS} are read"):
        load_bundle(folder)
    edit_json(folder / "bundle.json", tokens=["<asset0>", "<asset1>"], words=["x"] * 5000)
    with pytest.raises(InputError, match=f"words for 5000 assets, but at most {MAX_ASSETS} are read"):
        load_bundle(folder)
    assert time.monotonic() - started < 2


def test_an_instance_of_thousands_of_masks_is_refused_before_any_is_read(tmp_path: Path):
    folder = write_instance(tmp_path / "cups")
    mask = (folder / "mask0.png").read_bytes()
    for index in range(2000):
        (folder / f"mask{index}.png").write_bytes(mask)
    started = time.monotonic()
    with pytest.raises(InputError, match=f"has 2000 masks, but at most {MAX_ASSETS} are read"):
        load_instance(folder)
    assert time.monotonic() - started < 2


# --- base models ----------------------------------------------------------------------------------


def test_a_bundle_that_names_an_unknown_base_fetches_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither from the hub, nor from a folder that happens to have this name here."""
    folder = copy_bundle(tmp_path)
    record = json.loads((folder / "bundle.json").read_text())
    edit_json(folder / "bundle.json", base={**record["base"], "name": "evil/tracker", "source": "evil/tracker"})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "tracker").symlink_to(tiny_base_folder())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("it was fetched"))
    command = ["synthesize", folder, "--prompt", "a photo of <asset0>", "--steps", 1, "--output-path", tmp_path / "out"]
    result = mifo(*command, exit_code=2)
    assert "'evil/tracker' is no model that mifo knows" in result.stderr and "--model-path" in result.stderr
    mifo(*command, "--model-path", tiny_base_folder())  # whoever trusts it says so


def test_known_hub_models_go_by_their_short_names(tmp_path: Path):
    from mifo.model.load_base import HUB_MODELS

    folder = copy_bundle(tmp_path)
    record = json.loads((folder / "bundle.json").read_text())
    for name, mirrors in HUB_MODELS.items():
        for repo, revision in mirrors:
            assert len(revision) == 40, f"{repo} is not pinned"
            edit_json(folder / "bundle.json", base={**record["base"], "name": "anything", "source": repo})
            assert base_of_bundle(load_bundle(folder)) == name


@pytest.mark.parametrize("kind", ["pipe", "folder", "sparse"])
@pytest.mark.parametrize("name", ["model_index.json", "tokenizer/tokenizer.json", "unet/config.json",
                                  "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"])  # fmt: skip
def test_a_base_models_file_that_is_none_is_refused_at_once(tmp_path: Path, name: str, kind: str):
    base = Path(shutil.copytree(tiny_base_folder(), tmp_path / "base"))
    (base / name).unlink()
    if kind == "sparse":
        sparse(base / name, 60 << 30)
    else:
        special(base / name, kind)
    started = time.monotonic()
    with pytest.raises(InputError, match=re.escape(str(base / Path(name).parent))):
        load_base_model(str(base))
    assert time.monotonic() - started < 3


def test_a_known_name_is_never_a_folder_that_happens_to_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bundle says sd1.5; a folder of that name in the working directory is something else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd1.5").symlink_to(tiny_base_folder())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: "/from/the/hub/0123")
    assert resolve("sd1.5")[0] == Path("/from/the/hub/0123") and resolve("./sd1.5")[0] == Path("sd1.5")


# --- texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "sparse"])
def test_texts_that_are_no_files_are_refused_at_once(tmp_path: Path, kind: str):
    special(tmp_path / "text", kind)
    for read in (lambda p: parse_layout(p, ("<asset0>",)), lambda p: read_prompts(p, ("<asset0>",)),
                 lambda p: read_cases(p, None, ("<asset0>",), [])):  # fmt: skip
        with pytest.raises(InputError, match=rf"cannot be read \(it (is no file, but a {kind}|has 3072 MiB)"):
            read(tmp_path / "text")
    folder = write_instance(tmp_path / "cups")
    instance = load_instance(folder)
    special(folder / "truth.json", kind)
    with pytest.raises(InputError, match=r"truth\.json cannot be read"):
        load_truth(instance)


# --- native code ----------------------------------------------------------------------------------

USE_LIBRARIES = """
import importlib.util
import mifo.bundle.store, mifo.model.quantize
import transformers.utils, diffusers.utils
assert importlib.util.find_spec("kernels") is None
assert not transformers.utils.is_kernels_available() and not diffusers.utils.is_kernels_available()
from transformers.integrations import hub_kernels
assert not hub_kernels._kernels_enabled
mifo.model.quantize._bitsandbytes()
try:
    from kernels import get_kernel
except ImportError:
    pass
else:
    raise SystemExit("kernels can be imported")
"""


def test_an_installed_kernels_package_is_never_asked_for_native_code(tmp_path: Path):
    """bitsandbytes asks while it is imported, on processors with AVX512-BF16."""
    used = tmp_path / "used"
    (tmp_path / "kernels.py").write_text(f"open({str(used)!r}, 'a').write('imported ')\n"
                                         f"def get_kernel(*a, **k): open({str(used)!r}, 'a').write(str(a))\n")  # fmt: skip
    info = tmp_path / "kernels-0.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.13.0\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", USE_LIBRARIES], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": path, "USE_HUB_KERNELS": "YES"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not used.exists(), used.read_text()
