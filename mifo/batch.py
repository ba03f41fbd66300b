"""Long jobs of many items: each item's result is kept as soon as it is there, one that fails does not stop the others.

Knows a journal file of JSON lines. Knows nothing of what an item is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import different_keys
from .errors import InputError
from .files import unwritable


@dataclass(frozen=True)
class BatchReport:
    """What came out, in the order of the items."""

    results: dict[str, Any]
    failures: dict[str, str]
    """item -> why"""
    reused: int
    """Results that an earlier, interrupted run had left."""

    def summary(self) -> str:
        """For people: how many, and each failure with its reason."""
        lines = [f"{len(self.results)} of {len(self.results) + len(self.failures)} items done, {self.reused} of them earlier"]
        return "\n".join([*lines, *(f"  failed: {item}: {reason}" for item, reason in self.failures.items())])


def run_items(items: Mapping[str, Callable[[], Any]], journal: Path, settings: Mapping[str, Any],
              on_progress: Callable[[int, int], None] = lambda done, total: None) -> BatchReport:  # fmt: skip
    """Calls every item that `journal` has no result of, and notes each result (plain JSON) there at once.

    Run again after an interruption, it goes on; items that failed are tried again. `settings` is everything that decides the
    results. Raises InputError when the journal is of a job with other settings, or cannot be written.
    """
    plain = json.loads(json.dumps(settings))
    known = _read(journal, plain)
    results, failures = {}, {}
    reused = sum(item in known for item in items)
    if not known:
        _append(journal, {"settings": plain}, first=True)
    for done, (item, work) in enumerate(items.items(), 1):
        if item in known:
            results[item] = known[item]
        else:
            try:
                results[item] = json.loads(json.dumps(work()))
            except Exception as error:  # the other items may well succeed; Ctrl-C is no Exception
                failures[item] = f"{type(error).__name__}: {error}" if not isinstance(error, InputError) else str(error)
            else:
                _append(journal, {"item": item, "result": results[item]})
        on_progress(done, len(items))
    return BatchReport(results, failures, reused)


def _read(journal: Path, settings: Any) -> dict[str, Any]:
    """Results by item; a line that a kill cut short is no result."""
    if not journal.exists():
        return {}
    found: dict[str, Any] = {}
    try:
        lines = journal.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{journal} cannot be read ({error.strerror}); remove it to start over") from None
    records = [r for line in lines if isinstance(r := _parse(line), dict)]
    if not records or "settings" not in records[0]:
        return {}
    if differences := different_keys(records[0]["settings"], settings):
        raise InputError(
            f"{journal} is of a job with other settings: {'; '.join(differences[:8])}; give the same ones, or remove it to "
            "start over"
        )
    for record in records[1:]:
        if isinstance(record.get("item"), str) and "result" in record:
            found[record["item"]] = record["result"]
    return found


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _append(journal: Path, record: dict[str, Any], first: bool = False) -> None:
    """One line, on the disk when this returns. It begins on a line of its own even after one that was cut short."""
    try:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("w" if first else "a", encoding="utf-8") as file:
            file.write(("" if first else "\n") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(journal, error) from None
