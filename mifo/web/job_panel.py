"""What runs and what waits, above all tabs: its progress, where the assets look meanwhile, and the button that stops it."""

from __future__ import annotations

import html
import time
from typing import Any

import gradio as gr

from ..jobs.store import DONE, FAILED, QUEUED, RUNNING, Entry
from ..jobs.worker import preview_of
from .site import Site, guarded, told

LOOK_EVERY = 1.0  # seconds
RECENT = 30  # seconds for which the last job's end is shown
NAMES = {"learn": "Learning", "synthesize": "Drawing", "edit": "Editing", "evaluate": "Evaluating"}
IDLE = '<div class="mifo-job" role="status">Nothing runs.</div>'


def job_panel(site: Site) -> tuple[gr.HTML, gr.Image, gr.Button, gr.Timer]:
    """Builds the panel inside the caller's context."""
    status = gr.HTML(IDLE, elem_id="job-status")
    with gr.Row():
        stop = gr.Button("Stop after this step", size="sm", interactive=False, elem_id="job-stop", min_width=140)
    with gr.Accordion("Where each word looks", open=False, visible=False, elem_id="job-attention") as more:
        attention = gr.Image(show_label=False, type="filepath", interactive=False, buttons=[], height=320)
    timer = gr.Timer(LOOK_EVERY)
    shown = gr.State("")

    def look(before: str) -> tuple[Any, ...]:
        entry = current(site)
        said = describe(entry, site.store.count(QUEUED)) if entry else IDLE
        if said == before:
            return (gr.skip(),) * 5
        path = preview_of(site.state, entry.id) if entry else None
        there = path is not None and path.is_file()
        return (said, gr.update(interactive=entry is not None and not entry.over), gr.update(visible=there),
                str(path) if there else gr.update(), said)  # fmt: skip

    @guarded
    def ask_to_stop() -> None:
        entry = current(site)
        if entry and not entry.over:
            site.store.stop(entry.id)
            gr.Info("It stops after the step that runs; what is learned so far is kept.")

    timer.tick(look, shown, [status, stop, more, attention, shown], show_progress="hidden")
    stop.click(ask_to_stop, None, None)
    return status, attention, stop, timer


def current(site: Site) -> Entry | None:
    """What runs; or what waits first; or what ended a moment ago."""
    for states in ((RUNNING,), (QUEUED,)):
        if found := site.store.entries(states, limit=1000):
            return found[-1]
    last = site.store.entries(limit=1)
    return last[0] if last and time.time() - (last[0].ended or 0) < RECENT else None


def describe(entry: Entry, waiting: int) -> str:
    """HTML: one line, a bar, and the losses."""
    kind = entry.request.get("kind", "synthesize")
    about = entry.request.get("name") or entry.request.get("prompt") or entry.request.get("bundle") or ""
    title = f"{NAMES[kind]} {about}".strip()
    more = waiting - (entry.state == QUEUED)
    queue = f" {more} more {'waits' if more == 1 else 'wait'}." if more > 0 else ""
    part, detail = "", ""
    if entry.state == RUNNING and entry.progress:
        done, total = entry.progress["done"], max(1, entry.progress["total"])
        values = ", ".join(f"{name} {value:.3f}" for name, value in entry.progress["values"].items())
        detail = f"{entry.progress['what']}: {done} of {total}" + (f" ({values})" if values else "")
        part = f'<progress max="{total}" value="{done}" aria-label="{html.escape(entry.progress["what"])}"></progress>'
    elif entry.state == RUNNING:
        detail, part = "getting ready", "<progress></progress>"
    elif entry.state == QUEUED:
        detail = "waits for its turn"
    elif entry.state == DONE:
        seconds = (entry.ended or 0) - (entry.started or 0)
        detail = f"done in {seconds:.0f} s"
    elif entry.state == FAILED:
        detail = f"failed: {told(entry.error or '')}"
    else:
        detail = "stopped"
    return (f'<div class="mifo-job {entry.state}" role="status"><b>{html.escape(title)}</b> {part}'
            f'<div>{html.escape(detail)}.{queue}</div></div>')  # fmt: skip
