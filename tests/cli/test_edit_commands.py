"""The commands edit, decompose and variations on a tiny random model, with pictures as cameras and programs write them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from _tiny import learn_arguments, mifo, snapshot, tiny_base_folder, tiny_bundle_folder, write_instance
from PIL import Image, ImageCms, ImageDraw

from mifo.boxes import mask_box
from mifo.bundle.store import load_bundle
from mifo.config import MemoryConfig, SynthesisConfig
from mifo.data.instance import load_instance, with_background
from mifo.editing.source_image import load_edit_mask, load_source_image
from mifo.errors import InputError
from mifo.model import load_base
from mifo.planning.planner import GIB, RESERVE, Settings, make_plan, read_model
from mifo.presets import edit_preset

ORIENTATION, MAKER = 0x0112, 0x010F
PROMPT = "a photo of <asset1>"
QUICK = ["--steps", "2", "--no-guidance"]


def write_mask(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    """White in `box`, black elsewhere."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    mask.save(path)
    return path


def write_picture(path: Path, size: tuple[int, int] = (240, 160), **options: Any) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (10, 15, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`img.png`, 240x160, and `mask.png`."""
    write_picture(tmp_path / "img.png")
    write_mask(tmp_path / "mask.png", (240, 160), (80, 50, 150, 120))
    return tmp_path


def edit(place: Path, *more: object, prompt: str = PROMPT, image: str = "img.png", model: Any = None) -> list[object]:
    bundle = [] if model == "none" else [model or tiny_bundle_folder()]
    return ["edit", *bundle, "--init-image", place / image, "--mask", place / "mask.png", "--prompt", prompt,
            "--output-path", place / "out", *QUICK, *more]  # fmt: skip


# --- what comes out -----------------------------------------------------------------------------


def test_candidates_best_first_with_sheet_and_record(place: Path):
    facts = json.loads(mifo(*edit(place, "--batch-size", 3, "--seed", 5, "--json")).stdout)
    assert [Path(p).name for p in facts["images"]] == ["edit00.png", "edit01.png", "edit02.png"]
    record = json.loads((place / "out" / "edit.json").read_text())
    assert {c["seed"] for c in record["candidates"]} == {5, 6, 7} and record["crop"] and record["bundle"] == "two_cups"
    assert all(set(c["scores"]) == {"asset", "prompt"} for c in record["candidates"])
    before, mask = np.asarray(Image.open(place / "img.png")), np.asarray(Image.open(place / "mask.png")) > 0
    for path, candidate in zip(facts["images"], record["candidates"], strict=True):
        stored = Image.open(path)
        after = np.asarray(stored)
        assert np.array_equal(after[~mask], before[~mask]) and (after[mask] != before[mask]).any()
        assert json.loads(stored.text["mifo"])["seed"] == candidate["seed"]
    assert Image.open(facts["contact_sheet"]).width > 3 * 256
    best = np.asarray(Image.open(facts["images"][0])).astype(int)
    mifo(*edit(place, "--seed", record["candidates"][0]["seed"], "--overwrite"))
    assert np.abs(best - np.asarray(Image.open(place / "out" / "edit00.png"))).max() <= 1


def test_a_camera_photo_keeps_its_megapixels_profile_and_upright_pixels(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ORIENTATION], exif[MAKER] = 6, "maker"  # stored on its side
    write_picture(tmp_path / "img.jpg", (4000, 3000), exif=exif, icc_profile=profile, quality=90)
    write_mask(tmp_path / "mask.png", (3000, 4000), (1000, 2500, 1650, 3200))
    mifo(*edit(tmp_path, image="img.jpg"))
    stored = Image.open(tmp_path / "out" / "edit00.png")
    upright = np.asarray(Image.open(tmp_path / "img.jpg").transpose(Image.Transpose.ROTATE_270))
    mask = np.asarray(Image.open(tmp_path / "mask.png")) > 0
    assert stored.size == (3000, 4000) and np.array_equal(np.asarray(stored)[~mask], upright[~mask])
    assert stored.info["icc_profile"] == profile
    assert stored.getexif().get(ORIENTATION, 1) == 1 and stored.getexif()[MAKER] == "maker"


def test_a_picture_below_the_models_resolution_is_edited_at_its_own_size(place: Path):
    write_picture(place / "img.png", (40, 30))
    write_mask(place / "mask.png", (40, 30), (12, 8, 30, 24))
    mifo(*edit(place, "--start", "image"))
    after, before = np.asarray(Image.open(place / "out" / "edit00.png")), np.asarray(Image.open(place / "img.png"))
    mask = np.asarray(Image.open(place / "mask.png")) > 0
    assert after.shape == (30, 40, 3) and np.array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).mean() > 0.5


def test_transparency_stays_outside_the_mask(place: Path):
    image = Image.open(place / "img.png").convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(place / "img.png")
    mifo(*edit(place))
    after, mask = np.asarray(Image.open(place / "out" / "edit00.png")), np.asarray(Image.open(place / "mask.png")) > 0
    assert np.array_equal(after[~mask], np.asarray(image)[~mask]) and (after[mask][:, 3] == 255).all()


def test_the_plain_base_model_edits_without_a_bundle(place: Path):
    more = ("--model-id", "none", "--model-path", tiny_base_folder(), "--invert-mask", "--start", "image", "--mask-dilation", 1)
    result = mifo(*edit(place, *more, prompt="a photo at the beach", model="none"))
    assert "1 picture in" in result.stdout and "enlarged 1.9 times" in result.stderr
    before, mask = np.asarray(Image.open(place / "img.png")), np.asarray(Image.open(place / "mask.png")) > 0
    after = np.asarray(Image.open(place / "out" / "edit00.png"))
    assert np.array_equal(after[mask], before[mask]) and (after[~mask] != before[~mask]).mean() > 0.5


@pytest.mark.parametrize(("mask", "more", "box"), [
    ((40, 36, 120, 76), [], (0.25, 36 / 160, 0.75, 76 / 160)),  # not the whole cells of the smallest map around it
    ((40, 36, 120, 76), ["--mask-dilation", 1], (0.25 - 1 / 16, 36 / 160 - 1 / 16, 0.75 + 1 / 16, 76 / 160 + 1 / 16)),
    ((40, 71, 120, 89), [], (0.25, 3 / 8, 0.75, 5 / 8)),  # between two rows of the smallest map's eight
    ((40, 36, 120, 76), ["--box-inset", 0.1], (0.25 + 0.05, 36 / 160 + 0.05, 0.75 - 0.05, 76 / 160 - 0.05)),
    ((40, 36, 120, 76), ["--box-inset", 0.25], (0.25 + 0.125, 36 / 160 + 0.0625, 0.75 - 0.125, 76 / 160 - 0.0625)),
])  # fmt: skip
def test_an_asset_alone_takes_the_masks_box_or_less(place: Path, mask: Any, more: Any, box: Any):
    """What is drawn beyond the mask is cut away. The crop is 160 pixels wide and high, from (0, 0)."""
    write_mask(place / "mask.png", (240, 160), mask)
    mifo(*edit(place, *more))
    assert json.loads((place / "out" / "edit.json").read_text())["boxes_in_crop"]["<asset1>"] == pytest.approx(box, abs=1e-4)


def test_two_assets_take_the_boxes_that_are_given(place: Path):
    both = "a photo of <asset0> and <asset1>"
    boxes = {"<asset0>": [0.33, 0.31, 0.62, 0.75], "<asset1>": [0.62, 0.3, 0.75, 0.75]}
    mifo(*edit(place, "--boxes", json.dumps(boxes), prompt=both))
    placed = json.loads((place / "out" / "edit.json").read_text())["boxes_in_crop"]
    assert set(placed) == {"<asset0>", "<asset1>"} and placed["<asset0>"][2] == pytest.approx(placed["<asset1>"][0])


# --- what goes in -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "16-bit colour", "P", "1", "LA", "grey profile", "animation"])
def test_pictures_of_every_kind_are_read(tmp_path: Path, mode: str):
    image = Image.open(write_picture(tmp_path / "img.png"))
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.gif" if mode == "animation" else "a.png")
    if mode == "animation":
        image.save(path, save_all=True, append_images=[Image.new("RGB", image.size, "red")])
    elif mode == "I;16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)
    elif mode == "16-bit colour":  # which PIL reads but does not write
        cv2.imwrite(str(path), np.asarray(image)[..., ::-1].astype(np.uint16) * 257)
    elif mode == "grey profile":
        image.convert("L").save(path, icc_profile=b"of a grey scanner")
    else:
        image.convert(mode).save(path)
    picture = load_source_image(path)
    assert picture.image.mode == "RGB" and picture.image.size == (240, 160) and picture.transparent is None
    wanted = image.convert("L").convert("RGB") if mode in ("I;16", "grey profile") else image
    difference = np.abs(np.asarray(picture.image).astype(int) - np.asarray(wanted))
    assert mode in ("CMYK", "P", "1", "LA", "animation") or difference.max() <= 1
    expected = {"CMYK": "is CMYK", "I;16": "more than 8 bits", "16-bit colour": "more than 8 bits",
                "grey profile": "has a colour profile that cannot be read; its colours are taken as sRGB",
                "animation": "first frame is edited"}.get(mode)  # fmt: skip
    assert (len(picture.notes) == 1 and expected in picture.notes[0]) if expected else picture.notes == ()


def test_a_mask_of_another_size_is_scaled_when_asked(place: Path):
    picture = load_source_image(place / "img.png").image
    small = write_mask(place / "small.png", (120, 80), (40, 20, 80, 60))
    mask, _ = load_edit_mask(small, picture, "img.png", resize=True)
    assert mask.shape == (160, 240) and mask[41:119, 81:159].all() and mask.sum() == pytest.approx(80 * 80, rel=0.02)
    inverted, _ = load_edit_mask(small, picture, "img.png", resize=True, invert=True)
    assert np.array_equal(inverted, ~mask)
    with pytest.raises(InputError, match="It fits when turned"):
        load_edit_mask(write_mask(place / "turned.png", (160, 240), (1, 1, 9, 9)), picture, "img.png")


def refused(place: Path, message: str, *arguments: object) -> None:
    before = snapshot(place)
    result = mifo(*arguments, exit_code=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), result.stderr
    assert result.stdout == "" and snapshot(place) == before


def test_wrong_input_is_refused(place: Path):
    refused(place, r"mask\.png is 240x160 but .*small\.png is 60x40.*--resize-mask", *edit(place, image=_small(place)))
    refused(place, "There is no picture .*gone", *edit(place, image="gone.png"))
    refused(place, r"prompt has <asset7>, but the assets that exist are <asset0>, <asset1>", *edit(place, prompt="a <asset7>"))
    refused(place, "say with --boxes where", *edit(place, prompt="a photo of <asset0> and <asset1>"))
    far = '{"<asset0>": [0.4, 0.4, 0.6, 0.6], "<asset1>": [0.0, 0.0, 0.05, 0.05]}'
    refused(place, "<asset1> is too far from the mask", *edit(place, "--boxes", far, prompt="<asset0> and <asset1>"))
    refused(place, "there is no MODEL_ID.*--model-id none", *edit(place, model="none"))
    refused(place, "but there are no assets", *edit(place, "--model-id", "none", model="none"))
    refused(place, "no learned bundle 'mugs'", *edit(place, model="mugs"))
    refused(place, "give one of them", *edit(place, "--model-id", "none"))


def _small(place: Path) -> str:
    write_picture(place / "small.png", (60, 40))
    return "small.png"


@pytest.mark.parametrize(
    ("box", "options", "message"),
    [
        ((0, 0, 0, 0), [], r"mask\.png is empty: its brightest pixel is"),
        ((0, 0, 240, 160), ["--invert-mask"], r"leaves nothing to edit"),
        ((80, 50, 82, 52), [], r"smaller than one latent pixel: it is 2x2 pixels.*make it at least"),
    ],
)
def test_masks_that_cannot_be_used(place: Path, box: tuple[int, int, int, int], options: list[str], message: str):
    if box[2] == 0:
        Image.new("L", (240, 160)).save(place / "mask.png")
    else:
        write_mask(place / "mask.png", (240, 160), box)
    refused(place, message, *edit(place, *options))


# --- scenes -------------------------------------------------------------------------------------


def test_two_assets_in_one_edit_read_texts_of_their_own_unless_told_otherwise(tmp_path: Path):
    Image.new("RGB", (96, 96), "grey").save(tmp_path / "img.png")
    mask = write_mask(tmp_path / "mask.png", (96, 96), (16, 16, 80, 80))
    drawn = []
    for k, more in enumerate(([], ["--no-own-text"])):
        mifo("edit", tiny_bundle_folder(), "--init-image", tmp_path / "img.png", "--mask", mask, "--prompt",
             "a photo of <asset0> and <asset1>", "--boxes", "[[0.1, 0.2, 0.5, 0.8], [0.5, 0.2, 0.9, 0.8]]", *QUICK,
             "--output-path", tmp_path / f"out{k}", *more)  # fmt: skip
        (picture,) = (p for p in (tmp_path / f"out{k}").glob("*.png") if p.name != "contact.png")
        drawn.append(np.asarray(Image.open(picture)))
    assert (drawn[0] != drawn[1]).any()


def test_the_background_is_what_no_mask_covers(tmp_path: Path):
    instance = load_instance(write_instance(tmp_path / "cups"))
    extended = with_background(instance)
    assert extended.tokens == ("<asset0>", "<asset1>", "<background>") and instance.tokens == extended.tokens[:2]
    total = sum(np.asarray(m).astype(int) for m in extended.masks)
    assert (total == 255).all()  # these masks do not overlap: every pixel is in exactly one


@pytest.fixture(scope="module")
def background_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Learned with --background-asset. Never write into it."""
    folder = tmp_path_factory.mktemp("background")
    write_instance(folder / "cups")
    mifo(*learn_arguments(folder / "cups", folder / "bundles", "--background-asset"))
    return folder / "bundles" / "cups"


def test_a_scene_taken_apart_background_included(background_bundle: Path, tmp_path: Path):
    assert load_bundle(background_bundle).tokens == ("<asset0>", "<asset1>", "<background>")
    assert not (background_bundle / "instance" / "mask2.png").exists()  # it follows from the others
    result = mifo("decompose", background_bundle, "--output-path", tmp_path / "d", "--steps", 1, "--json")
    facts = json.loads(result.stdout)
    assert [Path(p).stem for p in facts["images"]] == ["asset0", "asset1", "all", "background"]
    assert facts["prompts"][2:] == ["a photo of <asset0> and <asset1>", "a photo of <background>"]
    boxes = "[[0.1, 0.1, 0.6, 0.9]]"  # the background needs none
    prompt = "a photo of <asset0> on <BACKGROUND>"
    mifo("synthesize", background_bundle, "--prompt", prompt, "--boxes", boxes, "--steps", 1, "--output-path", tmp_path / "s")
    mifo("export", background_bundle, "--output-path", tmp_path / "export")
    assert (tmp_path / "export" / "background.safetensors").is_file()
    mifo("export", background_bundle, "--output-path", tmp_path / "export", "--overwrite")  # recognised as ours, and replaced


def test_without_the_background_asset_its_word_is_refused(tmp_path: Path):
    result = mifo("decompose", tiny_bundle_folder(), "--output-path", tmp_path / "out", "--steps", 1)
    assert "learn --background-asset" in result.stderr and not (tmp_path / "out" / "background.png").exists()
    arguments = ["synthesize", tiny_bundle_folder(), "--prompt", "a photo of <background>", "--output-path", tmp_path / "s"]
    refused(tmp_path, "The prompt has <background>, but the assets that exist are <asset0>, <asset1>", *arguments)


def test_variations_take_turns_over_the_prompts(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("# mine\na photo of {} at the beach\n\n<asset0> in the snow\n")
    more = ["--prompts-file", tmp_path / "prompts.txt", "--count", 3, "--asset", 1, "--seed", 9, "--steps", 1, "--json"]
    facts = json.loads(mifo("variations", tiny_bundle_folder(), "--output-path", tmp_path / "out", *more).stdout)
    beach = "a photo of <asset1> at the beach"
    assert facts["prompts"] == [beach, "<asset0> in the snow", beach]
    record = json.loads((tmp_path / "out" / "variations.json").read_text())
    assert [i["seed"] for i in record["images"]] == [9, 10, 11]
    first, last = (Image.open(tmp_path / "out" / f"variation0{k}.png").tobytes() for k in (0, 2))
    assert first != last  # the same prompt, another seed


def test_assets_that_share_a_picture_keep_to_where_they_stood(tmp_path: Path):
    """The tiny bundle's photo has one cup left and one right; a box is as large as its mask."""
    mifo("decompose", tiny_bundle_folder(), "--output-path", tmp_path / "d", "--steps", 1)
    boxes = {i["image"]: i["boxes"] for i in json.loads((tmp_path / "d" / "decompose.json").read_text())["images"]}
    assert boxes["asset0.png"] is None and boxes["asset1.png"] is None
    left, right = boxes["all.png"]["<asset0>"], boxes["all.png"]["<asset1>"]
    photo = load_instance(tiny_bundle_folder() / "instance")
    for box, mask in zip((left, right), photo.masks, strict=True):
        assert box == pytest.approx(mask_box(np.asarray(mask) > 127).as_tuple())
    (tmp_path / "prompts.txt").write_text("{} at night\n<asset1> and <asset0>\n<asset1> in the snow\n")
    common = ["--prompts-file", tmp_path / "prompts.txt", "--count", 3, "--steps", 2]
    drawn = {}
    for way in ("--keep-places", "--free-places"):
        mifo("variations", tiny_bundle_folder(), "--output-path", tmp_path / way, way, *common)
        listed = json.loads((tmp_path / way / "variations.json").read_text())["images"]
        drawn[way] = [i["boxes"] for i in listed], [(tmp_path / way / i["image"]).read_bytes() for i in listed]
    kept, free = drawn["--keep-places"], drawn["--free-places"]
    assert kept[0] == [boxes["all.png"], {"<asset1>": right, "<asset0>": left}, None] and free[0] == [None] * 3
    assert kept[1][0] != free[1][0] and kept[1][1] != free[1][1] and kept[1][2] == free[1][2]


def test_wrong_prompts_and_assets_of_variations(tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    command = ["variations", tiny_bundle_folder(), "--output-path", tmp_path / "out", "--prompts-file", prompts]
    refused(tmp_path, "prompts file .* cannot be read", *command)
    for text, message in (("\n#\n", "has no prompts"), ("a car\n", "line 1, names no asset"), ("<asset9>", "has <asset9>, but")):
        prompts.write_text(text)
        refused(tmp_path, message, *command)
    refused(tmp_path, "there is no asset '7'", *command[:-2], "--asset", 7)


# --- within a budget ----------------------------------------------------------------------------


def test_an_edit_within_a_budget_gives_up_what_it_must_or_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch):
    model, config = read_model(str(tiny_base_folder())), edit_preset("stable-diffusion")
    config = replace(config, background="optimization", guidance=replace(config.guidance, enabled=False))
    learned = load_bundle(tiny_bundle_folder()).config
    settings = Settings("edit", model.native_resolution, torch.float32, learned, SynthesisConfig(), 1, edit=config)
    free = make_plan(model, settings)
    assert free.largest.name == "background", "tuning a decoder takes gradients and optimizer states"
    used: list[MemoryConfig] = []
    load = load_base.load_base_model
    monkeypatch.setattr(load_base, "load_base_model", lambda *a: used.append(a[3]) or load(*a))
    extra = ["--background", "optimization", "--reconstruction-steps", 1, "--attention-backend", "materialized"]
    said = mifo(*edit(place, *extra, "--vram-gib", (free.largest.peak + RESERVE) / GIB - 1e-5)).stderr
    assert "turned on for" in said and "attention: materialized" in said and used != [MemoryConfig()]
    before = snapshot(place / "out")
    refused = mifo(*edit(place, *extra, "--vram-gib", 0.5, "--overwrite"), exit_code=2)
    assert "edit with" in refused.output and "does not fit" in refused.output and snapshot(place / "out") == before


def test_the_plan_of_an_edit():
    plain = json.loads(mifo("plan", "--model-path", "toybox", "--job", "edit", "--json").stdout)
    assert set(plain["phases"]) == {"encode", "guidance", "sampling", "decode"} and plain["resolution"] == 128
    tuned = json.loads(mifo("plan", "--model-path", "toybox", "--job", "edit", "--background", "optimization", "--json").stdout)
    assert tuned["phases"]["background"]["peak_gib"] > 2 * plain["phases"]["decode"]["peak_gib"]
    assert "own 128 pixels" in mifo("plan", "--model-path", "toybox", "--job", "edit", "--resolution", 64, exit_code=2).output
