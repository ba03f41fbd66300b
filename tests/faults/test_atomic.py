"""Onto the disk first, then under its name: what a power cut or a full disk must not turn round."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mifo.errors import InputError
from mifo.io import files
from mifo.io.files import write_file, write_folder
from mifo.learning.checkpoints import Checkpointing, Checkpoints, latest


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """("flush" or "rename", inode), as they come."""
    found: list[tuple[str, int]] = []
    fsync, link, replace, put = os.fsync, os.link, os.replace, files._put

    def flush(number: Any) -> None:
        found.append(("flush", os.fstat(number).st_ino))
        fsync(number)

    def rename(source: Any, target: Any) -> None:
        found.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    def name(source: Any, target: Any, **options: Any) -> None:
        found.append(("rename", os.stat(source).st_ino))
        link(source, target, **options)

    def swap(temporary: Path, folder: Path, *more: Any) -> None:
        found.append(("rename", temporary.stat().st_ino))
        put(temporary, folder, *more)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    monkeypatch.setattr(os, "link", name)
    monkeypatch.setattr(files, "_put", swap)
    return found


@pytest.mark.parametrize("again", [False, True], ids=["new", "replacing"])
def test_every_file_is_flushed_before_its_name_and_the_name_after(tmp_path: Path, events: list[tuple[str, int]], again: bool):
    for _ in range(1 + again):
        events.clear()
        with write_file(tmp_path / "set" / "a", overwrite=True) as temporary:
            temporary.write_text("a")
        with write_folder(tmp_path / "whole", "test", overwrite=True) as temporary:
            (temporary / "inside").mkdir()
            (temporary / "inside" / "c").write_text("c")
    whole = ["whole/inside/c", "whole/inside", "whole/manifest.json", "whole"]  # the folders' lists of names too
    for folder, names in (("set", ["set/a"]), ("whole", whole)):
        written = [os.stat(tmp_path / name).st_ino for name in names]
        renamed = written if folder == "set" else [os.stat(tmp_path / folder).st_ino]
        listing = os.stat(tmp_path / "set" if folder == "set" else tmp_path).st_ino
        first = min(events.index(("rename", inode)) for inode in renamed)
        assert all(events.index(("flush", inode)) < first for inode in written)
        last = max(events.index(("rename", inode)) for inode in renamed)
        assert ("flush", listing) in events[last:]


def test_a_checkpoint_that_cannot_be_written_whole_leaves_those_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under the final name there is never half a file, not even for a moment."""
    checkpoints = Checkpoints(tmp_path / ".checkpoints" / "cups", {}, Checkpointing())
    for step in (1, 2):
        checkpoints.save({"step": step}, f"step {step}")
    before = {p.name: p.read_bytes() for p in checkpoints.folder.iterdir()}
    seen: list[set[str]] = []

    def full(number: int) -> None:
        seen.append({p.name for p in checkpoints.folder.glob("*.safetensors")})
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left"):
        checkpoints.save({"step": 3}, "step 3")
    assert seen == [set(before)] and {p.name: p.read_bytes() for p in checkpoints.folder.iterdir()} == before
    saved = latest(tmp_path / "cups")
    assert saved is not None and saved.where == "step 2"
