"""Fills the tables of README.md and docs/ from scripts/results/*.json.

    python -m scripts.readme_tables            rewrites the pages
    python -m scripts.readme_tables --check    fails when a table is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "scripts" / "results"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def percent(entry: dict[str, Any]) -> str:
    """'91.7 % (88-95)'"""
    if entry["percent"] is None:
        return "-"
    low, high = entry["interval_95"]
    return f"{entry['percent']:.0f} % ({low:.0f}-{high:.0f})"


def source(name: str, result: dict[str, Any]) -> str:
    measured = f"{result['device']}, {result['date']}, commit {result['commit'].rstrip('+')}"
    return f"[{name}.json](scripts/results/{name}.json): `{result['command']}`, {measured}."


def headline_table() -> str:
    """The README's few rows."""
    job, edits, base, canaries = (load(name) for name in (TODAY, "edit_insert", "base_model", "canaries"))
    if not (job and edits and base and canaries):
        return "Not measured yet."
    ours, car, quiet = job["mifo"], edits["toy_car"]["insert"], load("learn_seconds")
    alone, on = (ours, "a busy CPU, one thread")
    if quiet:
        alone, on = quiet["mifo"], "two cores of a fast CPU; a slow one takes three times as long"
    broken = len(canaries["broken"])
    rows = [
        ("three look-alike cars, each in its box: the right one", percent(ours["in_boxes"]["right_instance"]),
         f"{ours['in_boxes']['right_instance']['of']} boxes, {_runs(job)}"),
        ("one of them drawn alone: class, both colours and pattern right", percent(ours["alone"]["right"]),
         f"{ours['alone']['right']['of']} pictures; run by run {_each(ours, 'alone', 'right')} %"),
        ("one of them put into another picture: the right one in the mask", percent(car["right_instance"]),
         f"{car['right_instance']['of']} edits, {edits['learning_runs']} learning runs; largest difference outside the mask: "
         f"{car['max_difference_outside']}"),
        ("to learn all three", f"{alone['learn_seconds']:.0f} s, {alone['bundle_mib']:.1f} MiB", on),
        ("other people's files changed by random command lines", f"{broken} of {canaries['canaries']}",
         f"{canaries['lines']} command lines"),
    ]  # fmt: skip
    lines = ["| | measured (95 % interval) | on |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", *([source("learn_seconds", quiet)] if quiet else []), source(TODAY, job),
                      source("edit_insert", edits), source("canaries", canaries)])


