"""Every command that README and docs show is run as it is printed, page by page, with tiny models and few steps."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from _pages import PAGES, ROOT, commands_of
from _tiny import FAST, mifo, tiny_base_folder, write_instance
from PIL import Image

#: Run in tests of their own: test_cli.py, test_cluster.py and test_service.py.
ELSEWHERE = ("demo", "cluster", "serve")
DESK = Path("my_photos") / "desk"
#: What makes a command short.
SHORT = {"synthesize": ["--steps", "2"], "edit": ["--steps", "2"], "variations": ["--steps", "1"], "decompose": ["--steps", "2"],
         "evaluate": ["--samples", "1", "--steps", "1"]}  # fmt: skip


SHOWN = {page.name: commands_of(page) for page in PAGES if commands_of(page)}


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what most pages speak of; to be copied."""
    folder = tmp_path_factory.mktemp("furnished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        furnish(str(tiny_base_folder()))
    return folder


@pytest.mark.parametrize("page", SHOWN)
def test_the_commands_of_a_page_run_as_printed(page: str, furnished: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = "toybox" if page == "evaluate.md" else str(tiny_base_folder())  # only there is a judge without downloads
    if model == "toybox":
        furnish(model)
    else:
        shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    for line in SHOWN[page]:
        words = shlex.split(line, comments=True)
        if words[0] in ELSEWHERE:
            continue
        make_ready(line)
        mifo(*shortened(words, model))


def furnish(model: str) -> None:
    """The files that the pages speak of."""
    if model == "toybox":  # its judge knows drawn toys only
        shutil.copytree(ROOT / "example" / "toy_car", DESK)
    else:
        write_instance(DESK, assets=3, size=(192, 128))
    shutil.copytree(DESK, Path("example") / "desk")
    mifo(*shortened(["learn", "desk", "--folder-path", "my_photos"], model))
    shutil.copytree(Path("Model_ours") / "desk", Path("Model_ours") / "shelf")
    photo = Image.new("RGB", (400, 300), "grey")
    for colour, box in (("red", (60, 90, 140, 210)), ("navy", (220, 130, 340, 210)), ("gold", (180, 20, 260, 70))):
        photo.paste(colour, box)
    photo.save("desk.jpg")
    Image.open(DESK / "img.png").save("street.jpg")
    shutil.copy(DESK / "mask1.png", "mask.png")
    mifo("export", "desk", "--output-path", "exported")
    shutil.copy(next(Path("exported").glob("*lora*.safetensors")), "my_car_lora.safetensors")
    Path("prompts.txt").write_text("a photo of {} at night\n")
    Path("boxes.json").write_text("[[0.1, 0.1, 0.6, 0.6]]")
    Path("jobs.jsonl").write_text('{"bundles": ["desk"], "prompt": "a photo of <asset0>", "steps": 2, "seed": 4}\n')


def make_ready(line: str) -> None:
    """What stands between two lines of a page: a photo that is to be marked is not marked yet, another is, or a mask is new."""
    if "segment" in line:
        shutil.rmtree(DESK, ignore_errors=True)
    elif not DESK.is_dir() or len(list(DESK.glob("mask*.png"))) < 3:
        shutil.rmtree(DESK, ignore_errors=True)
        shutil.copytree(Path("example") / "desk", DESK)
    if "asset3" in line:
        mask = Image.new("L", (192, 128))
        mask.paste(255, (4, 100, 60, 124))
        mask.save(DESK / "mask3.png")


def shortened(words: Sequence[str], model: str) -> list[str]:
    """The words of a line, for a tiny model and in few steps."""
    found = [model if word in ("sd1.5", "sd2.1", "sdxl") else word for word in words]
    found = ["a photo of <asset0>" if word == "..." else word for word in found]
    if words[0] == "learn":
        found += [*FAST, *([] if "--model-path" in words else ["--model-path", model])]
        found += ["--no-composites"] if model == "toybox" else []
    return found + ([] if "--batch-file" in words or "--again" in words else SHORT.get(words[0], []))
