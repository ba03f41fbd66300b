"""Nothing is replaced but what we wrote ourselves and were asked to replace; a kill at any moment leaves the old or the new."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from _tiny import snapshot

from mifo.errors import InputError
from mifo.io import swap
from mifo.io.files import check_writable, write_file, write_folder
from mifo.io.lock import hold_lock
from mifo.io.manifest import MANIFEST, Manifest, foreign_entries, is_ours, read_manifest, remove_ours
from mifo.io.outputs import check_apart, numbered_file, numbered_folder
from mifo.io.swap import finish_swaps
from mifo.io.temporary import ABANDONED_AFTER, MARKER, owner, remove_abandoned, temporary_folder

LONG_AGO = time.time() - ABANDONED_AFTER - 10


def write(folder: Path, text: str, overwrite: bool = False, kind: str = "test") -> None:
    with write_folder(folder, kind, overwrite) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "a.txt").write_text(text)
        (temporary / "b.txt").write_text(text)


def text_of(folder: Path) -> str:
    """Both files have it, or it is nobody's whole."""
    texts = {(folder / name).read_text() for name in ("inside/a.txt", "b.txt")}
    assert len(texts) == 1 and is_ours(folder)
    return texts.pop()


def refused(place: Path, message: str, job: Callable[[], object]) -> None:
    before = snapshot(place)
    with pytest.raises(InputError, match=message):
        job()
    assert snapshot(place) == before


# --- what is ours -------------------------------------------------------------------------------


def test_what_we_wrote_is_replaced_when_asked_and_not_before(tmp_path: Path):
    write(tmp_path / "x", "old")
    refused(tmp_path, "holds an earlier run's test; give --overwrite", lambda: write(tmp_path / "x", "new"))
    write(tmp_path / "x", "new", overwrite=True)
    assert text_of(tmp_path / "x") == "new" and os.listdir(tmp_path) == ["x"]
    manifest = read_manifest(tmp_path / "x")
    assert manifest is not None and sorted(manifest.files) == ["b.txt", "inside/a.txt"] and manifest.kind == "test"
    other = "holds an earlier run's test, and would be replaced by another kind of results"
    refused(tmp_path, other, lambda: write(tmp_path / "x", "other", True, "picture"))
    (tmp_path / "x" / "b.txt").unlink()  # what somebody took away is no loss
    write(tmp_path / "x", "newest", overwrite=True)
    assert text_of(tmp_path / "x") == "newest"


SPOILS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a file": ("notes.txt", lambda f: (f / "notes.txt").write_text("mine")),
    "a hidden file deep inside": ("inside/.note", lambda f: (f / "inside" / ".note").write_text("mine")),
    "a folder": ("photos/me.jpg", lambda f: ((f / "photos").mkdir(), (f / "photos" / "me.jpg").touch())),
    "an empty folder": ("photos/", lambda f: (f / "photos").mkdir()),
    "a changed file": (r"b\.txt \(changed\)", lambda f: (f / "b.txt").write_text("abc")),
    "a changed file of the same size": (r"b\.txt \(changed\)", lambda f: (f / "b.txt").write_text("odl")),
    "a link in place of a file": (r"b\.txt \(changed\)",
                                  lambda f: ((f / "b.txt").rename(f.parent / "b"), (f / "b.txt").symlink_to(f.parent / "b"))),
    "a link to a folder": ("link", lambda f: (f / "link").symlink_to("/")),
    "a pipe": ("pipe", lambda f: os.mkfifo(f / "pipe")),
    "a manifest of somebody else": ("b.txt, inside/a.txt, manifest.json",
                                    lambda f: (f / "manifest.json").write_text('{"name": "web extension"}')),
    "a manifest with a note": ("b.txt", lambda f: (f / "manifest.json").write_text(
        json.dumps({**json.loads((f / "manifest.json").read_text()), "note": "mine"}))),
    "no manifest, as of old": ("b.txt", lambda f: (f / "manifest.json").unlink()),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILS)
