"""Whatever is wrong with the input: exit status 2, one message that helps, nothing printed as a result, nothing changed."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _as_user import CAN_OBEY, obeying_permissions
from _tiny import copy_bundle, edit_json, learn_arguments, mifo, snapshot, tiny_base_folder, tiny_bundle_folder, write_instance
from PIL import Image

PROMPT = "a photo of <asset0> and <asset1>"
BOXES = "[[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]"
Spoiler = Callable[[Path], Any]


def refused(place: Path, message: str, *arguments: object) -> None:
    """The command fails with `message` (a pattern) alone and leaves every byte below `place` as it was."""
    before = snapshot(place)
    result = mifo(*arguments, exit_code=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), result.stderr
    assert len(errors[0]) < 700 and errors[0].isprintable()
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert snapshot(place) == before


def misused(place: Path, message: str, *arguments: object) -> None:
    """As `refused`, for what the parser of the options refuses in its own words."""
    before = snapshot(place)
    result = mifo(*arguments, exit_code=2)
    text = " ".join(result.stderr.replace("│", " ").split())
    assert "Usage:" in text and re.search(message, text), text
    assert result.stdout == "" and "Traceback" not in text and snapshot(place) == before


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`cups/`, a right instance; `out/` comes into being only when something is learned."""
    write_instance(tmp_path / "cups")
    return tmp_path


# --- instances ----------------------------------------------------------------------------------


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG's header, and a first bit of data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


INSTANCES: dict[str, tuple[Spoiler, str]] = {
    "no such folder": (lambda f: shutil.rmtree(f), r"There is no folder .*cups"),
    "a file": (lambda f: (shutil.rmtree(f), f.touch()), r"is a file; give the folder"),
    "no image": (lambda f: (f / "img.png").unlink(), r"has no image \(img\.jpg.*put the photo there as img\.jpg"),
    "no masks": (lambda f: [m.unlink() for m in f.glob("mask*")], r"has no masks: mask0\.png"),
    "a gap": (lambda f: (f / "mask0.png").rename(f / "mask2.png"), r"has mask1\.png but no mask0\.png.*without gaps"),
    "another size": (lambda f: Image.new("L", (9, 9), 255).save(f / "mask1.png"), r"mask1\.png is 9x9 but img\.png is 96x64"),
    "an empty mask": (lambda f: Image.new("L", (96, 64)).save(f / "mask1.png"), r"mask1\.png is empty.*white"),
    "a full mask": (lambda f: Image.new("L", (96, 64), 255).save(f / "mask0.png"), r"mask0\.png covers the whole image"),
    "a cut image": (lambda f: cut_in_half(f / "img.png"), r"img\.png (cannot be read|is not an image).*again"),
    "a cut mask": (lambda f: cut_in_half(f / "mask1.png"), r"mask1\.png (cannot be read|is not an image).*again"),
    "text as image": (lambda f: (f / "img.png").write_text("hello"), r"img\.png is not an image"),
    "nothing as mask": (lambda f: (f / "mask0.png").write_bytes(b""), r"mask0\.png is not an image"),
    "1x1": (lambda f: [Image.new("L", (1, 1), 9).save(p) for p in f.iterdir()], r"img\.png is 1x1 pixels.*at least 16"),
    "20,000x20,000": (lambda f: (f / "img.png").write_bytes(png_that_claims(20_000, 20_000)), r"at most 50 are read"),
    "too few words": (lambda f: (f / "words.txt").write_text("red cup\n"), r"words\.txt has 1 lines but there are 2 masks"),
}  # fmt: skip


@pytest.mark.parametrize("what", INSTANCES)
def test_a_wrong_instance(place: Path, what: str):
    spoil, message = INSTANCES[what]
    spoil(place / "cups")
    refused(place, message, *learn_arguments(place / "cups", place / "out"))


def test_of_several_instances_none_is_learned_if_one_is_wrong(place: Path):
    write_instance(place / "mugs")
    (place / "mugs" / "mask0.png").unlink()
    refused(place, r"mugs has mask1\.png but no mask0\.png", "learn", "--folder-path", place, "--output-dir", place / "out")
    (place / "empty").mkdir()
    refused(place, "holds no instance folders", "learn", "--folder-path", place / "empty", "--output-dir", place / "out")
    refused(place, r"There is no folder .*none", "learn", "--folder-path", place / "none", "--output-dir", place / "out")
    refused(place, "fits one instance, but 3", "learn", "--folder-path", place, "--name", "x", "--output-dir", place / "out")


