"""Which bundles there are, and what a person wants to know of each; no weights are read, and no PyTorch is needed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..io.read_files import read_regular

RECORD = "bundle.json"  # of a bundle: what it is, in words and numbers
MAX_RECORD_BYTES = 1 << 22
MAX_BUNDLES = 10_000


@dataclass(frozen=True)
class Entry:
    """A bundle by its record. Where `problem` says something, the rest is empty."""

    name: str
    folder: str
    tokens: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    base: str = ""
    learned: str = ""
    """When it was written, local time, YYYY-MM-DD HH:MM."""
    mib: float = 0.0
    """Of all of its files."""
    seconds: float | None = None
    """That learning took."""
    attention_inside_mask: float | None = None
    """Mean over the assets, 0 to 1."""
    preview: str | None = None
    evaluation: str | None = None
    """The newest `evaluation.json` below the output folder that was given."""
    problem: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def list_bundles(folder: Path, output: Path | None = None) -> list[Entry]:
    """Every bundle in `folder`, by name; a damaged one with what is wrong. `output`: where `evaluate` writes.

    Raises InputError where the folder cannot be read. One that does not exist has none.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())[:MAX_BUNDLES]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read ({error.strerror}); give the folder that holds the bundles") from None
    return [describe(folder / name, output) for name in names if os.path.lexists(folder / name / RECORD)]


def describe(folder: Path, output: Path | None = None) -> Entry:
    """One bundle; never raises for what is in it."""
    name = folder.name
    try:
        record = json.loads(read_regular(folder / RECORD, MAX_RECORD_BYTES))
        tokens = tuple(str(t) for t in record["tokens"])
        words = tuple(str(w) for w in record.get("words") or ())
        shares = [float(v) for v in (record.get("attention_inside_mask") or {}).values()]
        base, seconds = str(record["base"]["name"])[:200], record.get("seconds")
        written = os.stat(folder / RECORD).st_mtime
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Entry(name, str(folder), problem=f"its {RECORD} cannot be read ({type(error).__name__})")
    preview = folder / "preview.png"
    return Entry(name, str(folder), tokens, words, base, datetime.fromtimestamp(written).strftime("%Y-%m-%d %H:%M"),
                 round(bytes_in(folder) / 2**20, 1), float(seconds) if isinstance(seconds, int | float) else None,
                 round(sum(shares) / len(shares), 2) if shares else None, str(preview) if preview.is_file() else None,
                 _evaluation(output / name) if output else None)  # fmt: skip


def bytes_in(folder: Path) -> int:
    """Of all files below it."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


def _evaluation(folder: Path) -> str | None:
    try:
        found = [p for p in folder.glob("*/evaluation.json") if p.is_file()]
        return str(max(found, key=lambda p: p.stat().st_mtime)) if found else None
    except OSError:
        return None