def test_what_is_not_ours_is_named_and_never_replaced(tmp_path: Path, how: str):
    write(tmp_path / "x", "old")
    name, spoil = SPOILS[how]
    spoil(tmp_path / "x")
    for overwrite in (False, True):
        refused(tmp_path, rf"would be replaced.*{name}|\(.*{name}.* and would be replaced",
                lambda overwrite=overwrite: write(tmp_path / "x", "new", overwrite))  # fmt: skip


def test_a_file_that_comes_while_the_new_one_is_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before the swap, and at the very last moment, after the last look."""
    write(tmp_path / "x", "old")

    def slow() -> None:
        with write_folder(tmp_path / "x", "test", overwrite=True) as temporary:
            (temporary / "b.txt").write_text("new")
            (tmp_path / "x" / "mine").write_text("mine")

    with pytest.raises(InputError, match=r"would be replaced.*mine"):
        slow()
    (tmp_path / "x" / "mine").unlink()
    for exchange in (swap.exchange, lambda first, second: False):

        def late(first: Path, second: Path, exchange: Callable[[Path, Path], bool] = exchange) -> bool:
            if not (tmp_path / "x" / "mine").exists():
                (tmp_path / "x" / "mine").write_text("mine")
            return exchange(first, second)

        monkeypatch.setattr(swap, "exchange", late)
        with pytest.raises(InputError, match=r"x would be replaced.*mine"):
            write(tmp_path / "x", "new", overwrite=True)
        assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x" / "mine").read_text() == "mine"
        (tmp_path / "x" / "mine").unlink()
        assert text_of(tmp_path / "x") == "old"


def test_removing_what_is_ours_leaves_the_rest(tmp_path: Path):
    write(tmp_path / "x", "old")
    (tmp_path / "x" / "inside" / "mine").write_text("mine")
    (tmp_path / "x" / "b.txt").write_text("changed")
    remove_ours(tmp_path / "x")
    assert foreign_entries(tmp_path / "x") == ["b.txt (changed)", "inside/mine"]


def test_a_strangers_manifest_leads_nobody_out_of_the_folder(tmp_path: Path):
    """Its paths went up and out, and with the right digests what lay there was removed."""
    folder, mine = tmp_path / "results", tmp_path / "mine.txt"
    folder.mkdir()
    mine.write_text("mine")
    listed = (4, hashlib.sha256(b"mine").hexdigest())
    for name in ("../mine.txt", str(mine), "a/../../mine.txt"):
        (folder / MANIFEST).write_bytes(Manifest("synthesis", {name: listed}).to_bytes())
        assert read_manifest(folder) is None and not is_ours(folder)
        remove_ours(folder)
        assert mine.read_text() == "mine" and (folder / MANIFEST).exists()


def test_the_folder_that_somebody_works_in_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, r"is the folder that you work in.* such as .*0001", lambda: write(Path("."), "new"))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new")
    assert text_of(tmp_path / "empty") == "new"


def test_a_file_that_exists_is_replaced_when_asked_and_links_and_devices_never(tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "lost").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")

    def to(name: str, overwrite: bool) -> None:
        with write_file(tmp_path / name, overwrite) as temporary:
            temporary.write_text("new")

    refused(tmp_path, "exists already; give --overwrite", lambda: to("mine", False))
    for name in ("link", "lost", "pipe"):
        with pytest.raises(InputError, match="is a link or a device"):
            to(name, True)
    to("mine", True)
    assert (tmp_path / "mine").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["link", "lost", "mine", "pipe"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the file system knows no hard links."""
    from mifo.io import files

    for attempt in range(2):
        if attempt:
            monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(95, "not supported")))
        (tmp_path / "x").unlink(missing_ok=True)
        with write_file(tmp_path / "x") as temporary:
            temporary.write_text("new")
        assert (tmp_path / "x").read_text() == "new"
        monkeypatch.setattr(files, "check_free", lambda path, overwrite: None)
        with pytest.raises(InputError), write_file(tmp_path / "x") as temporary:
            temporary.write_text("newer")
        assert (tmp_path / "x").read_text() == "new" and os.listdir(tmp_path) == ["x"]
        monkeypatch.undo()


# --- half-written -------------------------------------------------------------------------------