def test_a_mask_that_vanishes_at_the_models_resolution(place: Path):
    Image.new("RGB", (2000, 2000), "grey").save(place / "cups" / "img.png")
    for index in range(2):
        mask = Image.new("L", (2000, 2000))
        mask.paste(255, (5, 5, 9, 9))
        mask.save(place / "cups" / f"mask{index}.png")
    arguments = learn_arguments(place / "cups", place / "out")
    refused(place, r"mask0\.png covers 16 pixels of 2000x2000 and none at 128x128", *arguments)


def test_more_assets_than_a_prompt_can_hold(place: Path):
    write_instance(place / "crowd", assets=40, size=(400, 40))
    message = r"40 assets are more than one prompt can hold; use fewer masks"
    refused(place, message, *learn_arguments(place / "crowd", place / "out"))


# --- learn's options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--initializer-tokens", "cup"], r"--initializer-tokens has 1 entries for 2 assets"),
        (["--initializer-tokens", "cup,mug\x1b[31m"], r"--initializer-tokens has the control character U\+001B"),
        (["--name", "../../etc"], r"cannot name a bundle"),
        (["--name", ".hidden"], r"cannot name a bundle"),
        (["--name", "two\nlines"], r"'two\\nlines' cannot name a bundle"),
        (["--name", "x" * 300], r"cannot name a bundle"),
        (["--device", "toaster"], r"the device 'toaster' cannot be used here .*--device cpu"),
        (["--device", "meta"], r"the device 'meta' cannot be used here"),
        (["--device", "cuda:99"], r"the device 'cuda:99' cannot be used here"),
        (["--device", "cpu", "--mixed-precision", "fp16"], r"fp16 needs a GPU"),
        (["--resolution", "100"], r"resolution is 100; .* needs a multiple of 16 pixels, such as 96"),
        (["--resolution", "8000"], r"resolution is 8000; .* give at most 1024"),
        (["--class-prompt", " | "], r"the class prompt ' \| ' is empty"),
        (["--class-prompt", "a photo of <asset0>"], r"The class prompt has <asset0>, but there are no assets"),
        (["--class-prompt", "a car|a <lora:x:1> car"], r"The class prompt has <lora:x:1>, a tag"),
        (["--class-prompt", "a car " * 60], r"The class prompt is \d+ tokens too long"),
        (["--attention-loss", "match", "--recipe", "break-a-scene"], r"--recipe break-a-scene has an attention loss of its own"),
        (["--attention-loss", "none", "--penalty-weight", "1"], r"--attention-loss none has no weight; leave --penalty-weight"),
        (["--model-path", "sd9"], r"'sd9' is no base model: expected toybox, sd1\.5"),
        (["--model-path", "/no/such/folder"], r"is no base model"),
    ],
)
def test_wrong_options_of_learn(place: Path, options: list[str], message: str):
    refused(place, message, *learn_arguments(place / "cups", place / "out"), *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--phase1-learning-rate", "nan"], "Invalid value for '--phase1-learning-rate'"),
        (["--phase2-learning-rate", "inf"], "Invalid value for '--phase2-learning-rate'"),
        (["--phase1-train-steps", "0"], "Invalid value for '--phase1-train-steps'"),
        (["--phase1-train-steps", "many"], "Invalid value for '--phase1-train-steps'"),
        (["--lora-rank", "0"], "Invalid value for '--lora-rank'"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--recipe", "dreambooth"], "Invalid value for '--recipe'.*break-a-scene"),
        (["--sedd", "1"], "No such option: --sedd"),
    ],
)
def test_options_of_learn_that_do_not_parse(place: Path, options: list[str], message: str):
    misused(place, message, *learn_arguments(place / "cups", place / "out"), *options)


def base_without_unet(folder: Path) -> str:
    shutil.rmtree(folder / "unet")
    return "has no unet"


