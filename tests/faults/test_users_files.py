"""What once destroyed a user's files, command by command; and scripts/robustness/canaries.py for a short while."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from _tiny import (
    ROOT,
    copy_bundle,
    edit_json,
    learn_arguments,
    mifo,
    snapshot,
    tiny_base_folder,
    tiny_bundle_folder,
    write_instance,
)
from PIL import Image

from mifo.cli import app
from mifo.io.manifest import is_ours

BOXES = "[[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]"
PROMPT = "a photo of <asset0> and <asset1>"
SHORT = ("--phase1-train-steps", 1, "--phase2-train-steps", 0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a user works in, with a photo of two cups."""
    write_instance(tmp_path / "cups")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(place: Path, message: str, *arguments: object) -> None:
    before = snapshot(place)
    said = mifo(*arguments, exit_code=2).stderr
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), said
    assert snapshot(place) == before


def synthesize(*more: object, bundle: object = None) -> list[object]:
    return ["synthesize", bundle or tiny_bundle_folder(), "--prompt", PROMPT, "--steps", 1, *more]


# --- folders that are not ours ------------------------------------------------------------------


def test_a_folder_with_an_evaluation_json_in_it_is_not_an_evaluation(place: Path):
    (place / "evaluation.json").write_text("{}")
    (place / ".git").mkdir()
    (place / ".git" / "HEAD").write_text("ref: refs/heads/main")
    for more in ((), ("--overwrite",)):
        refused(place, r"other things in it \(.*\.git/HEAD.*would be replaced",
                "evaluate", tiny_bundle_folder(), "--output-path", ".", *more)  # fmt: skip


def test_an_export_beside_a_users_own_asset_file(place: Path):
    mifo("export", tiny_bundle_folder(), "--output-path", "export")
    (place / "export" / "asset_sources.psd").write_text("mine")
    refused(place, r"not all as mifo wrote it: asset_sources\.psd", "export", tiny_bundle_folder(), "--output-path", "export",
            "--overwrite")  # fmt: skip


def test_half_written_folders_of_others_are_left_alone(place: Path):
    old = place / ".x.partial"
    old.mkdir()
    (old / "mine").write_text("mine")
    for path in (old / "mine", old):
        os.utime(path, (0, 0))
    mifo("boxes", BOXES, "--output-path", "boxes.png")
    mifo("export", tiny_bundle_folder(), "--output-path", "export")
    assert (old / "mine").read_text() == "mine"


# --- outputs that are inputs --------------------------------------------------------------------


def test_outputs_that_are_inputs_are_refused_before_any_work(place: Path):
    bundle, base = copy_bundle(place), tiny_base_folder()
    (place / "my.json").write_text(BOXES)
    (place / "prompts.txt").write_text("a photo of <asset1>")
    Image.new("RGB", (90, 60), "navy").save(place / "photo.png")
    os.link(place / "photo.png", place / "second.png")
    (place / "link.png").symlink_to("photo.png")
    (place / "link").symlink_to("cups")
    over = "--overwrite"
    for arguments, message in (
        (["boxes", "my.json", "--output-path", "my.json", over], r"which is BOXES"),
        (["boxes", BOXES, "--image", "photo.png", "--output-path", "photo.png", over], r"which is --image"),
        (["boxes", BOXES, "--image", "photo.png", "--output-path", "second.png", over], r"which is --image"),
        (["boxes", BOXES, "--image", "link.png", "--output-path", "photo.png", over], r"which is --image"),
        (["check", "cups", "--folder-path", ".", "--output-path", "cups/mask0.png", over], r"lies in the instance"),
        (["check", "cups", "--folder-path", ".", "--output-path", "link/new.png"], r"lies in the instance"),
        (["edit", bundle, "--init-image", "photo.png", "--mask", "cups/mask0.png", "--prompt", "<asset0>", "--output-path",
          "photo.png"], r"photo\.png cannot be written|is a file"),
        (synthesize("--output-path", bundle / "pictures", bundle=bundle), r"lies in the bundle"),
        (["decompose", bundle, "--output-path", bundle / "instance" / "x"], r"lies in the bundle"),
        (["export", bundle, "--output-path", bundle, over], r"holds an earlier run's bundle"),
        (synthesize("--output-path", base / "new", bundle=bundle), r"lies in the base model"),
        (["variations", bundle, "--prompts-file", "prompts.txt", "--output-path", "."], r"holds --prompts-file"),
        (learn_arguments(place / "cups", place / "cups"), r"lies in the instance cups"),
        (learn_arguments(place / "cups", place), r"which is the instance cups"),
    ):
        before = snapshot(base)
        refused(place, message, *arguments)
        assert snapshot(base) == before


