"""toybench's items: one JSON for each scene, method and learning run, and one file of many that outlives the work folder."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mifo.io.files import write_file
from mifo.io.json_text import record_text
from scripts.toybench.toybench_scenes import Cell

Item = dict[str, Any]
ITEMS = "items"


def item_path(work: Path, cell: Cell, method: str, learning_seed: int = 0) -> Path:
    return _path(work, cell.split, cell.name, method, learning_seed)


def _path(work: Path, split: str, scene: str, method: str, learning_seed: int) -> Path:
    return work / ITEMS / split / scene / f"{method}{f'-seed{learning_seed}' if learning_seed else ''}.json"


def read_key(path: Path) -> str | None:
    """The key of the item there; none where there is none, or half of one."""
    try:
        return str(json.loads(path.read_text())["key"])
    except (OSError, ValueError, KeyError):
        return None


def write_record(path: Path, record: Item) -> None:
    """Whole or not at all: a run may be killed at any time."""
    _write(path, (record_text(record) + "\n").encode())


def load_items(work: Path, methods: Sequence[str], cells: Sequence[Cell], key_of: Callable[[Cell, str, int], str],
               learning_seeds: int = 1, paired: bool = False) -> list[Item]:  # fmt: skip
    """The items of these methods, cells and learning seeds: of those runs that all methods which have any have finished.

    `key_of`: the key that an item has now; one of other settings or another base model is left out. `paired`: all items,
    since each method is compared with this project on the scenes that the two have.
    """
    items = [json.loads(path.read_text()) for cell in cells for method in methods for seed in range(learning_seeds)
             if read_key(path := item_path(work, cell, method, seed)) == key_of(cell, method, seed)]  # fmt: skip
    runs: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for item in items:
        runs[item["method"]].add((item["scene"], item["learning_seed"]))
    shared = set.intersection(*runs.values()) if runs and not paired else set().union(*runs.values())
    return [i for i in items if (i["scene"], i["learning_seed"]) in shared]


def save_items(path: Path, items: Sequence[Item]) -> None:
    """Adds items to the file, in place of those of the same run that it has. One line an item, compressed.

    Raises ValueError for a file that is none of items.
    """
    found = {_run(item): item for item in (*(read_items(path) if path.exists() else ()), *items)}
    text = "".join(record_text(found[run]) + "\n" for run in sorted(found))
    _write(path, gzip.compress(text.encode(), mtime=0))  # the same items are the same bytes


def read_items(path: Path) -> list[Item]:
    """What `save_items` wrote. Raises ValueError for another file."""
    try:
        items = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        for item in items:
            _run(item)
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of toybench's items ({error})") from None
    return items


def _run(item: Item) -> tuple[str, str, str, int]:
    return str(item["split"]), str(item["scene"]), str(item["method"]), int(item["learning_seed"])


def restore_items(path: Path, work: Path) -> int:
    """Puts the file's items where they were measured, but for those that are there already. Returns how many it put there.

    Raises ValueError for a file that is none of items.
    """
    missing = {place: item for item in read_items(path) if read_key(place := _path(work, *_run(item))) is None}
    for place, item in missing.items():
        write_record(place, item)
    return len(missing)


def _write(path: Path, content: bytes) -> None:
    with write_file(path, overwrite=True) as temporary:
        temporary.write_bytes(content)
