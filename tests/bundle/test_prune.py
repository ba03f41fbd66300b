"""What prune removes, and above all what it leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from _tiny import copy_bundle, mifo

from mifo.bundle.prune import leftovers
from mifo.bundle.shelf import rename_bundle, throw_away
from mifo.errors import InputError
from mifo.io.lock import hold_lock

OLD = time.time() - 60 * 86400


def aged(path: Path, content: bytes = b"x" * 2048) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (OLD, OLD))
    return path


def state(path: Path) -> Path:
    from mifo.io.tensor_file import write_state

    path.parent.mkdir(parents=True, exist_ok=True)
    write_state(path, {"step": 1}, "phase 1", {})
    os.utime(path, (OLD, OLD))
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    bundles = tmp_path / "Model_ours"
    state(bundles / ".checkpoints" / "desk" / "00000050.safetensors")
    aged(bundles / ".prior" / f"{'a' * 20}.safetensors")
    state(tmp_path / "output" / "desk" / ".checkpoints" / "evaluate-1" / f"item-{'b' * 32}.safetensors")
    return tmp_path


def test_nothing_goes_without_delete_and_then_only_what_is_ours_and_old(place: Path) -> None:
    mine = aged(place / "Model_ours" / ".checkpoints" / "desk" / "notes.txt")
    other = aged(place / "Model_ours" / ".prior" / "holiday.safetensors")
    alike = aged(place / "Model_ours" / ".checkpoints" / "lamp" / "00000001.safetensors")  # ours by its name alone
    fresh = place / "Model_ours" / ".checkpoints" / "shelf" / "00000050.safetensors"
    fresh.parent.mkdir()
    fresh.write_bytes(b"x")
    before = sorted(place.rglob("*"))
    assert "3 " not in mifo("prune").stdout.split("\n")[0] and sorted(place.rglob("*")) == before
    mifo("prune", "--delete")
    files = {p.relative_to(place) for p in place.rglob("*") if p.is_file()}
    assert files == {p.relative_to(place) for p in (mine, other, alike, fresh)}


def test_uploads_go_once_no_job_needs_them(place: Path) -> None:
    """Of the page and of the service; a picture that a job waits for stays, and so does what nobody uploaded."""
    from mifo.jobs.job import EditJob, LearnJob
    from mifo.jobs.store import DONE, JobStore
    from mifo.jobs.uploads import SERVE_STATE, WEB_STATE, new_photo, new_upload
    from mifo.jobs.worker import LIST

    web, serve = place / WEB_STATE, place / SERVE_STATE
    image, mask, gone, fresh = (new_upload(web, ending) for ending in (".png", "-mask.png", ".jpg", ".png"))
    waiting, learned, shared = new_photo(serve), new_photo(serve), new_photo(serve)
    parts = (folder / name for folder in (waiting, learned, shared) for name in ("img.png", "mask0.png"))
    for path in (image, mask, gone, *parts):
        aged(path)
    fresh.write_bytes(b"x")
    mine = [aged(web / "uploads" / "holiday.png"), aged(shared / "notes.txt"), aged(serve / "photos" / "holiday" / "img.png")]
    before = sorted(place.rglob("*"))
    mifo("prune", "--delete", "--older-than", 90)
    mifo("prune")
    assert sorted(place.rglob("*")) == before  # without a list of jobs, too
    page, service = JobStore(web / LIST), JobStore(serve / LIST)
    page.add(EditJob("a car", str(image), str(mask)))
    done = page.add(EditJob("a car", str(gone), str(gone)))
    page.take(), page.take()
    page.finish(done, DONE, {})
    service.add(LearnJob(str(waiting), "cups"))
    listed = mifo("prune").stdout
    assert listed.count("upload ") == 3 and str(gone.name) in listed and str(image.name) not in listed
    mifo("prune", "--delete")
    left = {p for folder in (web / "uploads", serve / "photos") for p in folder.rglob("*") if p.is_file()}
    assert left == {image, mask, fresh, waiting / "img.png", waiting / "mask0.png", *mine}
    assert not learned.exists()


def test_a_run_that_works_keeps_its_state(place: Path) -> None:
    folder = place / "Model_ours" / ".checkpoints" / "desk"
    with hold_lock(folder, "learning", "wait"):
        result = mifo("prune", "--delete")
    assert "stays" in result.stdout and (folder / "00000050.safetensors").exists()


def test_small_ones_can_be_left(place: Path) -> None:
    assert leftovers(place / "Model_ours", place / "output", larger_than_mib=1) == []
    assert len(leftovers(place / "Model_ours", place / "output")) == 3


def test_bundles_go_by_way_of_the_trash(place: Path) -> None:
    bundle = copy_bundle(place / "Model_ours", "cups")
    with pytest.raises(InputError, match="cannot name a bundle"):
        rename_bundle(bundle, "../cups")
    copy_bundle(place / "Model_ours", "taken")
    with pytest.raises(InputError, match="a folder has this name"):
        rename_bundle(bundle, "taken")
    renamed = rename_bundle(bundle, "mugs")
    assert (renamed / "bundle.json").exists() and not bundle.exists()
    first, second = throw_away(renamed), throw_away(copy_bundle(place / "Model_ours", "mugs"))
    assert first != second and (first / "bundle.json").exists()
    (second / "mine.txt").write_text("a note")  # somebody's own: the folder is not ours any more
    bundles, output = place / "Model_ours", place / "output"
    assert not [e for e in leftovers(bundles, output) if e.kind == "trash"]  # thrown away just now: it may be wanted back
    (thrown,) = (e for e in leftovers(bundles, output, older_than_days=0) if e.kind == "trash")
    size = sum(p.stat().st_size for p in first.rglob("*") if p.is_file())
    assert thrown.path == first and thrown.mib == pytest.approx(size / 2**20) and 0 <= thrown.days < 1
    mifo("prune", "--older-than", "0", "--delete")
    assert not first.exists() and (second / "mine.txt").exists() and (second / "bundle.json").exists()
    link = place / "Model_ours" / "link"
    link.symlink_to(place / "Model_ours" / "taken")
    with pytest.raises(InputError, match="it is a link"):
        throw_away(link)