def test_only_our_own_abandoned_folders_are_removed(tmp_path: Path):
    """By the name, by the marker inside with the same number, and when the process is gone; by the name alone what is empty."""
    kept = [".x.partial", ".mifo-0123456789abcdef.partial", ".mifo-1123456789abcdef.partial", ".mifo-2123456789abcdef.partial",
            ".mifo-3123456789abcdef.old", ".mifo-4123456789abcdef.partial", ".mifo-xyz.partial"]  # fmt: skip
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    gone = {**owner(""), "pid": 2**22 + 5}  # above what the system gives out
    (tmp_path / kept[2] / MARKER).write_text(json.dumps({**gone, "token": "another"}))
    (tmp_path / kept[3] / MARKER).write_text(json.dumps(owner("2123456789abcdef")))  # we are still running
    (tmp_path / kept[5] / MARKER).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text(json.dumps({**gone, "token": "4123456789abcdef"}))
    (tmp_path / kept[6] / MARKER).write_text(json.dumps({**gone, "token": "xyz"}))
    (tmp_path / ".mifo-5123456789abcdef.partial").symlink_to("elsewhere")
    ours = [tmp_path / ".mifo-a123456789abcdef.partial", tmp_path / ".mifo-b123456789abcdef.partial"]
    ours[0].mkdir()
    (ours[0] / MARKER).write_text(json.dumps({**gone, "token": "a123456789abcdef"}))
    write(tmp_path / "x", "replaced")
    (tmp_path / "x").rename(ours[1])  # as a kill after an exchange leaves the old one
    ours += [tmp_path / ".mifo-c123456789abcdef.partial", tmp_path / ".mifo-d123456789abcdef.partial"]
    for path in ours[2:]:  # as a kill leaves them before the marker is there, and before it is written
        path.mkdir()
    (ours[3] / MARKER).touch()
    before = {name: content for name, content in snapshot(tmp_path).items() if not name.startswith(tuple(p.name for p in ours))}
    remove_abandoned(tmp_path)
    assert all(path.exists() for path in ours), "they could be those of a run that goes on"
    for path in tmp_path.iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)
    write(tmp_path / "y", "new")
    shutil.rmtree(tmp_path / "y")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("at", range(6))
def test_a_kill_while_a_temporary_folder_is_removed_leaves_what_the_next_run_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    """What it is known by goes last, and an empty one is known by its name: there is no moment in between."""
    removed = 0

    def dying(remove: Callable[..., None]) -> Callable[..., None]:
        def counting(*given: object, **options: object) -> None:
            nonlocal removed
            if removed == at:
                raise KeyboardInterrupt
            removed += 1
            remove(*given, **options)

        return counting

    with suppress(KeyboardInterrupt), temporary_folder(tmp_path) as temporary:
        (temporary / "more").mkdir()
        for name in ("half", "zero", "more/half"):
            (temporary / name).write_text("half a file")
        for name in ("unlink", "rmdir"):
            monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [temporary.name]
    monkeypatch.setattr("mifo.io.temporary.is_running", lambda who: False)
    remove_abandoned(tmp_path, after=-1)
    assert os.listdir(tmp_path) == []


def test_a_temporary_folder_that_cannot_be_removed_yet_keeps_its_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unlink = os.unlink

    def busy(path: Any, **options: Any) -> None:
        if str(path).endswith("open"):
            raise PermissionError("another program has it open")
        unlink(path, **options)

    with temporary_folder(tmp_path) as temporary:
        (temporary / "open").touch()
        monkeypatch.setattr(os, "unlink", busy)
    monkeypatch.undo()
    assert sorted(os.listdir(temporary)) == [MARKER, "open"]
    monkeypatch.setattr("mifo.io.temporary.is_running", lambda who: False)
    remove_abandoned(tmp_path, after=-1)
    assert os.listdir(tmp_path) == []


def test_a_temporary_folder_that_was_exchanged_for_another_takes_nothing_with_it(tmp_path: Path):
    with temporary_folder(tmp_path) as temporary:
        temporary.rename(tmp_path / "moved")
        temporary.mkdir()
        (temporary / "mine").write_text("mine")
    assert sorted(os.listdir(tmp_path)) == sorted([temporary.name, "moved"]) and (temporary / "mine").exists()