def answers_table() -> str:
    """What a person wants to know first. Each row says where its number comes from."""
    job, tuned, bench, edits = (load(name) for name in (TODAY, "toybench_tuned", "toybench", "edit_insert"))
    quiet, busy = load("learn_seconds"), load("learn_seconds_busy")
    if not (job and tuned and bench and edits and quiet and busy):
        return "Not measured yet."
    ours, car, shelf = job["mifo"], edits["toy_car"]["insert"], edits["shelf"]["insert"]
    held = tuned["methods"]

    def confused(count: int) -> str:
        found = held["mifo"][f"{count} instances"]["confused_in_boxes"]
        low, high = found["interval_95"]
        return f"{100 * found['mean']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"

    def margins(methods: dict[str, Any], names: dict[str, str]) -> str:
        from scripts.toybench.toybench_report import shown

        return "; ".join(f"{title} {shown(methods[name]['all']['margin_in_boxes'])}" for name, title in names.items())

    closest = {"mifo": "mifo", "break-a-scene-tuned": "Break-A-Scene's"}
    others = {"mifo": "mifo", "dreambooth-lora-tuned": "DreamBooth-LoRA", "textual-inversion-tuned": "textual inversion"}
    free = percent(ours["without_box_control"]["right_instance"])
    rows = [
        ("Does each of three look-alikes stand in its box?",
         f"{percent(ours['in_boxes']['right_instance'])}; without box control {free}", "three cars"),
        ("Does it look right there, in class, both colours and pattern? And alone?",
         f"{percent(ours['in_boxes']['right'])}; {percent(ours['alone']['right'])}", "three cars"),
        ("Is one taken for another, in boxes, of three look-alikes? Of four?", f"{confused(3)}; {confused(4)}",
         "held-out scenes"),
        ("Is that better than Break-A-Scene's loss, tuned as hard? Margin in boxes, 1 is as far apart as in the photo",
         margins(held, closest), "held-out scenes"),
        ("Than DreamBooth-LoRA or textual inversion, after as many trials? The same margin",
         margins(bench["methods"], others), "development scenes"),
        ("Put into another picture: the right one? Right in everything? Largest change outside the mask",
         f"{percent(car['right_instance'])}; {percent(car['class_colors_pattern'])}, another photo's things "
         f"{percent(shelf['class_colors_pattern'])}; {car['max_difference_outside']}", "drawn scenes"),
        ("How long, how large?", f"{quiet['mifo']['learn_seconds']:.0f} s to learn three things, "
         f"{busy['mifo']['learn_seconds']:.0f} s beside a process that keeps a core busy, "
         f"{quiet['mifo']['in_boxes']['seconds_per_image']['median']:.1f} s a picture, {quiet['mifo']['bundle_mib']:.1f} MiB",
         "two quiet cores of a fast CPU"),
    ]  # fmt: skip
    return "\n".join(["| | measured (95 % interval) | on |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def _runs(result: dict[str, Any]) -> str:
    return "one learning run" if result.get("runs", 1) == 1 else f"{result['runs']} learning runs"


def several_table() -> str:
    """Assets of several photos in one picture."""
    result = load("several")
    if result is None:
        return "Not measured yet."
    names = {"by place": "each LoRA in its own boxes", "summed": "all LoRA on everywhere", "joint": "learned from one photo"}

    def cell(entry: dict[str, Any]) -> str:
        return f"{100 * entry['share']:.0f} % ({100 * entry['low']:.0f}-{100 * entry['high']:.0f})"

    lines = ["| | | pictures | the right thing in its box | all looks right | another's colour in it | background as asked |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    groups = [key for key in result["by place"] if key not in ("all", "where joint was learned")]
    for group in ("all", *groups, "where joint was learned"):
        for method, name in names.items():
            entry = result[method].get(group)
            if entry is None or (method == "joint" and group != "where joint was learned"):
                continue
            lines.append(f"| {group} | {name} | {entry['pictures']} | {cell(entry['right'])} | {cell(entry['all_looks'])} | "
                         f"{cell(entry['others_color'])} | {cell(entry['background'])} |")  # fmt: skip
    return "\n".join([*lines, "", source("several", result)])


def photos_table() -> str:
    """What further photos of the same things bring."""
    result = load("photos")
    if result is None:
        return "Not measured yet."
    lines = ["| photos | alone: all looks right | never another's | one thing | in boxes: right thing | all looks right | IoU |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for count, found in result["by_photos"].items():
        alone, boxes = found["alone"], found["in_boxes"]
        shares = (alone["right"], alone["not_confused"], alone["one_thing"], boxes["right_instance"], boxes["right"])
        lines.append(f"| {count} | {' | '.join(map(percent, shares))} | {boxes['mean_iou']:.2f} |")
    return "\n".join([*lines, "", source("photos", result)])


def relearn_table() -> str:
    """One asset learned again, or one more, into a bundle."""
    result = load("relearn")
    if result is None:
        return "Not measured yet."

    def difference(entry: dict[str, Any]) -> str:
        found = entry["difference"]
        low, high = found["interval_95"]
        return f"{entry['before']:.3f} | {entry['after']:.3f} | {found['mean']:+.3f} ({low:+.3f} to {high:+.3f})"

    names = {"again": ("learned again", "the others"), "added": ("the one that was added", "the others")}
    lines = ["| | margin, all learned at once | so | difference (95 %) | of the time |", "|---|---|---|---|---|"]
    for kind, (itself, others) in names.items():
        time = result[kind]["share_of_time"]
        spent = f"{100 * time['median']:.0f} % ({100 * time['min']:.0f}-{100 * time['max']:.0f})"
        lines.append(f"| {kind}: {itself} | {difference(result[kind]['itself'])} | {spent} |")
        lines.append(f"| {kind}: {others} | {difference(result[kind]['others'])} | |")
    return "\n".join([*lines, "", source("relearn", result)])


def bundles_cost_table() -> str:
    """What each further bundle costs in one picture."""
    result = load("bundles_cost")
    if result is None:
        return "Not measured yet."
    lines = ["| bundles | processor's seconds a step (range) | of one bundle's | GiB that drawing adds | GiB of the process | "
             "of one bundle's |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for count, found in result["by_bundles"].items():
        seconds = found["cpu_seconds_a_step"]
        spent = f"{seconds['median']:.1f} ({seconds['min']:.1f}-{seconds['max']:.1f})"
        lines.append(f"| {count} | {spent} | {found['of_one']:.2f} | {found['drawing_gib']:.2f} | "
                     f"{found['peak_gib']:.2f} | {found['peak_of_one']:.3f} |")
    return "\n".join([*lines, "", source("bundles_cost", result)])


def scale_table() -> str:
    """Throughput, and what it means for a day."""
    result = load("scale")
    if result is None:
        return "Not measured yet."
    one, two = (result["workers"][n]["jobs_a_minute"] for n in ("1", "2"))
    learned = load("learn_seconds") or load("main_job_composites") or {}
    steps, learning = result["steps"] or "the preset's", learned["mifo"]["learn_seconds"]
    rows = [
        (f"{result['jobs']} jobs over {result['bundles']} bundles, a process each",
         f"{result['separate_processes_seconds']:.0f} s"),
        ("the same in one process", f"{result['one_process_seconds']:.0f} s, {result['ratio']:.1f} times as fast"),
        ("the same pictures as one job a bundle, drawn in batches",
         f"{result['one_process_four_jobs_seconds']:.0f} s, {result['ratio_four_jobs']:.1f} times"),
        (f"{result['cluster_jobs']} jobs on one Ray worker, once it is warm", f"{one:.1f} a minute"),
        ("on two workers", f"{two:.1f} a minute, {result['scaling_1_to_2']:.2f} times one"),
        ("two processes without Ray, beside one", f"{result['scaling_of_two_plain_processes']:.2f} times"),
        ("the same bytes from all of these", "yes" if result["same_bytes"] else "no"),
        ("a job beside drawing (reading, writing, lending the adapters)", f"{result['beside_drawing']:.2f} s"),
        ("until a worker's first job is done", f"{result['workers']['1']['first_job']:.0f} s"),
        ("simulated for two workers, and measured", f"{result['simulated_2_workers']['seconds']:.0f} s and "
         f"{result['measured_2_workers']:.0f} s ({100 * result['off']:+.0f} %)"),
        ("1,000,000 pictures a day at this rate", f"{1_000_000 / (two / 2 * 60 * 24):.0f} such cores"),
        ("1,000 photos a day, at the main job's time to learn one", f"{1000 * learning / 86_400:.1f} such cores"),
        *((f"1,000 jobs, {name}, simulated", f"{found['seconds'] / 60:.0f} min") for name, found in result["what_if"].items()),
    ]  # fmt: skip
    about = f"The toybox at {steps} steps on a CPU, one thread a worker. Nothing here was measured on a GPU."
    return "\n".join([about, "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), "", source("scale", result)])


#: Label -> (learning run, its pictures in boxes or without) -> text
MAIN_JOB_ROWS: list[tuple[str, Callable[[Any, Any], str]]] = [
    ("learn, seconds", lambda e, b: f"{e['learn_seconds']:.0f}"),
    ("bundle, MiB", lambda e, b: f"{e['bundle_mib']:.1f}"),
    ("synthesize, seconds an image (median)", lambda e, b: f"{b['seconds_per_image']['median']:.1f}"),
    ("alone: class, both colours and pattern right", lambda e, b: percent(e["alone"]["right"])),
    ("alone: the same, the two colours in either order", lambda e, b: percent(e["alone"]["right_colors_in_either_order"])),
    ("alone: one thing in the picture", lambda e, b: percent(e["alone"]["one_thing"])),
    ("alone: never confused with another", lambda e, b: percent(e["alone"]["not_confused"])),
    ("alone: background as asked", lambda e, b: percent(e["alone"]["background"])),
    ("in boxes: right instance in its box", lambda e, b: percent(b["right_instance"])),
    ("in boxes: class, both colours and pattern right", lambda e, b: percent(b["right"])),
    ("in boxes: another instance in the box", lambda e, b: percent(b["wrong_instance"])),
    ("in boxes: mean IoU with the box", lambda e, b: f"{b['mean_iou']:.2f}"),
    ("in boxes: three things, no more, no fewer", lambda e, b: percent(b["count"])),
]


TODAY = "main_job_relative"  # the preset's own runs


def composites_table() -> str:
    """The three cars as the embedded model learns them today."""
    result = load("main_job_composites")
    if result is None:
        return "Not measured yet."
    today = load(TODAY)
    named = {"mifo": "the published losses alone" if today else "mifo", "no-attention-loss-tuned": "no attention loss",
             "break-a-scene-tuned": "Break-A-Scene's loss"}  # fmt: skip
    columns = [(title, result[name], "in_boxes") for name, title in named.items() if name in result]
    if today:  # the same scenes and seeds, with the relative penalty
        columns.insert(0, ("mifo", today["mifo"], "in_boxes"))
    columns.insert(1, ("mifo without box control", columns[0][1], "without_box_control"))
    return "\n".join([*_main_job_lines(columns, result), "", *([source(TODAY, today)] if today else []),
                      source("main_job_composites", result)])  # fmt: skip


def match_table() -> str:
    """The preset beside Break-A-Scene's loss at the setting of its second search, side by side in one run."""
    result = load("main_job_match")
    if result is None:
        return "Not measured yet."
    columns = [("the preset", result["mifo"], "in_boxes"),
               ("`--attention-loss match`", result["break-a-scene-tuned"], "in_boxes")]  # fmt: skip
    return "\n".join([*_main_job_lines(columns, result), "", source("main_job_match", result)])


def pictures_table() -> str:
    """The preset beside two pictures a step, of both example photos; each photo's two side by side in one run."""
    results = {name: load(name) for name in ("main_job_pictures", "main_job_pictures_shelf")}
    there = {name: result for name, result in results.items() if result is not None}
    if not there:
        return "Not measured yet."
    recipes = {"mifo": "the preset", "two-pictures-a-step": "two pictures"}
    columns = [(f"{result['instance']}, {title}", result[recipe], "in_boxes")
               for result in there.values() for recipe, title in recipes.items()]  # fmt: skip
    first = next(iter(there.values()))
    return "\n".join([*_main_job_lines(columns, first), "", *(source(name, result) for name, result in there.items())])


def _main_job_lines(columns: list[tuple[str, Any, str]], result: dict[str, Any]) -> list[str]:
    """`columns`: title, a recipe's numbers, and which of its pictures. `result`: where they are from."""
    lines = ["| | " + " | ".join(title for title, _, _ in columns) + " |", "|---|" + "---|" * len(columns)]
    timed = result.get("processes", 1) == 1  # else seconds are beside other work
    lines += [f"| {label} | " + " | ".join(value(e, e[k]) for _, e, k in columns) + " |" for label, value in MAIN_JOB_ROWS
              if timed or "seconds" not in label]  # fmt: skip
    apart = "; ".join(f"{title}: alone right {_each(entry, 'alone', 'right')}, in boxes right {_each(entry, 'in_boxes', 'right')}"
                      for title, entry, where in columns if where == "in_boxes")  # fmt: skip
    runs = f"{_runs(result).capitalize()} each." + (f" Run by run, in percent: {apart}." if result["runs"] > 1 else "")
    return [*lines, "", runs]


def _each(entry: dict[str, Any], kind: str, name: str) -> str:
    return " and ".join(f"{run[kind][name]['percent']:.0f}" for run in entry.get("each_run", [entry]))


def base_model_table() -> str:
    result = load("base_model")
    if result is None:
        return "Not measured yet."
    names = ("single_plain_or_patterned", "single_patterned", "two_objects", "three_objects")
    found: list[Any] = [result.get(k) for k in names]
    single, patterned, two, three = found
    lines = [
        f"The embedded base model, {result['images_per_series']} pictures a series, by the judge.",
        "",
        "| | measured | aimed at |",
        "|---|---|---|",
        f"| one thing: class and colour right | {percent(single['class_and_color'])} | 95 % |",
        f"| one thing: background right | {percent(single['background'])} | 99 % |",
        f"| one patterned thing: pattern right | {percent(patterned['pattern'])} | 92 % |",
        f"| two things: both right in class and colour | {percent(two['class_and_color'])} | 85 % |",
        *([f"| three things: all right in class and colour | {percent(three['class_and_color'])} | 65 % |"] if three else []),
    ]
    return "\n".join([*lines, "", source("base_model", result)])


def xl_table() -> str:
    """The embedded model in SDXL's layout."""
    result = load("toybox_xl")
    if result is None:
        return "Not measured yet."
    alone, boxes = result["alone"], result["in_boxes"]
    rows = [
        ("one thing, drawn from words: class and colour right", percent(result["single_things"]["class_and_color"]), "80 %"),
        ("three cars learned, in boxes: right instance in its box", percent(boxes["right_instance"]), "80 %"),
        ("in boxes: class, both colours and pattern right", percent(boxes["right"]), ""),
        ("in boxes: mean IoU with the box", f"{boxes['mean_iou']:.2f}", ""),
        ("alone: class, both colours and pattern right", percent(alone["right"]), ""),
        ("alone: never confused with another", percent(alone["not_confused"]), ""),
    ]
    lines = ["| | measured | aimed at |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", source("toybox_xl", result)])


def samplers_table() -> str:
    """Steps against quality, for each sampler."""
    result = load("samplers")
    if result is None:
        return "Not measured yet."
    lines = ["| sampler | steps | one thing: class and colour | in boxes: right one | in boxes: all right | IoU | seconds |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in sorted(result["rows"], key=lambda row: (row["sampler"], row["steps"])):
        boxes = row["in_boxes"]
        lines.append(f"| {row['sampler']} | {row['steps']} | {percent(row['single_things']['class_and_color'])} | "
                     f"{percent(boxes['right_instance'])} | {percent(boxes['right'])} | {boxes['mean_iou']:.2f} | "
                     f"{boxes['seconds_per_image']['median']:.1f} |")  # fmt: skip
    about = f"{result['singles']} pictures of single things and {result['images']} with three boxes a row; the same seeds."
    return "\n".join([about, "", *lines, "", source("samplers", result)])


def toybench_table(name: str) -> str:
    """Methods beside this project, scene by scene."""
    result = load(name)
    if result is None:
        return "Not measured yet."
    from scripts.toybench.toybench_report import paired_table

    seeds = result["learning_seeds"]
    text = (f"Each method minus mifo, scene by scene, {_learned(seeds)}, with 95 % bootstrap intervals over the scenes that both "
            "have; bold where the interval of five scenes or more leaves 0 out.")  # fmt: skip
    return "\n".join([text, "", paired_table(result["methods"]), "", source(name, result)])


def _learned(seeds: int) -> str:
    return "one learning run of each" if seeds == 1 else f"{seeds} learning runs of each"


#: what stands beside this project scene by scene, where the table has it
BESIDE = {"break-a-scene-tuned": "Break-A-Scene's loss", "no-attention-loss-tuned": "no attention loss",
          "textual-inversion-tuned": "textual inversion", "dreambooth-lora-tuned": "DreamBooth-LoRA"}  # fmt: skip


def comparison_table(name: str) -> str:
    """Methods that had the same search, and as published, on scenes of toybench."""
    result = load(name)
    if result is None:
        return "Not measured yet."
    from scripts.toybench.toybench_report import difference_table, table, versus_table
    from scripts.toybench.toybench_scenes import LEVELS

    methods = result["methods"]
    levels = ", ".join(level for level in LEVELS if level in methods["mifo"])
    counts = ", ".join(key.split()[0] for key in methods["mifo"] if key.endswith("instances"))
    kind = "held-out" if result["split"] == "holdout" else "development"
    lines = [f"{result['scenes']} {kind} scenes ({levels}; {counts} things), {_learned(result['learning_seeds'])}, the same "
             "seeds for every method; 95 % bootstrap intervals over scenes.", "", table(methods), ""]  # fmt: skip
    lines += ["By level and by number of things, bold where the intervals of five scenes or more stay apart:", "",
              versus_table(methods, "break-a-scene-tuned"), ""]  # fmt: skip
    for other, title in BESIDE.items():
        if other in methods:
            lines += [f"mifo beside {title}, scene by scene; bold where the interval of five scenes or more leaves 0 out:", "",
                      difference_table(methods, other), ""]  # fmt: skip
    return "\n".join([*lines, source(name, result)])


#: attention loss -> its methods in the study, learned from the photo and from composites; what stands last is what it was called
#: before the relative penalty stood beside the default
STUDY = {
    "none": (("published-no-attention-loss",), ("no-attention-loss",)),
    "reward": (("published-reward",), ("reward", "no-penalty")),
    "penalty": (("published-penalty",), ("penalty", "no-reward")),
    "reward, then penalty": (("published-both",), ("reward-then-penalty", "mifo")),
    "Break-A-Scene's match": (("published-match",), ("break-a-scene-tuned",)),
}


def study_table() -> str:
    """What each attention loss is worth, from the photo and from composites, by the number of look-alikes."""
    result = load("toybench_study")
    if result is None:
        return "Not measured yet."
    methods, rows = result["methods"], []
    for title, kinds in STUDY.items():
        for kind, names in zip(("photo", "composites"), kinds, strict=True):
            if found := next((methods[name] for name in names if name in methods), None):
                rows.append((kind, title, found))
    groups, columns = ("3 instances", "4 instances"), ("margin_in_boxes", "confused_in_boxes", "margin_alone", "confused_alone")
    lines = ["| learned from | attention loss | "
             + " | ".join(f"{group[0]} things, {'margin' if 'margin' in c else 'confused'} {c.split('_', 1)[1].replace('_', ' ')}"
                          for group in groups for c in columns) + " | attention in others' masks |",
             "|" + "---|" * (3 + len(groups) * len(columns))]  # fmt: skip
    for kind, title, entry in sorted(rows, key=lambda row: row[0], reverse=True):
        cells = [f"{entry[group][c]['mean']:.2f}" for group in groups for c in columns]
        lines.append(f"| {kind} | {title} | {' | '.join(cells)} | {entry['all']['attention_in_others']['mean']:.2f} |")
    about = (f"{result['scenes']} scenes of three and four look-alikes, {result['learning_seeds']} learning runs of each; means. "
             "Differences below about 0.2 say nothing: runs of one and the same method differ by as much. "
             "On composites Break-A-Scene's has the weight that its first search found, and the others the preset's; from the "
             "photo no loss had a search.")  # fmt: skip
    return "\n".join([about, "", *lines, "", source("toybench_study", result)])


def study_photo_table() -> str:
    """The attention losses as published, from the photo alone; and each beside none, scene by scene."""
    return _beside_no_loss("toybench_study_photo", {title: names[0] for title, (names, _) in STUDY.items()},
                           "No loss had a search here: all have this project's rates, and Break-A-Scene's its published weight, "
                           "loss by picture and prior prompt.")  # fmt: skip


def study_composites_table() -> str:
    """The same from composites, as the embedded model learns, and with the preset."""
    names = {title: names[0] for title, (_, names) in STUDY.items()}
    del names["Break-A-Scene's match"]  # there at other rates
    names |= {"the preset: these and the relative penalty": "mifo", "Break-A-Scene's match": "break-a-scene-first-search",
              "none, at the best rates of its own search": "no-attention-loss-tuned"}  # fmt: skip
    settings = ("All but the last have this project's rates. They are the best that were found for reward, then penalty, and "
                "with a weight of 0.1, as here, for Break-A-Scene's first search; with no loss others are better (above)."
                )  # fmt: skip
    return _beside_no_loss("toybench_study_composites", names, settings, preset=True)


def _beside_no_loss(file: str, names: dict[str, str], settings: str, preset: bool = False) -> str:
    """`preset`: this project's preset minus each, too."""
    result = load(file)
    if result is None:
        return "Not measured yet."
    from scripts.toybench.toybench_report import difference, shown

    columns = {"margin_in_boxes": "margin in boxes", "confused_in_boxes": "confused in boxes", "margin_alone": "margin alone",
               "confused_alone": "confused alone", "attention_in_others": "attention in others' masks"}  # fmt: skip
    lines = [f"| attention loss | {' | '.join(columns.values())} |", "|" + "---|" * (1 + len(columns))]
    there = {title: result["methods"][name] for title, name in names.items() if name in result["methods"]}
    for title, entry in there.items():
        lines.append(f"| {title} | {' | '.join(shown(entry['all'][c]) for c in columns)} |")
        if compared := entry.get("against_no_attention_loss"):
            cells = [difference(compared[c]) for c in columns]
            lines.append(f"| minus none, scene by scene | {' | '.join(cells)} |")
        # beside none it stands already, as the preset's "minus none"
        if preset and title != "none" and (compared := entry.get("mifo_against_it", {}).get("all")):
            lines.append(f"| the preset minus this, scene by scene | {' | '.join(difference(compared[c]) for c in columns)} |")
    scenes, seeds, runs = result["scenes"], result["learning_seeds"], there["none"]["items"]
    learned = _learned(seeds) if runs == scenes * seeds else f"{runs} learning runs of each loss, {seeds} of a scene at most"
    about = (f"{scenes} scenes of three look-alikes, {learned}; mean, and 95 % "
             f"bootstrap interval over scenes; bold where that of five scenes or more leaves 0 out. {settings}")  # fmt: skip
    return "\n".join([about, "", *lines, "", source(file, result)])


#: file of a search -> what it is called
SEARCHES = {"mifo": "reward, then penalty", "break_a_scene": "Break-A-Scene's",
            "break_a_scene_first": "Break-A-Scene's, first search", "none": "none"}  # fmt: skip
ONE_PHASE = {"textual_inversion": "textual inversion", "dreambooth_lora": "DreamBooth-LoRA"}


def search_table() -> str:
    """What the search of rates and attention weight found for each method."""
    rows, sources = [], []
    for recipe, title in {**SEARCHES, **ONE_PHASE}.items():
        result = load(f"search_{recipe}")
        if result is None:
            continue
        best, first = result["trials"][0], next(t for t in result["trials"] if t["number"] == 0)
        rates = " / ".join(f"{best[key]:.2g}" if key in best else "-" for key in ("embedding_rate", "lora_rate", "row_rate"))
        shares = " | ".join(f"{50 * (best[key] + best['again'][key]):.0f} %"
                            for key in ("right", "confused", "right_in_boxes", "wrong_in_boxes"))  # fmt: skip
        weight, start = f"{best.get('attention_weight', 0):.2g}", first.get("mean", first["value"])
        learned_from = "composites" if best.get("composites", True) else "the photo"
        rows.append(f"| {title} | {len(result['trials'])} | {learned_from} | {rates} | {weight} | {best['mean']:.2f} | "
                    f"{start:.2f} | {shares} |")
        sources.append(source(f"search_{recipe}", result))
    head = ("| attention loss, or method | trials | learns from | best rates: embedding, LoRA, rows | its weight | value | of "
            "the first trial | alone: looks right | alone: confused | in boxes: looks right | another in the box |")  # fmt: skip
    return "\n".join([head, "|" + "---|" * 11, *rows, "", *sources])


def edit_table() -> str:
    result, rest = load("edit_insert"), load("edit")
    if result is None or rest is None:
        return "Editing: not measured yet."
    title = (f"Assets inserted into {result['scenes']} drawn scenes each, from {result['learning_runs']} learning runs of each "
             "photo, toybox on a CPU, by the judge.")  # fmt: skip
    lines = [title, "", "| | measured | aimed at |", "|---|---|---|"]
    seconds, ranking, backgrounds = (load(f"edit_{part}") or {} for part in ("seconds", "ranking", "background"))
    for name in ("toy_car", "shelf"):
        found = result[name]["insert"]
        lines += [f"| {name}: right instance in the mask | {percent(found['right_instance'])} | 85 % |",
                  f"| {name}: class, both colours and pattern right | {percent(found['class_colors_pattern'])}; run by run "
                  f"{' and '.join(f'{each:.0f}' for each in found['class_colors_pattern_by_run'])} | 75 % |",
                  f"| {name}: the scene's own things, unchanged bytes | {percent(found['objects_unchanged_pixels'])} | 100 % |",
                  f"| {name}: the scene's own things, the same to the judge | {percent(found['objects_unchanged_judge'])} | |",
                  f"| {name}: largest difference outside the mask | {found['max_difference_outside']} | 0 |"]  # fmt: skip
        ranked = ranking.get(name, {}).get("ranking", {})
        if best := ranked.get("class_colors_pattern_best_ranked"):
            first = percent(ranked["class_colors_pattern"])
            lines.append(f"| {name}: the same, the best ranked of 4, where the first has {first} | {percent(best)} | |")
        if command := seconds.get(name, {}).get("seconds_of_the_command"):
            lines.append(f"| {name}: the command, loading included, seconds (median) | {command['one']['median']:.1f} | 10 |")
        if shown := backgrounds.get(name, {}).get("background"):
            boxed, beside = shown["assets_in_boxes"]["right_instance"], shown["assets_alone"]
            without = shown["assets_alone_without_it"]
            lines += [f"| {name}: `<background>` alone shows no thing | {percent(shown['no_object'])} | 90 % |",
                      f"| {name}: assets learned beside it, right instance in its box | {percent(boxed)} | |",
                      f"| {name}: assets learned beside it, all looks right alone | {percent(beside['right'])} | "
                      f"{without['right']['percent'] - 5:.0f} %: 5 less than without it |",
                      f"| {name}: assets learned beside it, one thing in the picture | {percent(beside['one_thing'])}; "
                      f"without it {percent(without['one_thing'])} | |"]  # fmt: skip
    rebuilt = rest["reconstruction"]
    weights, latents = (f"{rebuilt[f'optimization_{what}_gain_db']:.1f} dB" for what in ("weights", "latents"))
    lines += [f"| PSNR outside, decoder's weights tuned, above `none` | {weights} | 5 dB |",
              f"| PSNR outside, latents tuned, above `none` | {latents} | 5 dB |"]  # fmt: skip
    if bars := rest.get("thin"):
        best = percent(bars["right_color_best_of_4"])
        lines += [f"| thin mask, progressive dilation: right colour | {percent(bars['right_color_dilated'])} | 75 % |",
                  f"| thin mask, without dilation | {percent(bars['right_color_without'])} | |",
                  f"| thin mask, progressive dilation, the best ranked of 4 | {best} | |"]  # fmt: skip
    parts = {"edit_insert": result, "edit_ranking": ranking, "edit": rest, "edit_background": backgrounds,
             "edit_seconds": seconds}  # fmt: skip
    sources = [source(name, found) for name, found in parts.items() if found]
    return "\n".join([*lines, "", *sources])


def bench_table() -> str:
    results = {name: result for name in ("bench_guidance_384", "bench_guidance_512") if (result := load(name))}
    if not results:
        return "Speed on Stable Diffusion's shape: not measured yet."
    lines = [
        "One guidance pass with its gradient on the sd2.1 shape (random weights); tensors are counted beside the weights.",
        "", "| | ours: seconds, median (min-max) | as published | times faster | GiB of tensors, ours | as published "
        "| the gradients differ by |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results.values():
        found, pixels = result["guidance"], result["options"]["resolution"]
        for dtype, theirs in found["baseline"].items():
            ours, times = found["ours"], found["times_faster_than_baseline_in"][dtype]
            lines.append(f"| {pixels} pixels, {dtype} | {_seconds(ours)} | {_seconds(theirs)} | {times:.1f} "
                         f"| {ours['peak_gib']:.2f} | {theirs['peak_gib']:.2f} "
                         f"| {found['relative_gradient_error'][dtype]:.0e} |")  # fmt: skip
    lines.append("| on a GPU | not measured | not measured | | | | |")
    return "\n".join([*lines, "", *(source(name, result) for name, result in results.items())])


def jobs_table() -> str:
    results = {name: result for name in ("bench_jobs", "bench_synthesize_512") if (result := load(name))}
    if "bench_jobs" not in results:
        return "Whole jobs against the published way: not measured yet."
    options = results["bench_jobs"]["options"]
    size = f"width divided by {options['width_divisor']}, " if options["width_divisor"] > 1 else ""
    lines = [
        f"Random weights in the sd2.1 shape, {size}{options['dtype']}: speed only, no quality.",
        "", "| | ours: seconds, median (min-max) | as published | times faster | GiB of tensors, ours | as published |",
        "|---|---|---|---|---|---|", *(row for result in results.values() for row in _job_rows(result)),
        "| on a GPU | not measured | not measured | | | |",
    ]  # fmt: skip
    if found := results["bench_jobs"].get("mfu"):
        lines += ["", f"A phase 2 step uses {found['utilization_percent']:.0f} % of the device's measured matrix product rate."]
    return "\n".join([*lines, "", *(source(name, result) for name, result in results.items())])


def _job_rows(result: Any) -> list[str]:
    options, rows = result["options"], []
    labels = {"synthesize": f"synthesize, {options['steps']} steps", "phase1": "phase 1 step", "phase2": "phase 2 step"}
    for piece in (p for p in labels if p in result):
        ours, times = result[piece]["ours"], result[piece]["times_faster_than_baseline_in"]
        for dtype, theirs in result[piece]["baseline"].items():
            rows.append(f"| {labels[piece]}, {options['resolution']} pixels, against {dtype} | {_seconds(ours)} "
                        f"| {_seconds(theirs)} | {times[dtype]:.1f} | {ours['peak_gib']:.3f} "
                        f"| {theirs['peak_gib']:.3f} |")  # fmt: skip
    return rows


def growth_table() -> str:
    result, assets = load("bench_growth"), load("bench_growth_assets")
    if result is None or assets is None:
        return "How time and memory grow: not measured yet."
    options = result["options"]
    size = f"width divided by {options['width_divisor']}, " if options["width_divisor"] > 1 else ""
    lines = [
        f"Random weights in the sd2.1 shape, {size}{options['dtype']}; {options['resolution']} pixels where assets grow, "
        f"{options['assets']} assets where pixels grow.",
        "", "| | phase 2 step, seconds | GiB of tensors | guidance pass, seconds | GiB of tensors |", "|---|---|---|---|---|",
    ]  # fmt: skip
    rows = [row for found, over in ((assets, "assets"), (result, "resolution"))
            for row in found["growth"]["rows"] if row["over"] == over]  # fmt: skip
    for row in rows:
        label = _size(row)
        cells = [f"{_seconds(row[p])} | {row[p]['peak_gib']:.3f}" if p in row else "failed | "
                 for p in ("phase2", "guidance")]  # fmt: skip
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines.append("| on a GPU | not measured | | not measured | |")
    return "\n".join([*lines, "", source("bench_growth_assets", assets), source("bench_growth", result)])


def goals_table() -> str:
    result = load("memory_goals")
    if result is None:
        return "Memory on Stable Diffusion's shape: not planned yet."
    lines = [
        f"Predicted by `plan` for {result['shape']} in bf16 at {result['resolution']} pixels, batch 1; no weights and no GPU.",
        "", "| | goal, GiB | peak, GiB | its phase | what has to be given up |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["goals"]:
        given_up = ", ".join(row["given_up"]) or "nothing"
        lines.append(f"| {row['goal']} | {row['goal_gib']:g} | {row['peak_gib']:.2f} | {row['peak_phase']} | {given_up} |")
    names = list(result["growth"][0]["peak_gib"])
    lines += ["", "| peak, GiB | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for row in result["growth"]:
        label = _size(row)
        lines.append(f"| {label} | " + " | ".join(f"{row['peak_gib'][n]['gib']:.2f}" for n in names) + " |")
    return "\n".join([*lines, "", source("memory_goals", result)])


def xl_goals_table() -> str:
    result = load("memory_goals_sdxl")
    if result is None:
        return "Memory on Stable Diffusion XL's shape: not planned yet."
    lines = [
        f"Predicted by `plan` for {result['shape']} in bf16 at {result['resolution']} pixels, batch 1; no weights and no GPU.",
        "",
        "| | budget, GiB | peak, GiB | its phase | given up for it: the peak with it and all before |",
        "|---|---|---|---|---|",
    ]
    for row in result["goals"]:
        steps = "; ".join([f"nothing {row['with_nothing_given_up_gib']:.2f}",
                           *(f"{tried['option']} {tried['peak_gib']:.2f}" for tried in row["tried"])])  # fmt: skip
        lines.append(f"| {row['goal']} | {row['goal_gib']:g} | {row['peak_gib']:.2f} | {row['peak_phase']} | {steps} |")
    return "\n".join([*lines, "", source("memory_goals_sdxl", result)])


def memory_table() -> str:
    """The plan against measurements."""
    lines = ["| | planned, GiB | measured, GiB | plan off by | the process grew by, GiB |", "|---|---|---|---|---|"]
    sources = []
    fakes = [(name, "fake tensors") for name in ("memory_fake", "memory_fake_sd15", "memory_fake_sdxl")]
    for name, kind in (*fakes, ("memory_real", "real steps on a CPU")):
        result = load(name)
        if result is None:
            lines.append(f"| {kind} | not measured yet | | | |")
            continue
        width = f", width divided by {result['width_divisor']}" if result["width_divisor"] > 1 else ""
        where = f"{result['shape']}, {kind}{width}, {result['resolution']} pixels, {result['dtype']}"
        for row in result["steps"]:
            checkpointed = " with checkpointing" if row["gradient_checkpointing"] else ""
            lines.append(_plan_row(f"{row['phase'].replace('phase', 'phase ')} step{checkpointed} ({where})",
                                   row["planned_gib"]["total"], row["measured_gib"]["total"], row))  # fmt: skip
        for row in result.get("drawing", []):
            lines.append(_plan_row(f"{row['piece']} ({where})", row["planned_gib"], row["measured_gib"], row))
        sources.append(source(name, result))
    return "\n".join(["Tensors beside the weights, at the peak; on a GPU: not measured.", "", *lines, "", *sources])


def families_table() -> str:
    """Ours beside diffusers' own training script and beside the published way, a row a family."""
    results = {name: result for name in ("bench_family_sd21", "bench_family_sdxl") if (result := load(name))}
    if not results:
        return "Not measured yet."
    lines = ["| | ours: seconds, median (min-max) | diffusers' LoRA script | as published | GiB of tensors, ours | diffusers' "
             "LoRA script | as published |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for result in results.values():
        options = result["options"]
        for piece, label in (("phase2", "phase 2 step"), ("guidance", "guidance pass"),
                             ("synthesize", f"synthesize, {options['steps']} steps")):  # fmt: skip
            if piece not in result:
                continue
            found, dtype = result[piece], options["dtype"]
            script, published = found.get("diffusers_script"), found["baseline"].get(dtype)
            cells = [_seconds(entry) if entry else "" for entry in (found["ours"], script, published)]
            cells += [f"{entry['peak_gib']:.3f}" if entry else "" for entry in (found["ours"], script, published)]
            lines.append(f"| {options['shape']}, {label} | " + " | ".join(cells) + " |")
    lines.append("| on a GPU | not measured | not measured | not measured | | | |")
    first = next(iter(results.values()))["options"]
    about = (f"Random weights, width divided by {first['width_divisor']}, {first['resolution']} pixels, {first['dtype']}, a draw "
             "a step: speed only, no quality.")  # fmt: skip
    return "\n".join([about, "", *lines, "", *(source(name, result) for name, result in results.items())])


def compile_table() -> str:
    result = load("compile")
    if result is None:
        return "Not measured yet."
    first = result["first_picture_seconds"]

    def row(name: str, seconds: dict[str, Any], start: float) -> str:
        return f"| {name} | {seconds['median']:.1f} ({seconds['min']:.1f}-{seconds['max']:.1f}) | {start:.0f} |"

    lines = ["| | seconds a picture, median (min-max) | the first one |", "|---|---|---|",
             row("as it is", result["seconds_as_it_is"], first["as_it_is"]),
             row("`--compile`", result["seconds_compiled"], first["compiled"]), "| on a GPU | not measured | |"]  # fmt: skip
    about = f"Three boxes, {result['model']}, {result['device'].upper()}, one thread, in turns in one run."
    return "\n".join([about, "", *lines, "", source("compile", result)])


def segment_table() -> str:
    result = load("segment")
    if result is None:
        return "Not measured yet."
    lines = ["| boxes looser by, of the thing's side | mean IoU, all things marked | one thing marked | below 0.8 | aimed at |",
             "|---|---|---|---|---|"]  # fmt: skip
    for loose, row in result["by_looseness"].items():
        lines.append(f"| 3 to {100 * float(loose):.0f} % | {row['mean_iou']:.3f} | {row['mean_iou_marked_alone']:.3f} | "
                     f"{row['below_0.8']} and {row['alone_below_0.8']} of {row['things']} | "
                     f"{result['goal_mean_iou']} |")  # fmt: skip
    auto = next(iter(result["by_looseness"].values()))["auto_finds_percent"]
    about = (f"{result['scenes']} drawn scenes of {result['pixels']} pixels, GrabCut; `--auto` proposes {auto:.0f} % of the "
             "things with an IoU of 0.8 and more.")  # fmt: skip
    return "\n".join([about, "", *lines, "", source("segment", result)])


def _size(row: dict[str, Any]) -> str:
    unit = "pixel" if row["over"] == "resolution" else "asset"
    return f"{row['value']} {unit}{'s' if row['value'] > 1 else ''}"


def _plan_row(label: str, plan: float, measured: float, row: dict[str, Any]) -> str:
    grown = row["measured_gib"].get("resident_growth") if isinstance(row["measured_gib"], dict) else None
    return f"| {label} | {plan:.3f} | {measured:.3f} | {row['plan_off_percent']:.1f} % | {f'{grown:.3f}' if grown else ''} |"


def _seconds(entry: dict[str, Any]) -> str:
    seconds = entry["seconds"]
    return f"{seconds['median']:.1f} ({seconds['min']:.1f}-{seconds['max']:.1f})"


TABLES: dict[str, Callable[[], str]] = {
          "headline": headline_table, "answers": answers_table, "base_model": base_model_table, "toybox_xl": xl_table,
          "samplers": samplers_table, "several": several_table, "composites": composites_table, "match": match_table,
          "pictures": pictures_table, "photos": photos_table, "relearn": relearn_table, "bundles_cost": bundles_cost_table,
          "scale": scale_table, "edit": edit_table, "search": search_table, "study": study_table,
          "study_photo": study_photo_table, "study_composites": study_composites_table,
          **{name: partial(comparison_table, name) for name in (
              "toybench", "toybench_tuned", "toybench_large")},
          "bench": bench_table, "bench_jobs": jobs_table, "bench_growth": growth_table, "memory_goals": goals_table,
          "memory_goals_sdxl": xl_goals_table,
          "memory": memory_table, "bench_families": families_table, "compile": compile_table, "segment": segment_table,
          **{name: partial(toybench_table, name) for name in (
              "toybench_published", "toybench_contrast", "toybench_steps", "toybench_ablations")}}  # fmt: skip
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def _between(table: str, marks: re.Match[str]) -> str:
    return f"{marks[1]}{table}\n{marks[2]}"


def filled(text: str, page: Path) -> str:
    """A page with every table made afresh; links start at the page's own folder."""
    up = "" if page.parent == ROOT else "../"
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if pattern.search(text):
            table = make().replace("](scripts/", f"]({up}scripts/")
            text = pattern.sub(partial(_between, table), text)
    return text


def main(check: bool = False) -> None:
    """Rewrites the tables, or checks them."""
    for page in PAGES:
        text = page.read_text()
        if filled(text, page) == text:
            continue
        if check:
            print(f"{page.name} is not what scripts/results says; run python -m scripts.readme_tables", file=sys.stderr)
            raise typer.Exit(1)
        page.write_text(filled(text, page))


if __name__ == "__main__":
    typer.run(main)
