"""Boxes and layouts: what a user types, and what the program makes of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mifo.boxes import Box, Layout, mask_box, parse_boxes_alone, parse_layout
from mifo.errors import InputError

TOKENS = ["<asset2>", "<asset0>"]
LEFT, RIGHT = [0.0, 0.2, 0.5, 0.9], [0.5, 0.2, 1.0, 0.9]
unit = st.floats(0, 1)
boxes = (
    st.tuples(unit, unit, unit, unit)
    .filter(lambda v: v[0] != v[2] and v[1] != v[3])
    .map(lambda v: Box(min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3])))
)


def test_a_box_on_a_grid() -> None:
    box = Box(0.25, 0.5, 0.75, 1)
    assert box.area == 0.25
    assert box.as_tuple() == (0.25, 0.5, 0.75, 1.0)
    assert box.pixels(width=8, height=4) == (2, 2, 6, 4)
    expected = np.zeros((4, 8), dtype=bool)
    expected[2:, 2:6] = True
    np.testing.assert_array_equal(box.rasterize(height=4, width=8), expected)


def test_edges_round_half_up() -> None:
    assert Box(0.125, 0.375, 0.625, 0.875).pixels(4, 4) == (1, 2, 3, 4)


def test_neighbours_share_no_pixel_and_leave_no_gap() -> None:
    left, right = Box(0, 0, 0.37, 1).rasterize(16, 16), Box(0.37, 0, 1, 1).rasterize(16, 16)
    assert (left ^ right).all()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Box(0, 0, 0.5, 0.5), 1.0),
        (Box(0.5, 0.5, 1, 1), 0.0),
        (Box(0.75, 0.75, 1, 1), 0.0),
        (Box(0.25, 0, 0.75, 0.5), 1 / 3),
    ],
)
def test_iou(other: Box, expected: float) -> None:
    assert Box(0, 0, 0.5, 0.5).iou(other) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.5, 0, 0.5, 1), "no area"),
        ((0, 0.9, 1, 0.2), "left, top, right, bottom"),
        ((-0.1, 0, 1, 1), "between 0 and 1"),
        ((0, 0, 1.01, 1), "divide x by the image's width"),
        ((10, 20, 300, 400), r"Box \[10, 20, 300, 400\]"),
        ((math.nan, 0, 1, 1), "x0 must be a finite number"),
        ((0, 0, 1, math.inf), "y1 must be a finite number"),
        ((0, 0, 10**400, 1), "x1 must be a finite number"),
        ((0, False, 1, 1), "y0 must be a number in .0, 1., not False"),
        (("0", 0, 1, 1), "x0 must be a number in .0, 1., not '0'"),
        ((0, None, 1, 1), "not None"),
    ],
)
def test_a_wrong_box_is_refused_and_shown(values: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Box(*values)


def test_a_negative_box_is_not_taken_for_pixels() -> None:
    with pytest.raises(InputError) as error:
        Box(-0.1, 0, 1, 1)
    assert "divide" not in str(error.value)


def test_numpy_numbers_become_plain_floats() -> None:
    box = Box(*np.array([0, 0.25, 0.5, 1], dtype=np.float32))
    assert json.loads(json.dumps(box.as_tuple())) == [0, 0.25, 0.5, 1]


def test_a_box_too_thin_for_a_map_is_refused() -> None:
    thin = Box(0.50, 0.0, 0.52, 1.0)
    thin.check_visible(height=64, width=64)
    with pytest.raises(InputError, match=r"no pixel of a 16x8 map; make it at least 0.0625 wide and 0.125 high"):
        thin.check_visible(height=8, width=16)
    with pytest.raises(InputError, match="no pixel of a 64x8 map"):
        Box(0.0, 0.50, 1.0, 0.52).check_visible(height=8, width=64)


def test_a_box_grows_only_where_a_map_would_not_show_it() -> None:
    assert Box(0.50, 0.1, 0.52, 0.9).made_visible(height=8, width=4) == Box(0.5, 0.1, 0.75, 0.9)
    assert Box(0.1, 0.96, 0.9, 1.0).made_visible(height=8, width=8) == Box(0.1, 0.875, 0.9, 1.0)
    seen = Box(0.3, 0.33, 0.7, 0.67)
    assert seen.made_visible(height=8, width=8) == seen


def test_the_box_of_a_mask_is_as_large_as_what_is_in_it() -> None:
    mask = np.zeros((40, 80), bool)
    mask[5:20, 17], mask[8, 10:30] = True, True
    assert mask_box(mask) == Box(10 / 80, 5 / 40, 30 / 80, 20 / 40)


def test_iou_of_boxes_whose_areas_vanish() -> None:
    hair = Box(0, 0, 1e-200, 1e-200)
    assert hair.iou(hair) == 1
    assert hair.iou(Box(0, 0, 1e-200, 2e-200)) == 0


@settings(deadline=None)
@given(boxes, st.integers(1, 64), st.integers(1, 64))
def test_the_raster_has_the_area_of_the_box(box: Box, height: int, width: int) -> None:
    mask = box.rasterize(height, width)
    assert mask.shape == (height, width)
    one_pixel_each_way = (box.x1 - box.x0) / height + (box.y1 - box.y0) / width + 1 / (width * height)
    assert abs(mask.mean() - box.area) <= one_pixel_each_way + 1e-9


@settings(deadline=None)
@given(boxes, boxes)
def test_iou_is_symmetric_and_bounded(one: Box, other: Box) -> None:
    assert one.iou(other) == other.iou(one)
    assert 0 <= one.iou(other) <= 1 + 1e-9
    assert one.iou(one) == pytest.approx(1)


@settings(deadline=None)
@given(boxes, boxes)
def test_a_layout_survives_json(one: Box, other: Box) -> None:
    layout = Layout(tuple(TOKENS), (one, other))
    assert parse_layout(json.dumps(layout.to_json()), TOKENS) == layout


def test_a_list_goes_by_the_order_in_the_prompt() -> None:
    layout = parse_layout(json.dumps([LEFT, RIGHT]), TOKENS)
    assert [(token, list(box.as_tuple())) for token, box in layout] == [("<asset2>", LEFT), ("<asset0>", RIGHT)]
    assert len(layout) == 2
    assert layout.box_of("<asset0>") == Box(*RIGHT)


@pytest.mark.parametrize(
    ("zero", "two"), [("<asset0>", "<asset2>"), ("asset0", "asset2"), ("0", " 2 "), ("<ASSET0>", "2")]
)
def test_an_object_goes_by_the_names(zero: str, two: str) -> None:
    layout = parse_layout(json.dumps({zero: RIGHT, two: LEFT}), TOKENS)
    assert layout.to_json() == {"<asset2>": LEFT, "<asset0>": RIGHT}
    assert layout.tokens == ("<asset2>", "<asset0>")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_boxes_come_from_a_file(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps([LEFT, RIGHT], indent=2), encoding=encoding)
    assert parse_layout(path, TOKENS) == parse_layout(str(path), TOKENS) == parse_layout(f"\n[{LEFT}, {RIGHT}]", TOKENS)


def test_a_prompt_without_assets_takes_an_empty_list() -> None:
    assert len(parse_layout("[]", [])) == 0


PAIR = "[0, 0, 1, 1]"
BAD_INLINE = {
    "empty": ("", "The boxes are empty"),
    "blank": (" \n", "The boxes are empty"),
    "neither file nor JSON": ("0.1,0.2,0.3,0.4", "There is no boxes file '0.1,0.2,0.3,0.4'"),
    "null character": ("boxes\0.json", "cannot be read"),
    "path too long": ("x" * 5000, "cannot be read"),
    "cut short": ("[[0, 0, 1, 1]", "line 1, column 14"),
    "single quotes": ("{'<asset0>': [0, 0, 1, 1]}", "line 1, column 2"),
    "second line": ("[[0, 0, 1, 1],\n [0, 0, 1 1]]", "line 2, column 11"),
    "NaN": (f"[{PAIR}, [NaN, 0, 1, 1]]", "hold NaN"),
    "infinity": (f"[{PAIR}, [0, 0, Infinity, 1]]", "hold Infinity"),
    "overflow": (f"[{PAIR}, [0, 0, 1e999, 1]]", "The box of <asset0> is wrong.*x1 must be a finite number"),
    "number of 5000 digits": (f"[{PAIR}, [0, 0, {'9' * 5000}, 1]]", "number"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "deep, whole": ("[" * 200_000 + "]" * 200_000, "nested too deeply"),
    "huge": (f"[{PAIR}, {PAIR}{' ' * (1 << 20)}]", "larger than 1 MiB"),
    "a single box": (PAIR, "second pair of brackets"),
    "too few": (f"[{PAIR}]", "There are 1 boxes, but the assets in the prompt are <asset2>, <asset0>"),
    "too many": (f"[{PAIR}, {PAIR}, {PAIR}]", "There are 3 boxes, but the assets in the prompt are <asset2>, <asset0>"),
    "three coordinates": (f"[{PAIR}, [0, 0, 1]]", r"The box of <asset0> is \[0, 0, 1\] \(3 numbers\)"),
    "five coordinates": (f"[{PAIR}, [0, 0, 1, 1, 1]]", r"\(5 numbers\)"),
    "box of another type": (f'[{PAIR}, "middle"]', "The box of <asset0> is 'middle'"),
    "box as object": (f'[{PAIR}, {{"x0": 0}}]', "must be four numbers"),
    "text coordinate": (f'[{PAIR}, [0, "0.5", 1, 1]]', "The box of <asset0> is wrong.*y0 must be a number.*'0.5'"),
    "null coordinate": (f"[{PAIR}, [0, null, 1, 1]]", "y0 must be a number"),
    "boolean coordinate": (f"[{PAIR}, [0, 0, true, 1]]", "x1 must be a number.*True"),
    "nested coordinate": (f"[{PAIR}, [0, [0], 1, 1]]", "y0 must be a number"),
    "pixels": (f"[[0, 0, 256, 512], {PAIR}]", "The box of <asset2> is wrong.*divide x by the image's width"),
    "percents": (f"[{PAIR}, [0, 0, 50, 100]]", "percents by 100"),
    "inverted": (f"[{PAIR}, [0.9, 0, 0.1, 1]]", "The box of <asset0> is wrong.*x0 < x1"),
    "missing asset": (f'{{"0": {PAIR}}}', "There is no box for <asset2>: the assets in the prompt are <asset2>"),
    "unknown asset": (f'{{"<asset7>": {PAIR}}}', "a box for '<asset7>', but the assets in the prompt are <asset2>"),
    "unknown key": (f'{{"boxes": [{PAIR}]}}', "a box for 'boxes', but the assets"),
    "the same key twice": (f'{{"0": {PAIR}, "0": {PAIR}, "2": {PAIR}}}', "'0' twice"),
    "the same asset twice": (f'{{"0": {PAIR}, "asset0": {PAIR}, "2": {PAIR}}}', "<asset0> twice"),
}


@pytest.mark.parametrize(("source", "message"), BAD_INLINE.values(), ids=BAD_INLINE.keys())
def test_wrong_boxes_are_explained(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_layout(source, TOKENS)
    assert len(str(error.value)) < 500


BAD_FILES = {
    "empty": (b"", "boxes.json are empty"),
    "a number": (b"3", "must be a JSON list or object, not 3"),
    "a word": (b'"left"', "must be a JSON list or object, not 'left'"),
    "null": (b"null", "not None"),
    "broken": (b"[[0, 0,\n 1, 1", r"boxes.json are not JSON: line 2"),
    "Latin-1": ('["é"]'.encode("latin-1"), "not UTF-8"),
    "UTF-16, as PowerShell writes it": ("[[0, 0, 1, 1]]".encode("utf-16"), "save the file as UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "not UTF-8"),
    "huge": (b" " * ((1 << 20) + 1), "more than 1 MiB, and at most 1 MiB are read"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_wrong_files_are_explained(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        parse_layout(path, TOKENS)


@pytest.mark.parametrize("content", ["3", "null", '"left"', "true"])
def test_what_is_no_list_is_no_boxes_without_a_prompt_either(tmp_path: Path, content: str) -> None:
    path = tmp_path / "boxes.json"
    path.write_text(content)
    with pytest.raises(InputError, match="must be a JSON list or object, not "):
        parse_boxes_alone(path)


def test_a_missing_file_and_a_folder_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no boxes file .*nowhere\.json"):
        parse_layout(tmp_path / "nowhere.json", TOKENS)
    with pytest.raises(InputError, match="cannot be read"):
        parse_layout(tmp_path, TOKENS)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a file without an end")
def test_an_endless_file_is_refused_not_read() -> None:
    with pytest.raises(InputError, match="it is no file, but a device"):
        parse_layout("/dev/zero", TOKENS)


def test_a_box_without_an_asset_is_explained() -> None:
    with pytest.raises(InputError, match="the prompt has no asset"):
        parse_layout(json.dumps([LEFT]), [])


def test_a_layout_refuses_what_does_not_pair_up() -> None:
    box = Box(*LEFT)
    with pytest.raises(ValueError, match="2 tokens but 1 boxes"):
        Layout(("<asset0>", "<asset1>"), (box,))
    with pytest.raises(ValueError, match="repeats"):
        Layout(("<asset0>", "<asset0>"), (box, box))
    with pytest.raises(KeyError):
        Layout(("<asset0>",), (box,)).box_of("<asset1>")
