"""`list`, `show`, and a picture drawn again from what it says of itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _tiny import copy_bundle, mifo, snapshot, tiny_bundle_folder
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PROMPT = "a photo of <asset0> and <asset1>"
BOXES = "[[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with one bundle, `Model_ours/two_cups`."""
    monkeypatch.chdir(tmp_path)
    copy_bundle(tmp_path / "Model_ours")
    return tmp_path


def test_the_bundles_and_what_one_of_them_is(place: Path) -> None:
    damaged = place / "Model_ours" / "broken"
    damaged.mkdir()
    (damaged / "bundle.json").write_text("{ half")
    (place / "Model_ours" / "no_bundle").mkdir()
    evaluation = place / "output" / "two_cups" / "0001" / "evaluation.json"
    evaluation.parent.mkdir(parents=True)
    evaluation.write_text("{}")
    before = snapshot(place)
    found = {entry["name"]: entry for entry in json.loads(mifo("list", "--json").stdout)["bundles"]}
    assert set(found) == {"two_cups", "broken"} and "cannot be read" in found["broken"]["problem"]
    cups = found["two_cups"]
    assert cups["tokens"] == ["<asset0>", "<asset1>"] and cups["problem"] is None and cups["mib"] > 0 and cups["base"]
    assert Path(cups["preview"]).is_file() and 0 <= cups["attention_inside_mask"] <= 1 and cups["learned"].startswith("20")
    assert cups["evaluation"] == "output/two_cups/0001/evaluation.json"
    text = mifo("list").stdout
    assert text.splitlines()[0].startswith("bundle") and "damaged" in text and "no_bundle" not in text
    assert json.loads(mifo("show", "two_cups", "--json").stdout) == cups
    assert "tokens: <asset0>, <asset1>" in mifo("show", place / "Model_ours" / "two_cups").stdout
    assert "damaged" in mifo("show", "broken", exit_code=2).stderr
    assert "did you mean" in mifo("show", "two_cup", exit_code=2).stderr.lower()
    assert snapshot(place) == before


def test_where_nothing_was_learned_the_list_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'learn' makes one" in mifo("list").stdout and json.loads(mifo("list", "--json").stdout) == {"bundles": []}


def test_a_picture_is_drawn_again_to_the_byte(place: Path) -> None:
    mifo("synthesize", "two_cups", "--prompt", PROMPT, "--boxes", BOXES, "--steps", 4, "--seed", 7, "--guidance-scale", 2.5,
         "--negative-prompt", "a star", "--no-refine", "--scheduler", "dpm", "--output-path", "first")  # fmt: skip
    picture = place / "first" / "000007.png"
    said = json.loads(mifo("show", picture, "--json").stdout)
    assert (said["prompt"], said["seed"], said["config"]["steps"], said["bundle"]) == (PROMPT, 7, 4, "two_cups")
    assert "seed: 7" in mifo("show", picture).stdout
    mifo("synthesize", "--again", picture, "--output-path", "second")
    assert (place / "second" / "000007.png").read_bytes() == picture.read_bytes()
    mifo("synthesize", tiny_bundle_folder(), "--again", picture, "--output-path", "third")
    assert (place / "third" / "000007.png").read_bytes() == picture.read_bytes()


def with_text(path: Path, text: str | None) -> Path:
    info = PngInfo()
    if text is not None:
        info.add_text("mifo", text)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(("text", "message"), [
    (None, "does not say how it was made"),
    ("{ half", "cannot be read"),
    ("[" * 10_000, "cannot be read"),
    ('{"prompt": "a photo", "boxes": null}', "was not drawn by synthesize"),
    ('{"prompt": "a photo", "seed": 1, "config": {"optimize": "weights"}, "crop": [0, 0, 9, 9]}', "was not drawn by synthesize"),
    ('{"prompt": 5, "seed": 1, "config": {}, "bundle": "two_cups"}', "is damaged"),
    ('{"prompt": "a photo", "seed": 1, "config": {"nonsense": 1}, "bundle": "two_cups"}', "nonsense"),
    ('{"prompt": "a photo", "seed": 1, "config": {}, "bundle": "../two_cups"}', "no plain name"),
    ('{"prompt": "a photo", "seed": 1, "config": {}, "bundle": null}', "no MODEL_ID"),
    ('{"prompt": "a photo", "seed": 1, "config": {}, "bundle": "elsewhere"}', "no learned bundle 'elsewhere'"),
])  # fmt: skip
def test_a_strangers_picture_says_nothing_that_is_believed(place: Path, text: str | None, message: str) -> None:
    picture = with_text(place / "picture.png", text)
    before = snapshot(place)
    result = mifo("synthesize", "--again", picture, "--output-path", "out", exit_code=2)
    assert message in " ".join(result.stderr.split()) and snapshot(place) == before


def test_again_and_other_settings_are_not_mixed(place: Path) -> None:
    picture = with_text(place / "picture.png", "{}")
    for options in (["--prompt", PROMPT], ["--steps", 5], ["--seed", 3], ["--no-refine"]):
        assert "leave them out" in mifo("synthesize", "two_cups", "--again", picture, *options, exit_code=2).stderr
    assert "--prompt" in mifo("synthesize", "two_cups", exit_code=2).stderr
    assert "--again" in mifo("synthesize", "--prompt", PROMPT, exit_code=2).stderr
