"""The commands that say what there is: list, and show for a bundle or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError, did_you_mean
from ..io.console import Job
from ..io.outputs import PLACE
from .app import app
from .job import job_command
from .options import OutputDir, bundle_names, path_argument


@job_command(app, "mifo list", name="list")
def list_(job: Job, output_dir: OutputDir = Path("Model_ours")) -> None:
    """List the learned bundles: their things, base model, date, size, and how they came out."""
    from ..bundle.catalogue import list_bundles

    entries = list_bundles(output_dir, PLACE)
    if not entries:
        job.text(f"{output_dir} has no bundles; 'learn' makes one")
    else:
        rows: list[tuple[str, ...]] = [("bundle", "things", "base", "learned", "MiB", "attention inside masks")]
        rows += [(e.name, "damaged: see 'mifo show'", "", "", "", "") if e.problem else
                 (e.name, ", ".join(e.words or e.tokens), e.base, e.learned, f"{e.mib:.1f}", _percent(e.attention_inside_mask))
                 for e in entries]  # fmt: skip
        job.text(*_table(rows))
    job.json({"bundles": [e.to_json() for e in entries]})


@job_command(app, "mifo show toy_car")
def show(
    job: Job,
    what: Annotated[str, path_argument("A bundle's name, its folder, or a picture that mifo drew.", autocompletion=bundle_names)],
    output_dir: OutputDir = Path("Model_ours"),
) -> None:
    """Say what a bundle is, or how a picture was made."""
    from ..bundle.catalogue import RECORD, describe, list_bundles

    for folder in (output_dir / what, Path(what)):
        if what and (folder / RECORD).is_file():
            entry = describe(folder, PLACE)
            if entry.problem:
                raise InputError(f"{folder} is damaged: {entry.problem}; learn it again")
            job.text(*_lines(entry.to_json()))
            job.json(entry.to_json())
            return
    if Path(what).is_file():
        from ..synthesis.recipe import read_record

        record = read_record(Path(what))
        job.text(*_lines(record))
        job.json(record)
        return
    names = [e.name for e in list_bundles(output_dir)]
    there = f"the bundles are {', '.join(names)}" if names else f"{output_dir} has no bundles"
    raise InputError(f"'{what[:200]}' is neither a bundle nor a picture: {there}{did_you_mean(what, names)}")


@job_command(app, "mifo prune --older-than 7 --delete")
def prune(
    job: Job,
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="Since it was last written.")] = 30.0,
    larger_than: Annotated[float, typer.Option(min=0, metavar="MIB", help="Leave what is smaller.")] = 0.0,
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed; without it nothing is.")] = False,
    output_dir: OutputDir = Path("Model_ours"),
) -> None:
    """List what can go: interrupted runs' checkpoints, class priors, bundles in the trash, and uploaded pictures."""
    from ..bundle.prune import leftovers, remove
    from ..jobs.uploads import SERVE_STATE, WEB_STATE, old_uploads

    uploads = [each for state in (WEB_STATE, SERVE_STATE) for each in old_uploads(output_dir.parent / state)]
    found = leftovers(output_dir, PLACE, older_than, larger_than, uploads)
    removed = [each for each in found if delete and remove(each)]
    verb = {True: "removed", False: "stays"} if delete else {False: "can go"}
    rows: list[tuple[str, ...]] = [("what", "where", "MiB", "days", "")]
    rows += [(e.kind, str(e.path), f"{e.mib:.1f}", f"{e.days:.0f}", verb[e in removed]) for e in found]
    total = sum(e.mib for e in (removed if delete else found))
    job.text(*(_table(rows) if found else ["nothing to remove"]))
    if found:
        job.text(f"{total:.1f} MiB removed" if delete else f"{total:.1f} MiB; give --delete to remove them")
    job.json({"found": [{"kind": e.kind, "path": str(e.path), "mib": round(e.mib, 2), "days": round(e.days, 1),
                         "removed": e in removed} for e in found]})  # fmt: skip


def _lines(record: dict[str, Any]) -> list[str]:
    """A line a value; what is nested is indented."""
    found = []
    for name, value in record.items():
        if value is None:
            continue
        if isinstance(value, dict):
            found += [f"{name}:", *(f"  {line}" for line in _lines(value))]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found.append(f"{name.replace('_', ' ')}: {shown}")
    return found


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
