"""Jobs of many items go on where they were interrupted, and say in the end what failed and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mifo.batch import run_items
from mifo.errors import InputError

SETTINGS = {"seed": 0, "steps": (1, 2)}


def job(calls: list[str], broken: tuple[str, ...] = (), killed_at: str = "") -> dict[str, Any]:
    def item(name: str) -> Any:
        def work() -> dict[str, Any]:
            calls.append(name)
            if name == killed_at:
                raise KeyboardInterrupt
            if name in broken:
                raise InputError("no such mask") if name == "b" else ZeroDivisionError("by zero")
            return {"name": name, "value": len(name) / 3}

        return work

    return {name: item(name) for name in "abcd"}


def test_an_interrupted_job_does_each_item_once(tmp_path: Path):
    journal, calls = tmp_path / "new" / "journal.jsonl", []
    with pytest.raises(KeyboardInterrupt):
        run_items(job(calls, killed_at="c"), journal, SETTINGS)
    again = run_items(job(calls), journal, SETTINGS)
    whole = run_items(job([]), tmp_path / "other.jsonl", SETTINGS)
    assert calls == ["a", "b", "c", "c", "d"] and again.reused == 2
    assert again.results == whole.results and list(again.results) == list("abcd")


def test_failures_are_reported_and_tried_again(tmp_path: Path):
    journal, calls = tmp_path / "journal.jsonl", []
    report = run_items(job(calls, broken=("b", "d")), journal, SETTINGS)
    assert report.failures == {"b": "no such mask", "d": "ZeroDivisionError: by zero"} and list(report.results) == ["a", "c"]
    assert report.summary().splitlines() == [
        "2 of 4 items done, 0 of them earlier", "  failed: b: no such mask", "  failed: d: ZeroDivisionError: by zero",
    ]  # fmt: skip
    assert run_items(job(calls), journal, SETTINGS).failures == {} and calls == [*"abcd", *"bd"]


def test_a_journal_cut_short_at_any_byte_gives_the_same_results(tmp_path: Path):
    journal = tmp_path / "journal.jsonl"
    whole = run_items(job([]), journal, SETTINGS).results
    content = journal.read_bytes()
    for length in range(len(content)):
        journal.write_bytes(content[:length])
        for _ in range(2):
            assert run_items(job([]), journal, SETTINGS).results == whole


def test_a_job_with_other_settings_is_refused(tmp_path: Path):
    journal = tmp_path / "journal.jsonl"
    run_items(job([]), journal, SETTINGS)
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        run_items(job([]), journal, {**SETTINGS, "seed": 1})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        run_items(job([]), tmp_path / "file" / "journal.jsonl", SETTINGS)
