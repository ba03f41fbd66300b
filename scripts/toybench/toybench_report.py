"""toybench's items as one JSON, one Markdown table and one figure, with intervals over scenes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mifo.evaluation.metrics import interval
from mifo.evaluation.plots import Bar, BarChart, MatrixChart, save_charts
from scripts.record import FOLDER, write_result
from scripts.toybench.methods import METHODS
from scripts.toybench.toybench_items import Item
from scripts.toybench.toybench_scenes import LEVELS

OURS = "mifo"
NO_LOSS = ("published-no-attention-loss", "no-attention-loss")  # from the photo as published, and on composites
MIN_SCENES = 5  # fewer have intervals that say little


def _prompt_fit(item: Item) -> list[float]:
    """Of both kinds of pictures, and of nothing where there is one kind alone: things alone fit better, and would be missed."""
    alone, in_boxes = (item[kind].get("prompt_fit", []) for kind in ("alone", "in_boxes"))
    return [*alone, *in_boxes] if alone and in_boxes else []


#: name in the table -> (column title, values of one item, larger is better)
MEASURES: dict[str, tuple[str, Callable[[Item], list[float]], bool]] = {
    "margin_in_boxes": ("identity margin in boxes", lambda i: i["in_boxes"].get("identity_margin", []), True),
    "identity_in_boxes": ("look similarity in boxes", lambda i: i["in_boxes"].get("identity", []), True),
    "confused_in_boxes": ("confused in boxes", lambda i: i["in_boxes"].get("confused", []), False),
    "right_in_boxes": ("right instance in boxes", lambda i: i["in_boxes"].get("right_instance", []), True),
    "margin_alone": ("identity margin alone", lambda i: i["alone"].get("identity_margin", []), True),
    "confused_alone": ("confused alone", lambda i: i["alone"].get("confused", []), False),
    "identity_alone": ("look similarity alone", lambda i: i["alone"].get("identity", []), True),
    "iou": ("IoU", lambda i: i["in_boxes"].get("ious", []), True),
    "count_right": ("count right in boxes", lambda i: i["in_boxes"].get("count_right", []), True),
    "prompt_fit": ("prompt fit", _prompt_fit, True),
    "prompt_fit_in_boxes": ("prompt fit in boxes", lambda i: i["in_boxes"].get("prompt_fit", []), True),
    "drift": ("drift", lambda i: [i["drift"]] if "drift" in i else [], False),
    "attention_in_others": ("attention in others' masks", lambda i: [i["attention_in_others"]], False),
}
IN_TABLE = ("margin_in_boxes", "confused_in_boxes", "identity_in_boxes", "margin_alone", "confused_alone", "identity_alone",
            "iou", "prompt_fit", "drift")  # fmt: skip
VERSUS = ("margin_in_boxes", "confused_in_boxes", "margin_alone", "confused_alone")
IN_PAIRED_TABLE = ("margin_in_boxes", "confused_in_boxes", "identity_in_boxes", "margin_alone", "confused_alone",
                   "identity_alone", "drift")  # fmt: skip
BARS = ("margin_in_boxes", "confused_in_boxes")  # the table has the others


def by_scene(items: Sequence[Item], measure: str) -> dict[str, list[float]]:
    """Of all its learning seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for item in items:
        values[item["scene"]] += [float(v) for v in MEASURES[measure][1](item)]
    return {scene: found for scene, found in values.items() if found}


def compare(ours: Sequence[Item], theirs: Sequence[Item], measure: str) -> dict[str, Any] | None:
    """Ours minus theirs on the scenes that both have, scene by scene; and whether the two intervals stay apart in our favour."""
    a, b = by_scene(ours, measure), by_scene(theirs, measure)
    both = sorted(set(a) & set(b))
    if not both:
        return None
    difference = interval({s: [float(np.mean(a[s]) - np.mean(b[s]))] for s in both})
    own, other = interval({s: a[s] for s in both})["interval_95"], interval({s: b[s] for s in both})["interval_95"]
    larger = MEASURES[measure][2]
    apart = None if own is None or other is None else bool(own[0] > other[1] if larger else own[1] < other[0])
    return {"difference": difference, "ahead_with_intervals_apart": apart, "scenes": len(both)}


