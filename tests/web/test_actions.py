"""What the page's buttons do, without a browser: the jobs that they make, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _tiny import ROOT, copy_bundle
from PIL import Image

pytest.importorskip("gradio")

import gradio as gr

from mifo.jobs.job import EditJob, EvaluateJob, LearnJob, SynthesizeJob
from mifo.jobs.store import DONE
from mifo.web.canvas import Drawn
from mifo.web.draft import MAX_THINGS
from mifo.web.edit_tab import EditActions, edit_pictures
from mifo.web.learn_tab import LearnActions
from mifo.web.library_tab import LibraryActions
from mifo.web.place_tab import PlaceActions
from mifo.web.site import Site

PHOTO = ROOT / "example" / "toy_car" / "img.png"
WORDS = [""] * MAX_THINGS
LEFT, RIGHT = (0.05, 0.2, 0.45, 0.8), (0.55, 0.2, 0.95, 0.8)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    copy_bundle(tmp_path / "bundles", "desk")
    copy_bundle(tmp_path / "bundles", "shelf")
    return Site(tmp_path / "bundles", tmp_path / "output", tmp_path / "photos", tmp_path / "state")


def last_job(site: Site) -> Any:
    return site.store.entries(limit=1)[0].job


def clicked(x: float, y: float) -> str:
    """What the canvas sends after a click on the photo."""
    return json.dumps({**json.loads(Drawn("mark").to_value()), "added": {"point": [x, y]}})


def test_a_marked_photo_becomes_a_job_to_learn_it(site: Site) -> None:
    does = LearnActions(site)
    name = does.take_photo(str(PHOTO))[0]
    assert does.restore(name)[0] == name and does.restore("no draft")[0] == ""
    with pytest.raises(gr.Error, match="no thing is chosen"):
        does.take_away(name, "toybox", 0, *WORDS)
    mask = np.asarray(Image.open(PHOTO.with_name("mask0.png")).convert("L"))
    y, x = (float(inside.mean()) / side for inside, side in zip(np.nonzero(mask), mask.shape, strict=True))
    shown = does.mark(name, "toybox", clicked(x, y), *WORDS)
    assert shown[0] == name and shown[3]["choices"] == [("thing 0 (red)", 0)]
    assert len(does.draft(name).name_things([]).things) == 1, "a thing without a word was dropped"
    with pytest.raises(gr.Error, match="there is a bundle called desk already"):
        does.begin(name, "desk", "toybox", 0, 0, 0, False, 0, "red car", *WORDS[1:])
    number, _ = does.begin(name, " cars ", "", 3, 0, 40, True, 0, "red car", *WORDS[1:])
    job = last_job(site)
    assert job == LearnJob(str(site.photos / "cars"), "cars", "toybox", 3, True, None, 40, None)
    assert (site.photos / "cars" / "words.txt").read_text() == "red car\n" and number == site.store.entries(limit=1)[0].id
    does.begin(name, "cars", "toybox", 3, 0, 0, False, 0, "red car", *WORDS[1:])  # the first one's folder is left alone
    assert Path(last_job(site).instance).name.startswith("cars-")


def test_assets_in_boxes_become_a_job_to_draw_them(site: Site) -> None:
    does, text = PlaceActions(site), "a photo of <asset0> and <shelf.asset1>"
    dragged = (LEFT[0] + 1e-9, *LEFT[1:])
    drawn = Drawn("place", 1.0, (("<asset0>", dragged), ("<shelf.asset1>", RIGHT), ("<asset1>", RIGHT))).to_value()
    does.begin("desk", ["shelf"], text, drawn, 2, 5, 0, 0, 4.5, 0.5, " blurry ")
    job = last_job(site)
    assert job == SynthesizeJob(text, ("desk", "shelf"), job.boxes, 5, 2, None, None, 4.5, "blurry", contrast_scale=0.5)
    assert json.loads(job.boxes) == {"<asset0>": list(LEFT), "<shelf.asset1>": list(RIGHT)}  # of no asset that is not asked for
    does.begin("desk", [], "a photo at the beach", drawn, 2, 0, 3, 12, 0, 0, "")
    assert last_job(site) == SynthesizeJob("a photo at the beach", ("desk",), None, 0, 1, 3, 12)
    for bundle, prompt, said in (("lamp", "a photo", "no bundle is chosen"), ("desk", "a photo of <asset7>", "<asset7>"),
                                 ("desk", "a photo of <asset1> and <asset0>", "no box for <asset1>")):  # fmt: skip
        with pytest.raises(gr.Error, match=said):
            does.begin(bundle, [], prompt, Drawn("place", 1.0, (("<asset0>", LEFT),)).to_value(), 1, 0, 0, 0, 0, 0, "")


def test_a_painted_picture_becomes_a_job_to_edit_it(site: Site) -> None:
    does = EditActions(site)
    name, shown = does.take_picture(str(PHOTO))
    painted = Image.new("RGBA", shown["background"].size)
    with pytest.raises(gr.Error, match="nothing is painted yet"):
        does.begin(name, {"layers": [painted]}, "desk", "a photo of <asset0>", 2, 0, 0)
    painted.paste((230, 57, 70, 255), (0, 0, painted.width // 2, painted.height))
    does.begin(name, {"layers": [painted]}, "desk", "a photo of <asset0>", 2, 7, 0)
    job = last_job(site)
    assert job == EditJob("a photo of <asset0>", str(site.uploads / name), job.mask, ("desk",), None, 7, 2)
    mask = np.asarray(Image.open(job.mask).convert("L")) > 0
    half = mask.shape[1] // 2
    assert mask.shape[::-1] == Image.open(PHOTO).size and mask[:, :half].all() and not mask[:, half:].any()
    number = site.store.entries(limit=1)[0].id
    site.store.take()
    site.store.finish(number, DONE, {"images": [str(PHOTO)], "scores": [{"asset": 0.5}]})
    assert edit_pictures(site, number) == ([(str(PHOTO), "asset 0.50")], (job.image, str(PHOTO)))
    Path(job.image).unlink()  # as prune does
    assert edit_pictures(site, number) == ([(str(PHOTO), "asset 0.50")], None)
    with pytest.raises(gr.Error, match="no picture yet"):
        does.begin("../../secret.png", {"layers": [painted]}, "", "a car", 1, 0, 0)


def test_a_bundle_of_the_library_is_measured_renamed_and_thrown_away(site: Site) -> None:
    does = LibraryActions(site, 1)
    assert does.show("desk")[2].startswith("**desk**: `<asset0>`") and does.show("lamp") == (None, None, "", "")
    does.begin("desk", 2)
    assert last_job(site) == EvaluateJob("desk", 2)
    assert does.give_name("desk", " table ")[1]["value"] == "table"
    with pytest.raises(gr.Error, match="shelf"):
        does.give_name("table", "shelf")
    does.throw("table")
    assert sorted(p.name for p in site.bundles.iterdir() if not p.name.startswith(".")) == ["shelf"]