def test_the_pictures_that_evaluate_measures_are_not_its_output(place: Path):
    mifo(*synthesize("--output-path", "e/pictures"))
    for output, message in (("e", r"which holds --images"), ("e/pictures", r"which is --images")):
        refused(place, message, "evaluate", tiny_bundle_folder(), "--images", "e/pictures", "--output-path", output,
                "--overwrite")  # fmt: skip


# --- a place of its own each run ----------------------------------------------------------------


def test_runs_with_defaults_never_share_a_folder(place: Path):
    first = json.loads(mifo(*synthesize("--batch-size", 2, "--json")).stdout)
    before = snapshot(place / "output")
    second = mifo(*synthesize("--seed", 3)).stdout
    assert first["images"] == ["output/two_cups/0001/000000.png", "output/two_cups/0001/000001.png"]
    assert "1 picture in output/two_cups/0002" in second
    after = snapshot(place / "output")
    assert {name: after[name] for name in before} == before
    record = json.loads((place / "output" / "two_cups" / "0002" / "synthesis.json").read_text())
    pictures = {p.name for p in (place / "output" / "two_cups" / "0002").glob("0*.png")}
    assert set(record["images"]) == pictures == {"000003.png"}  # whole in itself


def test_a_folder_of_ones_own_results_is_replaced_whole_and_when_asked(place: Path):
    mifo(*synthesize("--output-path", "out", "--batch-size", 2))
    refused(place, "out holds an earlier run's synthesis; give --overwrite", *synthesize("--output-path", "out"))
    mifo(*synthesize("--output-path", "out", "--overwrite", "--seed", 5))
    names = ["000005.png", "contact.png", "manifest.json", "synthesis.json"]
    assert sorted(os.listdir(place / "out")) == names and is_ours(place / "out")
    (place / "out" / "best.png").write_text("mine")
    refused(place, r"not all as mifo wrote it: best\.png", *synthesize("--output-path", "out", "--overwrite"))


def test_an_edit_of_an_earlier_edit_with_default_names_keeps_it(place: Path):
    Image.new("RGB", (96, 64), "grey").save(place / "edit00.png")
    (place / "output").mkdir()
    (place / "edit00.png").rename(place / "output" / "edit00.png")
    before = (place / "output" / "edit00.png").read_bytes()
    facts = json.loads(mifo("edit", tiny_bundle_folder(), "--init-image", "output/edit00.png", "--mask", "cups/mask0.png",
                            "--prompt", "a photo of <asset0>", "--steps", 1, "--no-guidance", "--json").stdout)  # fmt: skip
    assert facts["images"] == ["output/two_cups/0001/edit00.png"] and (place / "output" / "edit00.png").read_bytes() == before


def test_single_files_are_numbered_or_replaced_when_asked(place: Path):
    assert mifo("boxes", BOXES).stdout.split() == ["output/boxes-0001.png"]
    assert mifo("boxes", BOXES).stdout.split() == ["output/boxes-0002.png"]
    assert "look at output/check-0001.png" in mifo("check", "cups", "--folder-path", ".").stdout
    (place / "b.png").write_text("mine")
    refused(place, r"b\.png exists already; give --overwrite", "boxes", BOXES, "--output-path", "b.png")
    mifo("boxes", BOXES, "--output-path", "b.png", "--overwrite")
    assert Image.open(place / "b.png").size == (512, 512)


# --- learn --------------------------------------------------------------------------------------


def learn(place: Path, photo: str, *more: object, exit_code: int = 0, base: int = 0) -> Any:
    arguments = [*learn_arguments(place / photo, place / "out"), *SHORT, "--model-path", tiny_base_folder(base), *more]
    return mifo(*arguments, exit_code=exit_code)