def summarize(items: Sequence[Item]) -> dict[str, Any]:
    """Per method: every measure over all cells, per level and per count; what it costs; and this project against it."""
    methods: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        methods[item["method"]].append(item)
    found: dict[str, Any] = {}
    for name in [m for m in METHODS if m in methods]:
        own, ours = grouped(methods[name]), grouped(methods.get(OURS, []))
        entry: dict[str, Any] = {"items": len(own["all"]), "cost": costs(own["all"])}
        for group, chosen in own.items():
            entry[group] = {m: interval(by_scene(chosen, m)) for m in MEASURES if by_scene(chosen, m)}
        if name != OURS and ours:
            entry["mifo_against_it"] = {
                group: {m: compare(ours[group], own[group], m) for m in MEASURES} for group in ours if group in own
            }
        none = NO_LOSS[0] if name.startswith("published-") else NO_LOSS[1]
        if name not in NO_LOSS and none in methods:
            entry["against_no_attention_loss"] = {m: compare(own["all"], methods[none], m) for m in MEASURES}
        found[name] = entry
    return found


def _all_alone(entry: dict[str, Any]) -> dict[str, Any]:
    against = {"mifo_against_it": {"all": entry["mifo_against_it"]["all"]}} if "mifo_against_it" in entry else {}
    return {**{key: entry[key] for key in ("items", "cost", "all")}, **against}


def grouped(items: Sequence[Item]) -> dict[str, list[Item]]:
    """All of them, by level, and by number of things; no empty groups."""
    groups = {"all": list(items), **{level: [i for i in items if i["level"] == level] for level in LEVELS}}
    groups |= {f"{n} instances": [i for i in items if i["count"] == n] for n in sorted({i["count"] for i in items})}
    return {name: chosen for name, chosen in groups.items() if chosen}


def costs(items: Sequence[Item]) -> dict[str, float]:
    """Median seconds: of learning one scene, of drawing one picture."""
    drawn = [i["draw_seconds"] / i["pictures"] for i in items]
    return {"learn_seconds": round(float(np.median([i["learn_seconds"] for i in items])), 1),
            "seconds_per_picture": round(float(np.median(drawn)), 2)}  # fmt: skip


def write_report(name: str, items: Sequence[Item], facts: dict[str, Any], device: str) -> str:
    """scripts/results/<name>.json and <name>.png; returns the Markdown table."""
    summary = summarize(items)
    scenes = len({i["scene"] for i in items})
    paired = facts.get("paired", False)
    if paired:  # many methods, one table over all scenes: the groups would be ten times as much
        summary = {name: _all_alone(entry) for name, entry in summary.items()}
    write_result(name, {**facts, "scenes": scenes, "items": len(items), "measures": {m: t for m, (t, _, _) in MEASURES.items()},
                        "methods": summary}, device)  # fmt: skip
    if paired:
        return paired_table(summary)
    save_charts(charts(summary, scenes), FOLDER / f"{name}.png")
    return table(summary)


def table(summary: dict[str, Any]) -> str:
    """All levels together, one row per method."""
    titles = [MEASURES[m][0] for m in IN_TABLE]
    lines = [f"| method | {' | '.join(titles)} | learn, s | draw, s |", "|---" * (len(titles) + 3) + "|"]
    for name, entry in summary.items():
        cells = [shown(entry["all"].get(m)) for m in IN_TABLE]
        cost = entry["cost"]
        lines.append(f"| {name} | {' | '.join(cells)} | {cost['learn_seconds']:.0f} | {cost['seconds_per_picture']:.1f} |")
    return "\n".join(lines)