def base_that_is_sdxl(folder: Path) -> str:
    edit_json(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    return "is a StableDiffusionXLPipeline; this version works with Stable Diffusion 1"


def base_with_a_garbled_index(folder: Path) -> str:
    (folder / "model_index.json").write_text("{")
    return r"model_index\.json cannot be read"


def base_with_cut_weights(folder: Path) -> str:
    cut_in_half(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return r"the base model .* does not load"


def base_with_a_garbled_configuration(folder: Path) -> str:
    (folder / "vae" / "config.json").write_text("[]")
    return r"vae.config\.json is missing or is no configuration"


def base_without_a_vocabulary(folder: Path) -> str:
    (folder / "tokenizer" / "tokenizer.json").write_bytes(b"\0")
    return r"the base model .* does not load"


@pytest.mark.parametrize(
    "spoil",
    [base_without_unet, base_that_is_sdxl, base_with_a_garbled_index, base_with_cut_weights,
     base_with_a_garbled_configuration, base_without_a_vocabulary],
)  # fmt: skip
def test_a_base_model_that_cannot_be_used(place: Path, spoil: Callable[[Path], str]):
    base = Path(shutil.copytree(tiny_base_folder(), place / "base"))
    message = spoil(base)
    refused(place, message, *learn_arguments(place / "cups", place / "out"), "--model-path", base)


# --- prompts and boxes --------------------------------------------------------------------------


def synthesize(place: Path, *more: object, bundle: Any = None, prompt: str = PROMPT, output: Any = None) -> list[object]:
    bundle, output = bundle or tiny_bundle_folder(), output or place / "pictures"
    return ["synthesize", bundle, "--prompt", prompt, "--output-path", output, "--steps", 2, *more]


def test_a_prompt_with_an_unknown_asset(place: Path):
    for prompt, message in {
        "a photo of <asset2>": r"has <asset2>, but the assets that exist are <asset0>, <asset1>",
        "a photo of asset0": r"'asset0' without both its brackets; write <asset0>",
        "  ": "The prompt is empty",
        "a \x07 photo": r"The prompt has the control character U\+0007",
        "a photo of <asset0> " + "and a car " * 40: r"\d+ tokens too long",
    }.items():
        refused(place, message, *synthesize(place, prompt=prompt))


def test_each_message_says_which_prompt_it_means(place: Path):
    negatives = {
        "\x00": "The negative prompt has the control character",
        "a blurred <asset9>": "The negative prompt has <asset9>, but the assets that exist are <asset0>, <asset1>",
        "asset0": "The negative prompt has 'asset0' without both its brackets",
        "and a car " * 40: r"The negative prompt is \d+ tokens too long",
        "a <lora:style:0.8>": "The negative prompt has <lora:style:0.8>, a tag of other programs",
    }
    write_picture(place)
    for negative, message in negatives.items():
        refused(place, message, *synthesize(place, "--negative-prompt", negative))
        refused(place, message, "edit", tiny_bundle_folder(), "--init-image", place / "photo.png", "--mask", place / "mask.png",
                "--prompt", "a photo of <asset0>", "--steps", 2, "--output-path", place / "pictures", "--negative-prompt",
                negative)  # fmt: skip
    refused(place, "The prompt has <lora:x:0.8>", *synthesize(place, prompt="a photo of <asset0> <lora:x:0.8>"))
    for command, option in (("variations", "--prompts-file"), ("evaluate", "--prompts")):
        long = "a photo of <asset0>" + " and a car" * 40
        for line, message in (("a photo of <asset9>", "prompt .*2.* has <asset9>"), (long, "The prompt 'a photo .* too long")):
            (place / "prompts.txt").write_text(f"a photo of <asset1>\n{line}\n")
            refused(place, message, command, tiny_bundle_folder(), option, place / "prompts.txt", "--output-path",
                    place / "pictures", *(["--backend", "toybox"] if command == "evaluate" else []))  # fmt: skip


def write_picture(place: Path) -> None:
    Image.new("RGB", (64, 64), "grey").save(place / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    mask.save(place / "mask.png")


def test_weights_of_other_programs_are_noted(place: Path):
    """They are read as plain words, and never silently."""
    said = mifo(*synthesize(place, "--negative-prompt", "blurred++", prompt="a photo of (<asset0>:1.3)")).stderr
    assert "note: the prompt has (<asset0>:1.3): weights are not supported, and this is read as plain words" in said
    assert "note: the negative prompt has blurred++: weights are not supported" in said


WRONG_BOXES = {
    "[[0, 0, 1, 1]]": r"There are 1 boxes, but the assets in the prompt are <asset0>, <asset1>",
    "[[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]": r"There are 3 boxes",
    '{"<asset0>": [0, 0, 1, 1]}': r"There is no box for <asset1>",
    '{"<asset0>": [0, 0, 1, 1], "<asset1>": [0, 0, 1, 1], "<asset2>": [0, 0, 1, 1]}': r"a box for '<asset2>', but",
    "[[0, 0, 1.5, 1], [0, 0, 1, 1]]": r"box of <asset0> is wrong.*between 0 and 1.*divide",
    "[[0, 0, 1, 1], [-0.1, 0, 1, 1]]": r"box of <asset1> is wrong.*between 0 and 1",
    "[[0.6, 0, 0.4, 1], [0, 0, 1, 1]]": r"has no area.*x0 < x1",
    "[[0, 0.5, 1, 0.5], [0, 0, 1, 1]]": r"has no area",
    "[[0, 0, 1], [0, 0, 1, 1]]": r"3 numbers.*must be four numbers",
    '[["a", 0, 1, 1], [0, 0, 1, 1]]': r"x0 must be a number",
    "[0, 0, 1, 1]": r"The boxes are \[0, 0, 1, 1\], a single box|The box of <asset0> is 0, but",
    "[[0, 0, NaN, 1], [0, 0, 1, 1]]": r"hold NaN",
    "[[0, 0, 1e999, 1], [0, 0, 1, 1]]": r"finite",
    "[[0, 0, 1, 1], [0, 0, 1, 1]": r"are not JSON: line 1",
    "[" * 100_000: r"nested too deeply|not JSON",
    "": r"The boxes are empty",
    "nowhere.json": r"There is no boxes file 'nowhere\.json'",
    "/": r"The boxes file '/' cannot be read",
}


@pytest.mark.parametrize("boxes", WRONG_BOXES, ids=lambda text: text[:30])
def test_wrong_boxes(place: Path, boxes: str):
    refused(place, WRONG_BOXES[boxes], *synthesize(place, "--boxes", boxes))
    if "asset" not in WRONG_BOXES[boxes] and "3 boxes" not in WRONG_BOXES[boxes]:  # without a prompt, any number is right
        refused(place, WRONG_BOXES[boxes], "boxes", boxes, "--output-path", place / "pictures" / "boxes.png")


def test_boxes_alone_that_name_an_asset_twice(place: Path):
    twice = '{"<asset0>": [0, 0, 1, 1], "0": [0, 0, 0.5, 0.5]}'
    refused(place, "asset0", "boxes", twice, "--output-path", place / "boxes.png")


def test_a_box_without_a_pixel_on_the_smallest_map(place: Path):
    boxes = "[[0.0, 0.0, 0.01, 1.0], [0.5, 0.1, 1.0, 0.9]]"
    message = r"Box \[0, 0, 0\.01, 1\] covers no pixel of a 8x8 map; make it at least 0\.125"
    refused(place, message, *synthesize(place, "--boxes", boxes))


def test_a_picture_to_draw_boxes_on_that_is_none(place: Path):
    (place / "photo.jpg").write_text("hello")
    for image, message in {"photo.jpg": "is not an image", "none.jpg": "There is no picture", ".": "There is no picture"}.items():
        refused(place, message, "boxes", BOXES, "--image", place / image, "--output-path", place / "boxes.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width", "60"], r"--width is 60; .* needs a multiple of 16 pixels, such as 64"),
        (["--height", "4"], r"--height is 4; .* such as 16"),
        (["--width", "100000"], r"--width is 100000; .* give at most 1024"),
        (["--device", "toaster"], r"the device 'toaster' cannot be used here"),
    ],
)
def test_wrong_options_of_synthesize(place: Path, options: list[str], message: str):
    refused(place, message, *synthesize(place, *options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-scale", "nan"], "Invalid value for '--lora-scale'"),
        (["--guidance-scale", "-0.5"], "Invalid value for '--guidance-scale'"),
        (["--steps", "0"], "Invalid value for '--steps'"),
        (["--batch-size", "65"], "Invalid value for '--batch-size'"),
        (["--scheduler", "magic"], "Invalid value for '--scheduler'.*unipc"),
    ],
)
def test_options_of_synthesize_that_do_not_parse(place: Path, options: list[str], message: str):
    misused(place, message, *synthesize(place, *options))


