"""One asset learned again, or one more, into a bundle: do the others stay, is it as good, and how long does it take?

    python -m scripts.quality.measure_relearn --work relearn

Drawn scenes of three look-alikes (the benchmark's development scenes). Of each: all three learned at once; then the second
learned again into that bundle; and the first two learned, then the third added. Every bundle is evaluated on the same prompts and
seeds.
Interrupted, the same command goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from mifo import evaluate, learn, load_base_model, load_bundle, load_instance
from mifo.bundle.store import Bundle
from mifo.data.instance import Instance
from mifo.evaluation.metrics import interval
from mifo.io.json_text import json_text
from mifo.model.base import BaseModel
from mifo.toybox.examples import write_instance
from scripts.record import spread, write_result
from scripts.toybench.toybench_scenes import Cell, bench_scene

CELLS = tuple(Cell(level, 3, index, "dev") for index in (0, 1) for level in ("colors", "patterns"))
AGAIN, ADDED = 1, 2  # assets


def kept(folder: Path, make: Callable[[], Bundle]) -> Bundle:
    return load_bundle(folder) if (folder / "bundle.json").exists() else make()


def without_last(instance: Instance) -> Instance:
    return replace(instance, masks=instance.masks[:-1], words=instance.words[:-1] if instance.words else None)


def margins(work: Path, name: str, base: BaseModel, bundle: Bundle, samples: int) -> dict[str, list[float]]:
    """By asset: the identity margin wherever it was asked for, alone and in boxes, in the order of prompts and seeds."""
    file = work / f"{name}.json"
    if not file.exists():
        records = evaluate(base, bundle, samples=samples).record["pictures"]
        found: dict[str, list[float]] = {}
        for record in records:
            for asset, margin in zip(record["assets"], record["identity_margin"], strict=True):
                found.setdefault(str(asset), []).append(margin)
        file.write_text(json_text(found))
    return dict(json.loads(file.read_text()))


def measure(work: Path, cell: Cell, base: BaseModel, samples: int) -> dict[str, Any]:
    folder = work / "instances" / cell.name
    if not folder.exists():
        write_instance(bench_scene(cell), folder)
    instance, bundles = load_instance(folder), work / "bundles"
    whole = kept(bundles / f"{cell.name}-all", lambda: learn(instance, base, bundles / f"{cell.name}-all", resume=True))
    again = kept(bundles / f"{cell.name}-again", lambda: learn(
        instance, base, bundles / f"{cell.name}-again", resume=True, into=whole, only=[f"asset{AGAIN}"]))  # fmt: skip
    two = kept(bundles / f"{cell.name}-two", lambda: learn(
        without_last(instance), base, bundles / f"{cell.name}-two", resume=True))  # fmt: skip
    added = kept(bundles / f"{cell.name}-added", lambda: learn(
        instance, base, bundles / f"{cell.name}-added", resume=True, into=two, only=[f"asset{ADDED}"]))  # fmt: skip
    runs = {"all": whole, "again": again, "two": two, "added": added}
    return {"scene": cell.name, "seconds": {name: bundle.metadata["seconds"] for name, bundle in runs.items()},
            "margins": {name: margins(work, f"{cell.name}-{name}", base, bundle, samples)
                        for name, bundle in runs.items() if name != "two"}}  # fmt: skip


def change(items: Sequence[dict[str, Any]], after: str, before: str, assets: Sequence[int]) -> dict[str, Any]:
    """Mean margin before, after, and the difference picture by picture, with its interval over scenes."""
    pairs = {item["scene"]: [(b, a) for asset in assets for b, a in
                             zip(item["margins"][before][str(asset)], item["margins"][after][str(asset)], strict=True)
                             if b is not None and a is not None] for item in items}  # fmt: skip
    every = np.array([pair for found in pairs.values() for pair in found])
    return {"before": round(float(every[:, 0].mean()), 3), "after": round(float(every[:, 1].mean()), 3),
            "difference": interval({scene: [a - b for b, a in found] for scene, found in pairs.items()})}  # fmt: skip


def main(
    work: Annotated[Path, typer.Option(help="Where half-done work is kept.")],
    scenes: Annotated[int, typer.Option(help="Of the four.")] = len(CELLS),
    samples: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 3,
    name: str = "relearn",
) -> None:
    """Writes scripts/results/<name>.json."""
    work.mkdir(parents=True, exist_ok=True)
    base, items = load_base_model("toybox"), []
    for cell in CELLS[:scenes]:
        items.append(measure(work, cell, base, samples))
        print(json_text(items[-1]["seconds"]), flush=True)
    others = [k for k in range(3) if k != AGAIN]
    first = [k for k in range(3) if k != ADDED]
    numbers = {
        "again": {"others": change(items, "again", "all", others), "itself": change(items, "again", "all", [AGAIN]),
                  "share_of_time": spread([item["seconds"]["again"] / item["seconds"]["all"] for item in items])},
        "added": {"itself": change(items, "added", "all", [ADDED]), "others": change(items, "added", "all", first),
                  "share_of_time": spread([item["seconds"]["added"] / item["seconds"]["all"] for item in items])},
    }  # fmt: skip
    print(json_text(numbers, indent=1))
    print(write_result(name, {"scenes": [cell.name for cell in CELLS[:scenes]], **numbers, "items": items}))


if __name__ == "__main__":
    typer.run(main)
