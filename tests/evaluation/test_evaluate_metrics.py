"""The metrics on hand-made numbers whose answers are known, and the small rules around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mifo.errors import InputError
from mifo.evaluation import metrics
from mifo.evaluation.attention import leakage_shares
from mifo.evaluation.cases import default_cases, grid_layout, read_cases
from mifo.evaluation.measure import by_seed, leakage_matrix, summarize
from mifo.learning.early_stopping import KeepBest

TOKENS = ("<asset0>", "<asset1>", "<asset2>")
ALIKE = np.array([[1.0, 0.75, 0.5], [0.75, 1.0, 0.5], [0.5, 0.5, 1.0]])


@pytest.mark.parametrize("row, own, expected", [
    (ALIKE[0], 0, 1.0),  # a perfect copy, however alike the others are
    (ALIKE[1], 0, (-1.0 + (0.75 - 0.5) / 0.5) / 2),  # the other one in its place: -1 against it
    (np.full(3, 0.8), 0, 0.0),  # a blend of all
    (np.zeros(3), 2, 0.0),  # nothing there
])  # fmt: skip
def test_identity_margin_is_corrected_by_how_alike_the_sources_are(row, own, expected):
    assert metrics.identity_margin(row, own, ALIKE) == pytest.approx(expected)


def test_instances_that_cannot_be_told_apart_give_no_margin():
    twins = np.array([[1.0, 0.99], [0.99, 1.0]])
    assert metrics.identity_margin(twins[0], 0, twins) is None
    assert metrics.identity_margin(np.array([0.9]), 0, np.eye(1)) is None
    assert metrics.raw_margin(np.array([0.9]), 0) is None
    assert metrics.identity_margin(np.array([0.25, 0.0]), 0, np.array([[1, 0.75], [0.75, 1]])) == 1  # a poor copy, set apart
    assert metrics.raw_margin(np.array([0.9, 0.5, 0.1]), 0) == pytest.approx(0.6)


def test_ties_share_the_credit_and_confuse_nobody():
    tie = np.array([0.5, 0.5, 0.2])
    assert metrics.right_instance(tie, 0) == 0.5 and not metrics.is_confused(tie, 0)
    assert metrics.right_instance(tie, 2) == 0 and metrics.is_confused(tie, 2)
    assert metrics.right_instance(np.zeros(3), 0) == 0 and not metrics.is_confused(np.zeros(3), 0)


def test_detect_and_compare():
    assert metrics.detect_and_compare(ALIKE, ALIKE) == 1
    assert metrics.detect_and_compare(ALIKE[[2, 0, 1]], ALIKE) == 1  # detections come in any order
    assert metrics.detect_and_compare(ALIKE[:2], ALIKE) == 0  # one is missing
    blend = np.full((2, 2), 0.75)
    assert metrics.detect_and_compare(blend, np.array([[1, 0.5], [0.5, 1]])) == pytest.approx(0.5)  # 1 - sqrt(4 / 16)
    assert metrics.detect_and_compare(np.zeros((3, 3)), ALIKE) == 0  # never below


def test_boxes_are_matched_by_the_largest_sum_and_misses_count_nothing():
    first, second, far = (0.0, 0.0, 0.4, 0.4), (0.2, 0.0, 0.6, 0.4), (0.7, 0.7, 0.9, 0.9)
    detections = [(0.08, 0.0, 0.48, 0.4), (0.0, 0.0, 0.36, 0.4)]  # the first overlaps both, the second only one
    (a, iou_a), (b, iou_b), miss = metrics.match_boxes([first, second, far], detections)
    assert (a, b) == (1, 0) and miss == (None, 0.0)
    assert iou_a == pytest.approx(0.9) and iou_b == pytest.approx(0.28 / 0.52)
    assert metrics.match_boxes([first], []) == [(None, 0.0)] and metrics.match_boxes([], detections) == []


def test_edit_preservation_looks_outside_the_mask_only():
    before = Image.new("RGB", (8, 8), (10, 20, 30))
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 8))
    after = before.copy()
    after.paste((255, 255, 255), (0, 0, 4, 8))
    assert metrics.edit_preservation(before, after, mask) == {"largest_difference": 0, "changed_pixels": 0, "outside_pixels": 32}
    after.putpixel((6, 3), (10, 23, 29))
    found = metrics.edit_preservation(before, after, mask)
    assert (found["largest_difference"], found["changed_pixels"]) == (3, 1)


def test_intervals_draw_whole_seeds():
    alike = {seed: [value] * 50 for seed, value in enumerate([0.0, 0.0, 1.0, 1.0])}
    wide = metrics.interval(alike)
    assert wide["mean"] == 0.5 and wide["interval_95"][1] - wide["interval_95"][0] >= 0.7  # 4 things, not 200
    assert (wide["groups"], wide["values"]) == (4, 200)
    assert metrics.interval(alike) == wide
    assert metrics.interval({3: [0.25, 0.75]}) == {"mean": 0.5, "interval_95": None, "groups": 1, "values": 2}
    assert metrics.interval({})["mean"] is None
    low, high = metrics.interval({k: [k / 400] for k in range(401)})["interval_95"]
    assert 0.46 < low < 0.48 and 0.52 < high < 0.54  # mean 0.5, deviation 0.289 / sqrt(401), twice


def test_attention_leakage_on_hand_made_maps():
    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2], masks[1, :, 2:] = 1, 1
    maps = torch.stack([masks[0] * 0.5, torch.ones(4, 4)])
    maps[0, 0, 3] = 4.0  # as much as all of the inside
    outside, in_others = leakage_shares(maps, masks)
    assert outside == pytest.approx([0.5, 0.5]) and in_others == pytest.approx([0.5, 0.5])
    assert leakage_shares(maps[:1], masks[:1])[1] == [0]  # a single asset has no others


def record(seed: int, **values):
    return {"seed": seed, "in_boxes": "ious" in values, "assets": [0, 1], "leakage": [[1, 0.5], [0.25, 0.75]],
            "identity": [1, 0.75], **values}  # fmt: skip


def test_summary_by_kind_of_picture():
    records = [record(0, ious=[0.6, 0.4], count_right=True), record(1, ious=[1.0, 0.0], count_right=False),
               {**record(1), "assets": [1], "leakage": [[0.5, 0.5]], "identity": [0.5]}]  # fmt: skip
    summary = summarize(records, (0.75, 0.9))
    assert set(summary) == {"in_boxes", "alone"}
    boxes = summary["in_boxes"]
    assert boxes["iou"]["mean"] == 0.5 and boxes["success_at_0.5"]["mean"] == 0.5 and boxes["count_right"]["mean"] == 0.5
    assert boxes["collapse_below_0.75"]["mean"] == 0 and boxes["collapse_below_0.9"]["mean"] == 0.5
    assert by_seed(records, "identity") == {0: [1, 0.75], 1: [1, 0.75, 0.5]}
    assert leakage_matrix(records, 2) == [[1.0, 0.5], [0.3333, 0.6667]]
    assert leakage_matrix([], 1) == [[None]]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8])
def test_default_boxes_lie_apart_inside_the_picture_and_keep_shapes(count):
    tokens = [f"<asset{i}>" for i in range(count)]
    aspects = [(1.5, 0.6, 1.0)[i % 3] for i in range(count)]
    layouts = [grid_layout(tokens, aspects, turn) for turn in range(3)]
    for layout in layouts:
        for i, (_, box) in enumerate(layout):
            assert (box.x1 - box.x0) / (box.y1 - box.y0) == pytest.approx(aspects[i])
            assert all(box.iou(other) == 0 for _, other in list(layout)[:i])
    assert count == 1 or layouts[0] != layouts[1]  # place and identity do not coincide
    assert len(default_cases(tokens, aspects)) == 3 * count + 3


def test_cases_from_a_file(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of <asset1> and <asset0>\n\na photo of <asset1>\na beach\n")
    boxes = '{"<asset0>": [0, 0, 0.5, 0.5], "<asset1>": [0.5, 0.5, 1, 1]}'
    both, one, none = read_cases(prompts, boxes, TOKENS, [1, 1, 1])
    assert both.tokens == ["<asset1>", "<asset0>"] and one.layout.box_of("<asset1>").x0 == 0.5 and none.layout is None
    prompts.write_text("a photo of <asset7>")
    with pytest.raises(InputError, match="<asset7>"):
        read_cases(prompts, None, TOKENS, [1, 1, 1])
    prompts.write_text("\n")
    with pytest.raises(InputError, match=r"prompts\.txt is empty"):
        read_cases(prompts, None, TOKENS, [1, 1, 1])


def test_keep_best_goes_back_and_stops():
    parameter = torch.zeros(2)
    scores = iter([0.1, 0.5, 0.5, 0.3, 0.9])
    keeper = KeepBest([parameter], lambda: {"score": next(scores)}, every_steps=2, patience=2)
    stopped_at = None
    keeper.after(0, False)
    for step in range(1, 12):
        parameter += 1
        if keeper.after(step, step == 11):
            stopped_at = step
            break
    assert stopped_at == 6  # 0.5 at step 2, then a tie and a loss; 0.9 is never reached
    found = keeper.restore()
    assert found["step"] == 2 and parameter.tolist() == [2, 2]
    assert [c["score"] for c in found["checks"]] == [0.1, 0.5, 0.5, 0.3]
