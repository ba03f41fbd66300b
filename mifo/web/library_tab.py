"""The tab that shows all bundles, and what can be done with one."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..bundle.catalogue import Entry, list_bundles
from ..bundle.shelf import rename_bundle, throw_away
from ..errors import InputError
from ..jobs.job import EvaluateJob
from ..jobs.store import DONE
from .place_tab import bundle_choices
from .site import MOST_QUEUED, Site, guarded

BUTTONS = ["download", "fullscreen"]  # of a picture; Gradio's own list would share it with a website
HEADINGS = ["bundle", "things", "base", "learned", "MiB", "attention inside masks"]


@dataclass(frozen=True)
class LibraryTab:
    """What the rest of the page uses of it."""

    table: gr.HTML
    bundle: gr.Dropdown
    measured: gr.Textbox


@dataclass(frozen=True)
class LibraryActions:
    """What the tab's parts do; each gives back the new values of what `library_tab` names as its outputs."""

    site: Site
    others: int
    """Lists of bundles elsewhere on the page"""

    def filled(self, selected: str | None = None) -> list[Any]:
        choices = bundle_choices(self.site)
        names = [name for _, name in choices]
        value = selected if selected in names else names[0] if names else None
        return [table_html(self.site), gr.update(choices=choices, value=value), *[gr.update(choices=choices)] * self.others]

    def show(self, name: str | None) -> tuple[Any, ...]:
        entry = _entry(self.site, name)
        if entry is None:
            return None, None, "", ""
        attention = Path(entry.folder) / "attention.png"
        took = f" It took {entry.seconds:.0f} seconds." if entry.seconds else ""
        tokens = ", ".join(f"`{token}`" for token in entry.tokens)
        said = f"**{entry.name}**: {tokens}, on {entry.base}, {entry.mib} MiB, learned {entry.learned}.{took}"
        return entry.preview, str(attention) if attention.is_file() else None, said, last_evaluation(self.site, entry.name)

    @guarded
    def begin(self, name: str, count: float) -> int:
        return self.site.store.add(EvaluateJob(_chosen(self.site, name).name, int(count)), most_queued=MOST_QUEUED)

    @guarded
    def write_export(self, name: str, kind: str) -> str:
        from ..bundle.export import export_for_diffusers, export_for_kohya
        from ..bundle.store import load_bundle
        from ..io.outputs import numbered_folder

        bundle = load_bundle(Path(_chosen(self.site, name).folder))
        with numbered_folder(None, self.site.output / bundle.name / "export") as folder:
            (export_for_diffusers if kind == "diffusers" else export_for_kohya)(bundle, folder)
        return f"Written: {self.site.output.name}/{bundle.name}/export/{folder.name}"

    @guarded
    def give_name(self, name: str, new: str) -> list[Any]:
        folder = rename_bundle(Path(_chosen(self.site, name).folder), new.strip())
        return self.filled(folder.name)

    @guarded
    def throw(self, name: str) -> list[Any]:
        gone = throw_away(Path(_chosen(self.site, name).folder))
        gr.Info(f"{name} lies in the trash folder now, as {gone.name}")
        return self.filled()


def library_tab(site: Site, demo: gr.Blocks, others: list[gr.Dropdown]) -> LibraryTab:
    """Builds the tab inside the caller's context. `others`: lists of bundles elsewhere on the page, which follow."""
    begun = gr.State(0)
    table = gr.HTML("", elem_id="library-table")
    with gr.Row():
        bundle = gr.Dropdown([], label="Bundle", elem_id="library-bundle", min_width=150)
        refresh = gr.Button("Look again", size="sm", min_width=100, elem_id="library-refresh")
    with gr.Row():
        preview = gr.Image(label="What was learned", type="filepath", interactive=False, elem_id="library-preview",
                           min_width=200, buttons=BUTTONS)  # fmt: skip
        attention = gr.Image(label="Where each word looked", type="filepath", interactive=False, min_width=200,
                             buttons=BUTTONS)  # fmt: skip
    facts = gr.Markdown(elem_id="library-facts")
    with gr.Row():
        samples = gr.Slider(1, 16, value=2, step=1, label="Pictures of each prompt", min_width=140, elem_id="library-samples")
        evaluate = gr.Button("Evaluate", min_width=100, elem_id="library-evaluate")
        kind = gr.Dropdown([("for diffusers", "diffusers"), ("for ComfyUI and AUTOMATIC1111", "kohya")], value="diffusers",
                           label="Export", min_width=150)  # fmt: skip
        export = gr.Button("Export", min_width=100, elem_id="library-export")
    measured = gr.Textbox(label="The last evaluation", lines=8, interactive=False, elem_id="library-measured",
                          elem_classes="fixed-width")  # fmt: skip
    exported = gr.Markdown(elem_id="library-exported")
    with gr.Row():
        new_name = gr.Textbox(label="New name", max_lines=1, min_width=150, elem_id="library-new-name")
        rename = gr.Button("Rename", min_width=100, elem_id="library-rename")
        delete = gr.Button("Delete (into the trash folder)", variant="stop", min_width=150, elem_id="library-delete")

    does = LibraryActions(site, len(others))
    lists = [table, bundle, *others]
    bundle.change(does.show, bundle, [preview, attention, facts, measured])
    refresh.click(does.filled, bundle, lists)
    evaluate.click(does.begin, [bundle, samples], begun)
    export.click(does.write_export, [bundle, kind], exported)
    rename.click(does.give_name, [bundle, new_name], lists)
    delete.click(does.throw, bundle, lists)
    demo.load(does.filled, None, lists, show_progress="hidden")
    return LibraryTab(table, bundle, measured)


def table_html(site: Site) -> str:
    """All bundles; a damaged one says so."""
    rows = [[e.name, "damaged", "", "", "", ""] if e.problem else
            [e.name, ", ".join(e.words or e.tokens), e.base, e.learned, e.mib,
             "" if e.attention_inside_mask is None else f"{100 * e.attention_inside_mask:.0f} %"]
            for e in list_bundles(site.bundles, site.output)]  # fmt: skip
    if not rows:
        return "<p>No bundles yet: Learn makes one.</p>"
    head = "".join(f"<th scope='col'>{name}</th>" for name in HEADINGS)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='mifo-scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def last_evaluation(site: Site, name: str) -> str:
    """The table of the newest evaluation that the page did of it."""
    last = site.store.entries((DONE,), limit=1, kind=EvaluateJob.kind, bundle=name)
    return str(last[0].result["table"]) if last and last[0].result else ""


def _entry(site: Site, name: Any) -> Entry | None:
    return next((e for e in list_bundles(site.bundles) if e.name == name), None)


def _chosen(site: Site, name: Any) -> Entry:
    entry = _entry(site, name)
    if entry is None:
        raise InputError("no bundle is chosen; choose one of the list")
    return entry
