"""Folders at addresses, where strangers may write too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from _tiny import tiny_base_folder, tiny_bundle_folder, write_instance

from mifo.cluster.storage import fetch, is_whole, put
from mifo.config import CompositeConfig, PriorConfig
from mifo.errors import InputError
from mifo.io.manifest import MANIFEST
from mifo.io.temporary import MARKER

PLACE = "memory://store/desk"


@pytest.fixture
def memory() -> Iterator[Any]:
    """An object store, as s3:// is one."""
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()


def contents(memory: Any) -> dict[str, bytes]:
    return {name: memory.cat_file(name) for name in memory.find("/")}


@pytest.mark.parametrize("name", ["../stolen.txt", "x/../../stolen.txt", "/stolen.txt"])
def test_an_object_whose_name_leads_out_of_its_folder_is_refused(memory: Any, tmp_path: Path, name: str) -> None:
    put(tiny_bundle_folder(), PLACE)
    fetch(PLACE, tmp_path / "whole" / "desk")
    memory.pipe_file(f"/store/desk/{name}", b"")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="outside of its folder"):
        fetch(PLACE, tmp_path / "desk")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_somebody_else_has_at_an_address_stays(memory: Any) -> None:
    memory.pipe_file("/store/desk/bundle.json", b"mine")
    memory.pipe_file("/store/notes.txt", b"mine too")
    before = contents(memory)
    with pytest.raises(InputError, match=r"has other things in it \(bundle.json\)"):
        put(tiny_bundle_folder(), PLACE)
    assert contents(memory) == before


def test_nothing_is_drawn_for_a_place_that_is_taken(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mifo.cluster.run import Worker
    from mifo.jobs.batch import Item
    from mifo.jobs.job import SynthesizeJob

    monkeypatch.setattr("mifo.cluster.run.do_item", lambda *_: pytest.fail("drawn for nothing"))
    memory.pipe_file("/store/desk/notes.txt", b"mine")
    outcome = Worker(str(tmp_path), 1).do(Item(0, SynthesizeJob("a photo of a car", output=PLACE)))
    assert outcome.state == "failed" and "notes.txt" in str(outcome.error)


def test_a_copy_that_was_broken_off_is_made_again(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_file, left = type(memory).put_file, 3

    def breaks(self: Any, *args: Any, **more: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConnectionError("gone")
        put_file(self, *args, **more)

    monkeypatch.setattr(type(memory), "put_file", breaks)
    with pytest.raises(ConnectionError):
        put(tiny_bundle_folder(), PLACE)
    assert not is_whole(PLACE) and len(memory.find("/store/desk")) == 4  # three files, and what says that they are ours
    monkeypatch.undo()
    begun = json.loads(memory.cat_file(f"/store/desk/{MARKER}"))
    for name, listed in (("mine.png", begun), ("old.png", [*begun, "old.png"])):  # somebody's own; of another bundle's first try
        memory.pipe_file(f"/store/desk/{name}", b"")
        memory.pipe_file(f"/store/desk/{MARKER}", json.dumps(listed).encode())
        before = contents(memory)
        with pytest.raises(InputError, match="has other things in it"):
            put(tiny_bundle_folder(), PLACE)
        assert contents(memory) == before
        memory.rm_file(f"/store/desk/{name}")
    put(tiny_bundle_folder(), PLACE)
    fetch(PLACE, tmp_path / "desk")
    assert not memory.exists(f"/store/desk/{MARKER}")
    memory.pipe_file(f"/store/desk/{MARKER}", b"[]")  # killed before the last step
    fetch(PLACE, tmp_path / "again")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == sorted(p.name for p in (tmp_path / "desk").iterdir())
    with pytest.raises(InputError, match="there already"):
        put(tiny_bundle_folder(), PLACE)


def test_another_photos_bundle_at_an_address_is_not_taken_for_what_was_asked_for(memory: Any, tmp_path: Path,
                                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from mifo.cluster.run import Worker
    from mifo.jobs.batch import Item
    from mifo.jobs.job import LearnJob
    from mifo.presets import learn_preset

    short = replace(learn_preset("toybox"), prior=PriorConfig(enabled=False), composites=CompositeConfig(share=0.0))
    monkeypatch.setattr("mifo.jobs.workshop.learn_preset", lambda family, assets: short)

    def learn(folder: Path, model: int = 0, **more: Any) -> Any:
        job = LearnJob(str(folder), "desk", str(tiny_base_folder(model)), phase1_train_steps=1, phase2_train_steps=1, **more)
        return Worker("memory://store", 1).do(Item(0, job))  # a new one has nothing of its own yet

    photo, other = write_instance(tmp_path / "photo"), write_instance(tmp_path / "other", assets=1)
    outcome = learn(photo)
    assert outcome.state == "done" and outcome.result["folder"] == PLACE and outcome.result["images"][0] == f"{PLACE}/preview.png"
    before = contents(memory)
    assert f"/store/desk/{MANIFEST}" in before
    assert learn(photo).state == "there"
    for asked in ({"folder": other}, {"folder": photo, "seed": 1}, {"folder": photo, "overwrite": True},
                  {"folder": photo, "model": 1}):  # fmt: skip
        refused = learn(**asked)
        assert refused.state == "failed" and "choose another name, or move it away" in refused.error
    assert contents(memory) == before