# --- bundles ------------------------------------------------------------------------------------


def test_bundles_that_cannot_be_used(place: Path):
    """Every kind of damage is in test_bundle.py."""
    folder = copy_bundle(place / "out")
    names = ("--output-dir", place / "out")
    refused(place, r"no learned bundle 'mugs': there are two_cups", *synthesize(place, *names, bundle="mugs"))
    other = ("--model-path", tiny_base_folder(1))
    refused(place, r"was learned on .*, but the base model is .*--model-path", *synthesize(place, *other, bundle=folder))
    edit_json(folder / "bundle.json", schema=99)
    for command in (synthesize(place, bundle=folder), ["export", folder, "--output-path", place / "export"]):
        refused(place, r"schema 99, this version reads up to 1; update mifo", *command)
    (folder / "assets.safetensors").write_bytes(b"\0" * 100)
    edit_json(folder / "bundle.json", schema=1)
    refused(place, r"assets\.safetensors is corrupt", *synthesize(place, bundle=folder))
    (folder / "bundle.json").unlink()
    refused(place, r"has no bundle\.json", *synthesize(place, bundle=folder))


def test_a_bundle_whose_base_model_is_gone(place: Path):
    folder = copy_bundle(place)
    record = json.loads((folder / "bundle.json").read_text())
    edit_json(folder / "bundle.json", base={**record["base"], "name": "gone", "source": str(place / "gone")})
    asked = r"the bundle 'two_cups' needs its own base model: .*gone', but there is no such folder; give it with --model-path"
    refused(place, asked, *synthesize(place, bundle=folder))