def versus_table(summary: dict[str, Any], other: str) -> str:
    """This project and another method by level and by number of things; bold where the intervals stay apart in our favour.

    Never bold with fewer than MIN_SCENES scenes.
    """
    titles = [f"{MEASURES[m][0]}: {name}" for m in VERSUS for name in (OURS, other)]
    lines = [f"| | scenes | {' | '.join(titles)} |", "|---" * (len(titles) + 2) + "|"]
    for group, found in summary[other]["mifo_against_it"].items():
        compared = {m: c for m, c in found.items() if c and m in VERSUS}
        cells = []
        for measure in VERSUS:
            own, theirs = (shown(summary[name][group].get(measure)) for name in (OURS, other))
            against = compared.get(measure)
            apart = against and against["ahead_with_intervals_apart"] and against["scenes"] >= MIN_SCENES
            cells += [f"**{own}**" if apart else own, theirs]
        scenes = max((c["scenes"] for c in compared.values()), default=0)
        lines.append(f"| {group} | {scenes} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference_table(summary: dict[str, Any], other: str) -> str:
    """This project minus another method, scene by scene, by level and by number of things; bold as in `paired_table`."""
    lines = [f"| {OURS} minus {other} | {' | '.join(MEASURES[m][0] for m in VERSUS)} |", "|---" * (len(VERSUS) + 1) + "|"]
    for group, found in summary[other]["mifo_against_it"].items():
        cells = [difference(found[m], 1) if found[m] else "-" for m in VERSUS]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paired_table(summary: dict[str, Any]) -> str:
    """Each method minus this project, scene by scene, on the scenes that the two have; bold where the interval leaves 0 out.

    Never bold with fewer than MIN_SCENES scenes.
    """
    titles = [MEASURES[m][0] for m in IN_PAIRED_TABLE]
    lines = [f"| minus {OURS} | scenes | {' | '.join(titles)} | learn, s |", "|---" * (len(titles) + 3) + "|"]
    for name, entry in summary.items():
        if name == OURS:
            continue
        against = entry["mifo_against_it"]["all"]
        cells, scenes = [], 0
        for found in (against[m] for m in IN_PAIRED_TABLE):
            cells.append(difference(found, -1) if found else "-")
            scenes = max(scenes, found["scenes"] if found else 0)
        lines.append(f"| {name} | {scenes} | {' | '.join(cells)} | {entry['cost']['learn_seconds']:.0f} |")
    return "\n".join(lines)


def difference(compared: dict[str, Any], sign: int = 1) -> str:
    """Ours minus theirs, or with `sign` -1 theirs minus ours."""
    mean, low_high = sign * compared["difference"]["mean"], compared["difference"]["interval_95"]
    if not low_high:
        return f"{mean:+.2f}"
    low, high = sorted(sign * v for v in low_high)
    text = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})".replace("-0.00", "+0.00")
    return f"**{text}**" if (low > 0 or high < 0) and compared["scenes"] >= MIN_SCENES else text


def shown(entry: dict[str, Any] | None) -> str:
    if not entry or entry["mean"] is None:
        return "-"
    low_high = entry["interval_95"]
    return f"{entry['mean']:.2f}" + (f" ({low_high[0]:.2f} to {low_high[1]:.2f})" if low_high else "")


def charts(summary: dict[str, Any], scenes: int) -> list[BarChart | MatrixChart]:
    """Per measure and level, a bar with its interval for each method."""
    found: list[BarChart | MatrixChart] = []
    for measure in BARS:
        bars = []
        for level in LEVELS:
            for k, (method, entry) in enumerate(summary.items()):
                value = entry.get(level, {}).get(measure)
                if value and value["mean"] is not None:
                    low, high = value["interval_95"] or (None, None)
                    bars.append(Bar(f"{level}: {method}", value["mean"], low, high, k))
        if bars:
            better = "larger is better" if MEASURES[measure][2] else "smaller is better"
            title = f"{MEASURES[measure][0]} ({better}), {scenes} scenes, 95 % intervals over scenes"
            found.append(BarChart(title, bars, (-0.2, 1.4) if "margin" in measure else (0.0, 1.0)))
    return found
