"""What is written can be passed on: names and fingerprints, and no path of the machine that wrote it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from _tiny import FAST, edit_json, mifo, tiny_base_folder, tiny_bundle_folder, write_instance
from PIL import Image

from mifo.bundle.store import load_bundle
from mifo.errors import InputError
from mifo.model.base import public_name
from mifo.synthesis.resumable import ImageJob

SECRET = "homes-of-anna"
PROMPT = "a photo of <asset0>"
PRIVATE = [option for option in FAST if option != "--keep-base-path"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`<SECRET>/` with a base model, an instance, a photo and its mask, and what every command wrote from them."""
    home = tmp_path_factory.mktemp("x") / SECRET
    shutil.copytree(tiny_base_folder(), home / "anna-base")
    write_instance(home / "photos" / "cups")
    Image.new("RGB", (64, 64), "grey").save(home / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(home / "mask.png")
    mifo("learn", home / "photos" / "cups", "--model-path", home / "anna-base", "--output-dir", home / "out", *PRIVATE)
    return home


def leaks(folder: Path, words: Sequence[str] = (SECRET,)) -> list[str]:
    """The files below `folder` whose bytes, or whose picture's text, have one of `words`."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.suffix == ".png":
            with Image.open(path) as image:
                content += repr(image.info).encode()
        found += [f"{path.name}: {word}" for word in words if word.encode() in content]
    return found


def test_a_bundle_tells_no_path(home: Path):
    bundle = home / "out" / "cups"
    assert not leaks(bundle)
    record = json.loads((bundle / "bundle.json").read_text())
    assert (record["base"]["name"], record["base"]["source"]) == ("anna-base", "") and len(record["base"]["fingerprint"]) >= 32
    assert json.loads((bundle / "unet_lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == "anna-base"


def test_outputs_tell_no_path(home: Path, tmp_path: Path):
    base = ("--model-path", home / "anna-base", "--output-path")
    mifo("synthesize", home / "out" / "cups", "--prompt", PROMPT, "--steps", 1, *base, tmp_path / "s")
    mifo("edit", home / "out" / "cups", "--init-image", home / "photo.png", "--mask", home / "mask.png", "--prompt", PROMPT,
         "--steps", 2, *base, tmp_path / "e")  # fmt: skip
    mifo("variations", home / "out" / "cups", "--count", 1, "--steps", 1, *base, tmp_path / "v")
    mifo("decompose", home / "out" / "cups", "--steps", 1, *base, tmp_path / "d")
    mifo("export", home / "out" / "cups", "--output-path", tmp_path / "x")
    assert not leaks(tmp_path)
    for name in ("s/synthesis.json", "e/edit.json", "v/variations.json", "d/decompose.json"):
        record = json.loads((tmp_path / name).read_text())
        assert (record["base_model"], record["bundle"]) == ("anna-base", "cups") and len(record["base_fingerprint"]) >= 32


def test_a_bundle_without_a_path_asks_for_its_base_by_name_and_fingerprint(home: Path, tmp_path: Path):
    drawn = ["synthesize", home / "out" / "cups", "--prompt", PROMPT, "--steps", 1, "--output-path", tmp_path / "s"]
    digest = load_bundle(home / "out" / "cups").base_fingerprint
    said = mifo(*drawn, exit_code=2).stderr
    assert f"needs its own base model: 'anna-base' (fingerprint {digest[:10]})" in said and "give it with --model-path" in said
    mifo(*drawn, "--model-path", home / "anna-base")


def test_learn_says_so_and_keeps_the_path_when_asked(home: Path, tmp_path: Path):
    arguments = ("learn", home / "photos" / "cups", "--model-path", home / "anna-base", "--no-prior-preservation",
                 "--phase1-train-steps", 1, "--phase2-train-steps", 1)  # fmt: skip
    note = "note: the bundle has the base model's name, anna-base, and fingerprint, but not where it lies"
    assert note in mifo(*arguments, "--output-dir", tmp_path / "a").stderr
    assert "note: the bundle has" not in mifo(*arguments, "--output-dir", tmp_path / "b", "--keep-base-path").stderr
    assert {name.split(":")[0] for name in leaks(tmp_path / "b")} == {"bundle.json", "adapter_config.json"}
    assert load_bundle(tmp_path / "b" / "cups").base_source == str(home / "anna-base")
    mifo("synthesize", tmp_path / "b" / "cups", "--prompt", PROMPT, "--steps", 1, "--output-path", tmp_path / "s")
    assert not leaks(tmp_path / "s")


def test_an_older_bundle_with_a_path_passes_it_on_to_nobody(tmp_path: Path):
    folder = Path(shutil.copytree(tiny_bundle_folder(), tmp_path / "old"))
    record = json.loads((folder / "bundle.json").read_text())
    edit_json(folder / "bundle.json", base={**record["base"], "name": record["base"]["source"]})
    assert load_bundle(folder).base_name == tiny_base_folder().name
    mifo("synthesize", folder, "--prompt", PROMPT, "--steps", 1, "--output-path", tmp_path / "s")
    assert not leaks(tmp_path / "s", [str(tiny_base_folder().parent)])


def test_public_names():
    assert public_name("sd1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5") == "sd1.5"
    assert public_name("owner/name", "owner/name") == "owner/name" and public_name("toybox", "toybox") == "toybox"
    assert public_name("../x/base", "/home/anna/x/base") == "base"
    assert public_name("C:\\models\\sd", "C:\\Users\\anna\\models\\sd") == "sd"


def test_reasons_of_failures_are_recorded_without_folders(tmp_path: Path):
    job = ImageJob(tmp_path / "job", {})

    def fail() -> list[Image.Image]:
        raise InputError("/home/anna/masks/mask0.png and C:\\Users\\anna\\x.png are 1/2 empty; see https://a.org/b")

    assert job.images("one", {}, 1, fail) is None
    assert job.failed() == {"one": "mask0.png and x.png are 1/2 empty; see https://a.org/b"}
    assert "/home/anna" in job.failures["one"]
