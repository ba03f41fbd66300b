"""Masks from boxes and clicks, against the truth of drawn scenes, and the instance folder that `learn` reads."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from _tiny import mifo, snapshot
from PIL import Image, ImageDraw

from mifo.boxes import Box
from mifo.data.instance import load_instance
from mifo.errors import InputError
from mifo.segmentation.grabcut import GrabCut, propose
from mifo.segmentation.hints import Hint, parse_box, parse_point, points_by_box
from mifo.segmentation.instance_folder import without_overlaps
from mifo.toybox.examples import EXAMPLES
from mifo.toybox.world import draw_scene
from scripts.quality.measure_segment import iou, loose_box


@pytest.fixture(scope="module")
def toy_car() -> tuple[Image.Image, list[np.ndarray]]:
    drawing = draw_scene(EXAMPLES["toy_car"], 256)
    return drawing.image, [np.asarray(mask.convert("L")) > 127 for mask in drawing.masks]


def as_option(box: Box, size: tuple[int, int] | None = None) -> str:
    width, height = size or (1, 1)
    return ",".join(str(v * s) for v, s in zip(box.as_tuple(), (width, height, width, height), strict=True))


def test_loose_boxes_give_the_things_true_masks(toy_car: tuple[Image.Image, list[np.ndarray]]) -> None:
    image, truth = toy_car
    hints = [Hint(loose_box(mask, 0.15, np.random.default_rng(k))) for k, mask in enumerate(truth)]
    found = GrabCut().masks(image, hints)
    assert all(iou(a, b) > 0.92 for a, b in zip(found, truth, strict=True))  # the bar's mean; measured 0.99
    again = GrabCut().masks(image, hints)
    assert all((a == b).all() for a, b in zip(found, again, strict=True))


def test_a_large_photo_is_cut_out_at_its_own_size(toy_car: tuple[Image.Image, list[np.ndarray]]) -> None:
    image, truth = toy_car
    large = image.resize((2048, 2048), Image.Resampling.LANCZOS)
    (found,) = GrabCut().masks(large, [Hint(loose_box(truth[0], 0.15, np.random.default_rng(0)))])
    expected = np.asarray(Image.fromarray(truth[0]).resize(large.size, Image.Resampling.NEAREST))
    assert found.shape == (2048, 2048) and iou(found, expected) > 0.92


def test_a_point_says_which_of_two_things_in_a_box_is_meant() -> None:
    image = Image.new("RGB", (200, 120), (90, 140, 90))
    drawing = ImageDraw.Draw(image)
    drawing.ellipse((30, 30, 80, 80), fill=(220, 30, 30))
    drawing.ellipse((110, 30, 160, 80), fill=(30, 30, 220))
    box = Box(0.1, 0.15, 0.85, 0.8)
    (both,), (right,) = (GrabCut().masks(image, [Hint(box, points)]) for points in ((), ((0.675, 0.46),)))
    assert both[55, 55] and both[55, 135]
    assert right[55, 135] and not right[55, 55]


def test_things_that_stand_out_are_proposed(toy_car: tuple[Image.Image, list[np.ndarray]]) -> None:
    image, truth = toy_car
    found = GrabCut().masks(image, propose(image))
    assert len(found) <= 8
    assert [max(iou(guess, mask) for guess in found) > 0.9 for mask in truth] == [True] * 3
    assert propose(Image.new("RGB", (64, 64), (200, 10, 10))) == []


def test_numbers_are_fractions_or_pixels() -> None:
    assert parse_box("0.1, 0.2,0.5,0.9", (640, 480)) == Box(0.1, 0.2, 0.5, 0.9)
    assert parse_box("[64,96,320,432]", (640, 480)) == Box(0.1, 0.2, 0.5, 0.9)
    assert parse_point("320,240", (640, 480)) == (0.5, 0.5) == parse_point("0.5,0.5", (10, 10))
    assert Hint(Box(0.1, 0.2, 0.5, 0.9)).pixels((640, 480)) == (64, 96, 320, 432)
    assert Hint(Box(0.0, 0.0, 1e-9, 1e-9)).pixels((10, 10)) == (0, 0, 1, 1)


@pytest.mark.parametrize("text", ["", "1,2,3", "a,b,c,d", "nan,0,1,1", "0.5,0.5,0.2,0.9", "0,0,700,100"])
def test_what_is_no_box_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_box(text, (640, 480))


def test_a_point_in_two_boxes_is_the_smaller_ones() -> None:
    large, small = Box(0, 0, 1, 1), Box(0.4, 0.4, 0.6, 0.6)
    hints, alone = points_by_box([large, small], [(0.5, 0.5), (0.1, 0.1)])
    assert [h.points for h in hints] == [((0.1, 0.1),), ((0.5, 0.5),)] and alone == []
    assert points_by_box([small], [(0.9, 0.9)])[1] == [(0.9, 0.9)]


def test_a_pixel_of_two_masks_goes_to_the_smaller_box() -> None:
    large, small = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    large[:, :3] = True
    small[:2, 2:] = True
    found = without_overlaps([large, small], [Hint(Box(0, 0, 0.9, 1)), Hint(Box(0.4, 0, 1, 0.5))])
    assert (found[1] == small).all() and (found[0] == (large & ~small)).all()


# --- the command --------------------------------------------------------------------------------


def test_a_photo_becomes_an_instance_that_learn_reads(toy_car: tuple[Image.Image, list[np.ndarray]], tmp_path: Path) -> None:
    image, truth = toy_car
    image.save(tmp_path / "photo.png")
    boxes = [loose_box(mask, 0.15, np.random.default_rng(k)) for k, mask in enumerate(truth)]
    y, x = (int(np.median(v)) for v in np.nonzero(truth[2]))
    result = mifo("segment", tmp_path / "photo.png", "--box", as_option(boxes[0]), "--point", f"{x},{y}", "--box",
                  as_option(boxes[1], image.size), "--words", "red car", "--words", "blue car", "--words", "green car",
                  "--output-path", tmp_path / "desk", "--json")  # fmt: skip
    printed = json.loads(result.stdout)
    instance = load_instance(tmp_path / "desk")
    assert instance.words == ("red car", "blue car", "green car") and not instance.warnings and printed["segmenter"] == "grabcut"
    assert [round(iou(np.asarray(m) > 0, t), 1) for m, t in zip(instance.masks, truth, strict=True)] == [1.0] * 3
    assert (tmp_path / "desk" / "img.png").read_bytes() == (tmp_path / "photo.png").read_bytes()
    assert Image.open(printed["overview"]).width > 200 and [t["words"] for t in printed["things"]][2] == "green car"
    before = snapshot(tmp_path)
    refused = mifo("segment", tmp_path / "photo.png", "--auto", "--output-path", tmp_path / "desk", exit_code=2)
    assert "--overwrite" in refused.stderr and snapshot(tmp_path) == before
    mifo("segment", tmp_path / "photo.png", "--auto", "--choose", "1,0", "--output-path", tmp_path / "desk", "--overwrite")
    assert load_instance(tmp_path / "desk").count == 2


def test_a_photo_that_its_camera_stored_turned_gets_upright_masks(toy_car: tuple[Image.Image, list[np.ndarray]],
                                                                  tmp_path: Path) -> None:  # fmt: skip
    image, truth = toy_car
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    folder = tmp_path / "Ada's desk"
    result = mifo("segment", tmp_path / "photo.jpg", "--box", as_option(loose_box(truth[0], 0.1, np.random.default_rng(0))),
                  "--output-path", folder)  # fmt: skip
    assert "turned upright" in result.stderr
    line = result.stdout.split("then: ")[1].strip()
    assert shlex.split(line) == ["mifo", "learn", str(folder)]  # can be given to a shell as it is
    instance = load_instance(folder)
    assert iou(np.asarray(instance.masks[0]) > 0, truth[0]) > 0.92 and not instance.notes
    assert np.abs(np.asarray(instance.image, int) - np.asarray(image, int)).mean() < 5  # JPEG


@pytest.mark.parametrize(("options", "message"), [
    ([], "no thing was marked"),
    (["--box", "0.1,0.1,0.3"], "expected 4 numbers"),
    (["--box", "0.62,0.02,0.98,0.12"], "was not found in its box"),
    (["--point", "0.98,0.02"], "nothing stands out"),
    (["--box", "0.05,0.1,0.5,0.4", "--words", "a", "--words", "b"], "2 --words and 1 things"),
    (["--box", "0.05,0.1,0.5,0.4", "--words", " "], "are empty"),
    (["--auto", "--box", "0,0,1,1"], "leave one of them out"),
    (["--choose", "1"], "give --auto too"),
    (["--auto", "--choose", "7"], "things were proposed"),
    (["--auto", "--choose", "x"], "expected numbers"),
    (["--auto", "--sam2", "nowhere/at-all"], "cannot be loaded"),
])  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_is_written(toy_car: tuple[Image.Image, list[np.ndarray]], tmp_path: Path,
                                                      options: list[str], message: str) -> None:  # fmt: skip
    toy_car[0].save(tmp_path / "photo.png")
    before = snapshot(tmp_path)
    result = mifo("segment", tmp_path / "photo.png", *options, "--output-path", tmp_path / "out", exit_code=2)
    assert message in " ".join(result.stderr.split()) and snapshot(tmp_path) == before


# --- SAM 2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_sam2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in SAM 2's architecture, in miniature: its masks mean nothing, its wiring does."""
    import torch
    from transformers import Sam2Config, Sam2Model
    from transformers.models.sam2.configuration_sam2 import (
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    torch.manual_seed(0)
    side, width = 128, 32
    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[side, side], blocks_per_stage=[1, 1, 2, 1], global_attention_blocks=[3],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 1, 1],
        window_positional_embedding_background_size=[4, 4], window_size_per_stage=[8, 4, 8, 4],
    )  # fmt: skip
    vision = Sam2VisionConfig(backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=width,
                              backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]])  # fmt: skip
    prompts = Sam2PromptEncoderConfig(hidden_size=width, image_size=side, patch_size=16)
    decoder = Sam2MaskDecoderConfig(hidden_size=width, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=32)
    folder = tmp_path_factory.mktemp("sam2")
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    Sam2Model(config).save_pretrained(folder)
    return folder


