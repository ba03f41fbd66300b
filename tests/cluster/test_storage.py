"""Folders at addresses that strangers may write to."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from _tiny import tiny_bundle_folder

from mifo.cluster.storage import fetch, put
from mifo.errors import InputError


@pytest.mark.parametrize("name", ["../stolen.txt", "x/../../stolen.txt", "/stolen.txt"])
def test_an_object_whose_name_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    place = "memory://store/desk"
    put(tiny_bundle_folder(), place)
    fetch(place, tmp_path / "whole" / "desk")
    memory = fsspec.filesystem("memory")
    try:
        memory.pipe_file(f"/store/desk/{name}", b"")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="outside of its folder"):
            fetch(place, tmp_path / "desk")
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        memory.store.clear()