# --- places that cannot be written --------------------------------------------------------------


def writing_commands(place: Path, target: Path) -> Iterator[list[object]]:
    """Every command that writes, writing below `target`."""
    yield [*learn_arguments(place / "cups", target)]
    yield synthesize(place, output=target)
    yield ["boxes", BOXES, "--output-path", target / "boxes.png"]
    yield ["export", tiny_bundle_folder(), "--output-path", target / "export"]
    yield ["demo", "--output-path", target]


def test_a_file_where_a_folder_is_needed(place: Path):
    (place / "file").write_text("mine")
    for target in (place / "file", place / "file" / "deep" / "er"):
        for command in writing_commands(place, target):
            refused(place, r"cannot be written: a file stands where a folder is needed", *command)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system in which nobody can make files")
def test_a_folder_that_cannot_be_written(place: Path):
    for command in writing_commands(place, Path("/proc/mifo")):
        refused(place, r"/proc/mifo.* cannot be written \(.*\); choose another output folder", *command)


@pytest.mark.skipif(not CAN_OBEY, reason="root, on a system where it cannot give up its rights")
def test_a_read_only_folder(place: Path):
    """With a good bundle in it, which stays."""
    copy_bundle(place / "out", "cups")
    (place / "out").chmod(0o555)
    try:
        with obeying_permissions():
            for command in writing_commands(place, place / "out"):
                refused(place, r"out.* cannot be written \(Permission denied\); choose another output folder", *command)
    finally:
        (place / "out").chmod(0o755)


def test_a_name_that_is_too_long(place: Path):
    for command in writing_commands(place, place / ("x" * 300)):
        refused(place, r"cannot be written \(File name too long\)", *command)


def test_what_is_not_ours_is_never_replaced(place: Path):
    """`--output-dir example` would put the bundle where the instance is."""
    refused(place, r"the bundle's folder is .*cups, which is the instance cups", *learn_arguments(place / "cups", place))
    export = ["export", tiny_bundle_folder(), "--output-path", place / "cups"]
    refused(place, r"cups is a folder with other things in it", *export)
    (place / "boxes.png").mkdir()
    refused(place, r"a folder has this name", "boxes", BOXES, "--output-path", place / "boxes.png")
    refused(place, r"expected a file's name", "boxes", BOXES, "--output-path", "/")


# --- a full disk --------------------------------------------------------------------------------


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing past `size` bytes of a file fails as it does on a full disk; Python ignores the signal that comes with it."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_learning(place: Path):
    folder = copy_bundle(place / "out", "cups")
    full = r"no space left for .* \(File too large\).* free some space"
    bare = ["--no-prior-preservation"]
    for options, what in (([], r"\.prior/\S+"), (bare, r"\.checkpoints/cups/\S+"),
                          ([*bare, "--checkpoint-every", "0"], str(folder))):  # fmt: skip
        with no_file_above(2000):
            refused(place, full.replace("for .*", f"for .*{what}"), *learn_arguments(place / "cups", place / "out"), *options)


def test_a_full_disk_while_writing_pictures(place: Path):
    with no_file_above(500):
        refused(place, r"no space left for .*pictures", *synthesize(place, "--batch-size", 2))
        refused(place, r"no space left for .*pictures", "boxes", BOXES, "--output-path", place / "pictures" / "boxes.png")
        refused(place, r"no space left for .*export", "export", tiny_bundle_folder(), "--output-path", place / "export")


def test_a_disk_that_is_really_full(place: Path):
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if sys.platform != "linux" or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        (disk / "filler").write_bytes(b"x" * 40_000)
        refused(place, "No space left on device", *learn_arguments(place / "cups", disk, "--no-prior-preservation"))
        refused(place, "No space left on device", *synthesize(place, "--batch-size", 4, output=disk / "new"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
