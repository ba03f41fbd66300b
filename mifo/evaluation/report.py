"""What an evaluation leaves behind: evaluation.json, the pictures, a contact sheet, plots, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..io.files import write_folder
from ..io.json_text import record_text
from ..io.sheets import caption_below, draw_boxes, enlarge, save_sheets
from .plots import Bar, BarChart, MatrixChart, can_plot, save_charts
from .run import Evaluation

FILE = "evaluation.json"
KIND = "evaluation"  # of its manifest
SHOWN = ("identity", "identity_margin", "right_instance", "confused", "detect_and_compare", "iou", "success_at_0.5",
         "count_right", "prompt_fit")  # fmt: skip
KINDS = {"alone": "one asset alone", "in_boxes": "in boxes", "free": "without boxes"}


def save_evaluation(result: Evaluation, folder: Path, keep_images: bool, overwrite: bool = False) -> dict[str, str]:
    """Writes everything or nothing; with `overwrite` an earlier evaluation is replaced. Returns the paths by kind.

    Raises InputError when the folder holds something else, or cannot be written.
    """
    with write_folder(folder, KIND, overwrite) as temporary:
        if keep_images:
            (temporary / "pictures").mkdir()
            for taken in result.images:
                taken.image.save(temporary / "pictures" / taken.name, "PNG")
        save_sheets(temporary, _cells(result), columns=8)
        if with_plots := can_plot():
            save_charts(charts(result.record), temporary / "plots.png")
        (temporary / FILE).write_text(record_text(result.record, indent=1) + "\n")
    found = {"json": str(folder / FILE), "contact_sheet": str(folder / "contact.png")}
    return {**found, "plots": str(folder / "plots.png")} if with_plots else found


def _cells(result: Evaluation) -> Iterator[Image.Image]:
    """The pictures with their boxes; under each, its seed and what was measured."""
    for taken, record in zip(result.images, result.record["pictures"], strict=True):
        image = taken.image
        height = max(1, round(192 * image.height / image.width))
        large = enlarge(image, 192) if image.width < 192 else image.resize((192, height))
        large = draw_boxes(large, taken.case.layout) if taken.case.layout else large
        margins = [m for m in record["identity_margin"] if m is not None]
        shown = [f"seed {taken.seed}", *([f"margin {sum(margins) / len(margins):.2f}"] if margins else [])]
        shown += [f"IoU {sum(record['ious']) / len(record['ious']):.2f}"] if record.get("ious") else []
        yield caption_below(caption_below(large, ", ".join(shown), 12), taken.case.prompt, 11)


def charts(record: dict[str, Any]) -> list[BarChart | MatrixChart]:
    """One bar chart per kind of picture, attention leakage, and the leakage matrix beside what the source crops have."""
    found: list[BarChart | MatrixChart] = []
    for kind, title in KINDS.items():
        measured = record["summary"].get(kind, {})
        shown = [name for name in SHOWN if measured.get(name, {}).get("mean") is not None]
        bars = [_bar(name.replace("_", " "), measured[name]) for name in shown]
        if bars:
            found.append(BarChart(f"{record['bundle']}: {title}, {measured['pictures']} pictures", bars, (-0.25, 1.0)))
    leaks = [Bar(f"{token} {name}", value, color=k)
             for k, (name, key) in enumerate((("outside", "attention_outside"), ("in others", "attention_in_others")))
             for token, value in record[key].items()]  # fmt: skip
    found.append(BarChart("attention outside its own mask, and inside the others'", leaks))
    names = [t.strip("<>") for t in record["tokens"]]
    found.append(MatrixChart("crop of asset i (row) against instance j", record["leakage_matrix"], names, names))
    found.append(MatrixChart("the source crops among themselves", record["source_similarity"], names, names))
    return found


def _bar(label: str, entry: dict[str, Any]) -> Bar:
    low, high = entry["interval_95"] or (None, None)
    return Bar(label, entry["mean"], low, high)


def table(record: dict[str, Any]) -> str:
    """Lines for the terminal: a row per measurement, a column per kind of picture."""
    kinds = [k for k in KINDS if k in record["summary"]]
    width = 26
    lines = [f"{'':20}" + "".join(f"{KINDS[k]:>{width}}" for k in kinds)]
    names = [*SHOWN, *(n for n in record["summary"][kinds[0]] if n.startswith("collapse"))] if kinds else []
    for name in names:
        cells = [said(record["summary"][k].get(name)) for k in kinds]
        if any(c != "-" for c in cells):
            lines.append(f"{name.replace('_', ' '):20}" + "".join(f"{c:>{width}}" for c in cells))
    lines.append(f"{'drift':20}{said(record['drift']):>{width}}")
    for token, outside in record["attention_outside"].items():
        inside = record["attention_in_others"][token]
        shares = f"{100 * outside:.0f} % of its attention is outside its mask, {100 * inside:.0f} % inside the others'"
        lines.append(f"{token}: {shares}")
    if "edit_preservation" in record:
        edit = record["edit_preservation"]
        lines.append(f"edit: largest difference outside the mask {edit['largest_difference']} of 255, "
                     f"{edit['changed_pixels']} of {edit['outside_pixels']} pixels changed")  # fmt: skip
    return "\n".join(lines)


def said(entry: dict[str, Any] | None) -> str:
    """'0.82 (0.75 to 0.88)'"""
    if not entry or entry["mean"] is None:
        return "-"
    low_high = entry["interval_95"]
    return f"{entry['mean']:.2f}" + (f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else "")