def _killed(folder: Path, at: int) -> None:
    """Replaces `folder` where nothing can be exchanged, and dies before the step `at` of the swap."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a command that an earlier test ran in this process may have its own
    calls = 0

    def counted(step: Callable[..., object]) -> Callable[..., object]:
        def counting(*given: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*given, **options)

        return counting

    swap.exchange = lambda first, second: False  # type: ignore[assignment]
    swap._write_flushed = counted(swap._write_flushed)  # type: ignore[assignment]
    swap.flush_names = counted(swap.flush_names)  # type: ignore[assignment]
    swap.remove_ours = counted(swap.remove_ours)  # type: ignore[assignment]
    replace_by = swap._in_two_steps

    def watched(*given: object) -> None:
        os.rename = counted(os.rename)  # type: ignore[assignment]
        Path.unlink = counted(Path.unlink)  # type: ignore[assignment,method-assign]
        replace_by(*given)  # type: ignore[arg-type]

    swap._in_two_steps = watched
    write(folder, "new", overwrite=True)
    os.kill(os.getpid(), signal.SIGTERM)  # it was never reached


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("reader", ["reading", "writing"])
def test_without_exchange_a_kill_between_any_two_steps_leaves_the_old_or_the_new(tmp_path: Path, reader: str):
    seen = []
    for at in range(1, 40):
        place = tmp_path / str(at)
        write(place / "x", "old")
        process = multiprocessing.get_context("fork").Process(target=_killed, args=(place / "x", at))
        process.start()
        process.join()
        if process.exitcode == -signal.SIGTERM:
            break
        assert process.exitcode == -signal.SIGKILL
        if reader == "reading":
            finish_swaps(place)
        else:
            with pytest.raises(InputError, match="give --overwrite"):
                write(place / "x", "other")
        seen.append(text_of(place / "x"))
        assert not [p for p in os.listdir(place) if p.endswith((".swap", ".old"))]
        for path in place.iterdir():
            os.utime(path, (LONG_AGO, LONG_AGO))
        remove_abandoned(place)
        assert os.listdir(place) == ["x"]
    assert len(seen) >= 6 and seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_a_journal_of_somebody_else_moves_nothing(tmp_path: Path):
    gone = {**owner("x"), "pid": 2**22 + 5}
    names = {"new": ".mifo-a123456789abcdef.partial", "old": ".mifo-b123456789abcdef.old"}
    (tmp_path / names["old"]).mkdir()
    (tmp_path / names["old"] / "mine").write_text("mine")
    for number, record in enumerate((
        {**gone, **names, "folder": "../elsewhere"}, {**gone, **names, "folder": ".."}, {**gone, **names, "old": "photos"}, gone,
    )):  # fmt: skip
        (tmp_path / f".mifo-{number}123456789abcdef.swap").write_text(json.dumps(record))
    os.mkfifo(tmp_path / ".mifo-9123456789abcdef.swap")
    before = sorted(os.listdir(tmp_path))
    finish_swaps(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before


# --- the lock -----------------------------------------------------------------------------------


LOCKS: dict[str, Callable[[Path, Path], object]] = {
    "a link": lambda lock, mine: lock.symlink_to(mine),
    "a dangling link": lambda lock, mine: lock.symlink_to(mine.parent / "nowhere"),
    "a hard link": lambda lock, mine: os.link(mine, lock),
    "a file of the user": lambda lock, mine: lock.write_text("combination: 1234"),
    "a pipe": lambda lock, mine: os.mkfifo(lock),
    "a folder": lambda lock, mine: lock.mkdir(),
}


@pytest.mark.parametrize("kind", LOCKS)
def test_what_is_no_lock_of_ours_is_neither_followed_nor_changed(tmp_path: Path, kind: str):
    mine = tmp_path / "mine"
    mine.write_text("1234\n" if kind == "a hard link" else "mine")
    folder = tmp_path / ".checkpoints" / "cups"
    folder.mkdir(parents=True)
    LOCKS[kind](folder / "lock", mine)
    before = snapshot(tmp_path)
    started = time.monotonic()
    with pytest.raises(InputError, match=r"lock .*is left alone; move it away"), hold_lock(folder, "learning", "wait"):
        pytest.fail("went on")
    assert snapshot(tmp_path) == before and time.monotonic() - started < 5
    assert os.path.lexists(folder / "lock")


def test_a_lock_that_is_made_and_removed_for_ever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mifo.io.lock._is_still", lambda path, file: False)
    monkeypatch.setattr("mifo.io.lock.time.sleep", lambda seconds: None)
    with pytest.raises(InputError, match="could not be locked in 200 tries"), hold_lock(tmp_path / "x", "learning", "wait"):
        pytest.fail("went on")


# --- numbers ------------------------------------------------------------------------------------


def test_each_run_takes_the_next_number_and_gives_it_back_when_it_fails(tmp_path: Path):
    place = tmp_path / "output" / "desk"
    for number in ("0001", "0002"):
        with numbered_folder(None, place) as folder:
            assert folder == place / number
            write(folder, number)
    with pytest.raises(ValueError), numbered_folder(None, place):
        raise ValueError
    assert sorted(os.listdir(place)) == ["0001", "0002"]
    (place / "0007").write_text("mine")
    (place / "00000000000000000009").mkdir()
    with numbered_folder(None, place) as folder:
        assert folder.name == "0008"
    with numbered_folder(tmp_path / "given", place) as folder:
        assert folder == tmp_path / "given"
    with pytest.raises(ValueError), numbered_folder(None, tmp_path / "new" / "deep"):
        raise ValueError
    assert not (tmp_path / "new").exists()


def test_numbered_files(tmp_path: Path):
    for number in ("0001", "0002"):
        with numbered_file(None, tmp_path, "boxes", ".png", False) as (path, ours), write_file(path, ours) as temporary:
            temporary.write_text(number)
    with pytest.raises(ValueError), numbered_file(None, tmp_path, "boxes", ".png", False):
        raise ValueError
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"boxes-0001.png": "0001", "boxes-0002.png": "0002"}


def _many(place: Path, word: str) -> None:
    for _ in range(20):
        with numbered_folder(None, place) as folder:
            write(folder, word)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_runs_at_once_never_share_a_number(tmp_path: Path):
    workers = [multiprocessing.get_context("fork").Process(target=_many, args=(tmp_path / "p", word)) for word in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    words = [text_of(folder) for folder in (tmp_path / "p").iterdir()]
    assert sorted(words) == ["a"] * 20 + ["b"] * 20


# --- apart from the inputs ----------------------------------------------------------------------


def test_outputs_that_are_inputs_are_seen_through_links_and_second_names(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "mask.png").touch()
    os.link(photos / "mask.png", tmp_path / "second.png")
    (tmp_path / "link").symlink_to("photos")
    read = {"--mask": photos / "mask.png", "--boxes": "[[0, 0, 1, 1]]", "--image": None, "--long": "x" * 5000, "--zero": "a\0b"}
    for output in (photos / "mask.png", tmp_path / "second.png", tmp_path / "link" / "mask.png", photos, tmp_path / "link",
                   tmp_path, photos / ".." / "photos" / "mask.png"):  # fmt: skip
        with pytest.raises(InputError, match=r"--output-path is .*, which (is|holds) --mask"):
            check_apart(output, tmp_path, read, {})
    for output in (photos / "other.png", tmp_path / "new" / "deep", None):
        check_apart(output, tmp_path, read, {})
    for output in (photos, photos / "new" / "deep", tmp_path / "link" / "new"):
        with pytest.raises(InputError, match=r"(lies in|is|holds) the instance"):
            check_apart(output, tmp_path, {}, {"the instance": photos})
    with pytest.raises(InputError, match="lies in the bundle"):
        check_apart(None, photos / "output", {}, {"the bundle": str(photos)})


def test_letter_case_is_seen_through_where_the_file_system_does_not_tell_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Imitated: this machine's file system may well tell it."""
    (tmp_path / "photos").mkdir()
    real = os.path.samefile
    monkeypatch.setattr(os.path, "samefile", lambda a, b: real(*(str(p).replace("PHOTOS", "photos") for p in (a, b))))
    with pytest.raises(InputError, match="lies in the instance"):
        check_apart(tmp_path / "PHOTOS" / "out", tmp_path, {}, {"the instance": tmp_path / "photos"})


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path):
    check_writable(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path) == []