def test_learn_replaces_the_same_photo_and_asks_for_any_other(place: Path):
    write_instance(place / "more" / "cups", assets=1)  # another photo whose folder has the same name
    learn(place, "cups")
    said = learn(place, "cups", "--seed", 1).stderr
    assert re.search(r"note: the bundle in .*out/cups will be replaced; it stays until the new one is whole", said)
    other = r"out/cups holds a bundle that was learned from another photo or other masks; give another --name, or --overwrite"
    before = snapshot(place)
    assert re.search(other, learn(place, "more/cups", exit_code=2).stderr) and snapshot(place) == before
    another = learn(place, "cups", exit_code=2, base=1).stderr
    assert "holds a bundle that was learned on another base model" in another and snapshot(place) == before
    (place / "out" / "cups" / "mine.txt").write_text("mine")
    before = snapshot(place)
    for photo in ("cups", "more/cups"):
        assert "not all as mifo wrote it: mine.txt" in learn(place, photo, "--overwrite", exit_code=2).stderr
    assert snapshot(place) == before
    (place / "out" / "cups" / "mine.txt").unlink()
    learn(place, "more/cups", "--overwrite")
    assert len(json.loads((place / "out" / "cups" / "bundle.json").read_text())["tokens"]) == 1


def test_learning_the_background_too_is_no_other_photo_and_is_told_so(place: Path):
    """A note of `decompose` sends people from the one to the other."""
    learn(place, "cups")
    before = snapshot(place)
    said = learn(place, "cups", "--background-asset", exit_code=2).stderr
    assert "holds a bundle that was learned without <background> from the same photo; give another --name, or --overwrite" in said
    assert snapshot(place) == before
    learn(place, "cups", "--background-asset", "--overwrite")
    said = learn(place, "cups", exit_code=2).stderr
    assert "holds a bundle that was learned with <background> from the same photo" in said


def test_learn_never_replaces_a_folder_for_its_bundle_json(place: Path):
    (place / "out" / "cups").mkdir(parents=True)
    (place / "out" / "cups" / "bundle.json").write_text("{}")
    (place / "out" / "cups" / "mine.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        refused(place, r"other things in it \(bundle\.json, mine\.txt\)", *learn_arguments(place / "cups", place / "out"), *more)
    bundle = copy_bundle(place / "out", "old")
    (bundle / "manifest.json").unlink()  # as earlier versions wrote them
    refused(place, r"move it away", *learn_arguments(place / "cups", place / "out"), "--name", "old", "--overwrite")
    mifo("export", bundle, "--output-path", "export")  # and they can be used still
    changed = copy_bundle(place / "out", "changed")
    edit_json(changed / "bundle.json", note="mine")
    refused(place, r"bundle\.json \(changed\)", *learn_arguments(place / "cups", place / "out"), "--name", "changed")


def test_learn_leaves_a_link_with_its_locks_name_alone(place: Path):
    for target in ("notes.txt", "nowhere"):
        lock = place / "out" / ".checkpoints" / "cups" / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.symlink_to(place / target)
        refused(place, r"lock is a link.*left alone; move it away", *learn_arguments(place / "cups", place / "out"), *SHORT)
        lock.unlink()
    assert (place / "notes.txt").read_text() == "mine"


# --- ~ ------------------------------------------------------------------------------------------


def test_every_path_option_knows_the_home_folder(place: Path, monkeypatch: pytest.MonkeyPatch):
    """`--output-path=~/x`: the shell leaves it as it is."""
    monkeypatch.setenv("HOME", str(place))
    named = set()
    for command in app.registered_commands:
        function: Any = command.callback
        for name, hint in get_type_hints(function, include_extras=True).items():
            if "Path" in str(hint) or name in ("model_id", "model_path", "boxes", "instance", "dino", "clip", "detector"):
                (info,) = hint.__metadata__
                named.add((function.__name__, name))
                assert str(info.callback(Path("~/x"))) == f"{place}/x", (function.__name__, name)
                assert [info.callback(value) for value in (BOXES, None)] == [BOXES, None]
    assert len(named) > 40
    assert mifo("boxes", BOXES, "--output-path=~/new/b.png").stdout.strip() == f"{place}/new/b.png"
    assert (place / "new" / "b.png").is_file() and not (place / "~").exists()


# --- all of it, at random -----------------------------------------------------------------------


def test_a_few_canaries(tmp_path: Path):
    command = [sys.executable, "scripts/robustness/canaries.py", "--lines", "60", "--no-write"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "BROKEN" not in done.stdout, done.stdout + done.stderr
    assert len(re.findall(r"status 0", done.stdout)) >= 5, "too few of them do anything"
