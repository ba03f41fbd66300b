"""Contact sheets come in pages, and long jobs hold neither all their cells nor all their pictures."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _tiny import load_base, mifo, tiny_bundle_folder
from PIL import Image

from mifo.config import SynthesisConfig
from mifo.errors import InputError
from mifo.evaluation.cases import read_images
from mifo.io.sheets import grid, save_sheets, sheets_in, thumbnail
from mifo.synthesis import variations as scenes
from mifo.synthesis.resumable import ImageJob


def test_a_page_is_written_before_the_next_ones_cells_are_made(tmp_path: Path):
    def cells() -> Iterator[Image.Image]:
        for k in range(64 + 64 + 2):
            assert len(list(tmp_path.iterdir())) == k // 64
            yield Image.new("RGB", (8, 8), (k, 0, 0))

    paths = save_sheets(tmp_path, cells(), columns=4)
    assert [p.name for p in paths] == ["contact.png", "contact-2.png", "contact-3.png"]
    sizes = [Image.open(p).size for p in paths]
    first = grid([Image.new("RGB", (8, 8))] * 64, columns=4).size
    assert sizes == [first, first, grid([Image.new("RGB", (8, 8))] * 2, columns=2).size]
    assert Image.open(paths[1]).getpixel((6, 6)) == (64, 0, 0)


def test_pages_are_listed_in_order(tmp_path: Path):
    for number in range(2, 12):
        (tmp_path / f"contact-{number}.png").touch()
    (tmp_path / "contact.png").touch(), (tmp_path / "contact-a.png").touch()
    names = [Path(p).name for p in sheets_in(tmp_path)]
    assert names == ["contact.png", *(f"contact-{n}.png" for n in range(2, 12))]


@pytest.mark.parametrize(("size", "shown"), [((64, 64), (256, 256)), ((512, 512), (512, 512)), ((4096, 2048), (512, 256)),
                                             ((64, 4096), (8, 512))])  # fmt: skip
def test_cells_are_of_bounded_size(size: tuple[int, int], shown: tuple[int, int]):
    assert thumbnail(Image.new("RGB", size)).size == shown


def test_many_variations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """70 pictures: two pages, named in the result, in the manifest, and not taken for pictures by `evaluate --images`."""

    def drawn(base: Any, prompt: str, layout: Any, tokens: Any, config: Any, seed: int, *_: Any) -> Any:
        return SimpleNamespace(images=[Image.new("RGB", (16, 16), (seed, 0, 0))])

    monkeypatch.setattr(scenes, "synthesize", drawn)
    out = tmp_path / "out"
    facts = json.loads(mifo("variations", tiny_bundle_folder(), "--count", 70, "--output-path", out, "--json").stdout)
    assert facts["contact_sheet"] == str(out / "contact.png") and len(facts["images"]) == 70
    assert facts["contact_sheets"] == [str(out / "contact.png"), str(out / "contact-2.png")]
    assert {"contact.png", "contact-2.png"} < set(json.loads((out / "manifest.json").read_text())["files"])
    assert Image.open(out / "variation69.png").getpixel((0, 0)) == (69, 0, 0)
    (tmp_path / "prompts.txt").write_text("a photo of <asset0>\n")
    assert len(read_images(out, tmp_path / "prompts.txt", None, ["<asset0>"])) == 70
    said = mifo("variations", tiny_bundle_folder(), "--count", 70, "--output-path", tmp_path / "again").stdout
    assert f"contact sheet: {tmp_path / 'again' / 'contact.png'}, and on to contact-2.png" in said


def test_pictures_that_are_on_the_disk_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    held: list[weakref.ref[Image.Image]] = []

    def drawn(base: Any, prompt: str, layout: Any, tokens: Any, config: Any, seed: int, *_: Any) -> Any:
        image = Image.new("RGB", (16, 16), (seed, 0, 0))
        held.append(weakref.ref(image))
        assert sum(r() is not None for r in held) <= 2
        return SimpleNamespace(images=[image])

    monkeypatch.setattr(scenes, "synthesize", drawn)
    shots = [scenes.Shot(f"v{k}", "a photo", k) for k in range(6)]
    job = ImageJob(tmp_path, {})
    found = scenes.draw_shots(load_base(), shots, (), SynthesisConfig(), keep=job.images)
    assert [image.getpixel((0, 0)) for image in found.values()] == [(k, 0, 0) for k in range(6)]
    next(tmp_path.glob("item-*")).unlink()
    with pytest.raises(InputError, match="was removed or changed while the job ran"):
        list(found.values())