def test_sam2_is_asked_with_boxes_and_points_at_its_own_size(tiny_sam2: Path) -> None:
    """Against transformers' model called by hand."""
    import torch

    from mifo.segmentation.sam2 import Sam2

    image = Image.effect_noise((200, 120), 80).convert("RGB")
    hints = [Hint(Box(0.1, 0.2, 0.5, 0.9)), Hint(Box(0.3, 0.1, 0.9, 0.8), ((0.5, 0.5), (0.6, 0.4)))]
    sam = Sam2(str(tiny_sam2))
    found = sam.masks(image, hints)
    assert [m.shape for m in found] == [(120, 200)] * 2 and found[0].dtype == bool
    square = np.asarray(image.resize((128, 128), Image.Resampling.BILINEAR), np.float32) / 255
    pixels = torch.from_numpy((square - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        out = sam.model(pixel_values=pixels, input_boxes=torch.tensor([[[0.3 * 128, 0.1 * 128, 0.9 * 128, 0.8 * 128]]]),
                        input_points=torch.tensor([[[[64.0, 64.0], [0.6 * 128, 0.4 * 128]]]]),
                        input_labels=torch.ones((1, 1, 2), dtype=torch.int), multimask_output=False)  # fmt: skip
    expected = torch.nn.functional.interpolate(out.pred_masks[:, 0], (120, 200), mode="bilinear", align_corners=False)[0, 0] > 0
    assert (found[1] == expected.numpy()).mean() > 0.999  # pixels at the very threshold may fall either way
    assert 0 < found[1].mean() < 1


def test_a_model_that_is_no_sam2_is_refused(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    from mifo.segmentation.sam2 import Sam2

    CLIPTextModel(CLIPTextConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                 max_position_embeddings=8, eos_token_id=2)).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(InputError, match=r"sam2|SAM 2"):
        Sam2(str(tmp_path))
