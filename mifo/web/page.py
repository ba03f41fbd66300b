"""The page: four tabs below the panel of what runs. Everything that it does is a job of the list, or a file of its folders."""

from __future__ import annotations

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import InputError
from ..io.local_only import local_only
from ..jobs.store import DONE
from ..jobs.supervisor import working
from ..jobs.uploads import WEB_STATE
from .edit_tab import EditTab, edit_pictures, edit_tab
from .job_panel import LOOK_EVERY, job_panel
from .learn_tab import learn_tab, thing_styles
from .library_tab import LibraryTab, last_evaluation, library_tab, table_html
from .place_tab import PlaceTab, bundle_choices, chip_styles, gallery_pictures, place_tab, shelf_pictures
from .site import Site

HOST = "127.0.0.1"
MOST_UPLOADED = 1 << 26  # bytes
STYLE = """
.gradio-container { max-width: 980px !important; margin: 0 auto !important; }
.mifo-scroll { overflow-x: auto; width: 0; min-width: 100%; }
#library-table th, #library-table td { text-align: left; padding: 4px 12px 4px 0; white-space: nowrap; }
.mifo-job { padding: 8px 12px; border: 1px solid #ccc; border-radius: 6px; font-size: 14px; }
.mifo-job progress { width: 100%; height: 10px; }
.mifo-job.failed { border-color: #c0392b; }
/* one bundle alone would fill the page, and the label lies over the first */
#place-shelf .grid-container { grid-template-columns: repeat(auto-fill, 120px) !important; padding-top: 28px !important; }
.fixed-width textarea { font-family: monospace !important; font-size: 12px !important; white-space: pre !important;
  overflow-x: auto !important; }
"""
SYSTEM = ["system-ui", "sans-serif"]


def build(site: Site) -> gr.Blocks:
    """The page, not served yet."""
    with gr.Blocks(title="mifo", analytics_enabled=False) as demo:
        gr.Markdown("# mifo\nTeach a model the things in one photo; then put each of them where you want.")
        job_panel(site)
        with gr.Tabs() as tabs:
            with gr.Tab("Learn", id="learn"):
                learn_tab(site, demo)
            with gr.Tab("Place", id="place"):
                place = place_tab(site, demo)
            with gr.Tab("Edit", id="edit"):
                edit = edit_tab(site, demo, place, tabs)
            with gr.Tab("Library", id="library"):
                library = library_tab(site, demo, [place.bundle])
        _follow(site, demo, place, edit, library)
    return demo


def _follow(site: Site, demo: gr.Blocks, place: PlaceTab, edit: EditTab, library: LibraryTab) -> None:
    """Results appear when their jobs are done, in whatever page they were begun; a page that is loaded shows the last ones."""
    seen = gr.State({})
    timer = gr.Timer(LOOK_EVERY)

    def look(seen: dict[str, Any], placed: int, edited: int, chosen: str | None) -> tuple[Any, ...]:
        choices = bundle_choices(site)
        names = [name for _, name in choices]
        now = {"placed": _state(site, placed), "edited": _state(site, edited), "names": names,
               "measured": _last(site, "evaluate", DONE)}  # fmt: skip
        if now == seen:
            return (gr.skip(),) * 10
        changed = {key for key in now if now[key] != seen.get(key)}
        pictures = gallery_pictures(site, placed) if "placed" in changed else gr.skip()
        both = edit_pictures(site, edited) if "edited" in changed else (gr.skip(), gr.skip())
        text = last_evaluation(site, chosen) if "measured" in changed and chosen else gr.skip()
        if "names" not in changed:
            return now, pictures, *both, *(gr.skip(),) * 5, text
        new = [name for name in names if name not in seen.get("names", names)]
        picked = {"value": new[-1]} if new else {}
        return (now, pictures, *both, table_html(site), gr.update(choices=choices), gr.update(choices=choices, **picked),
                gr.update(choices=choices), shelf_pictures(site), text)  # fmt: skip

    timer.tick(look, [seen, place.begun, edit.begun, library.bundle],
               [seen, place.gallery, edit.gallery, edit.slider, library.table, library.bundle, place.bundle, place.more,
                place.shelf, library.measured], show_progress="hidden")  # fmt: skip
    demo.load(lambda: (_last(site, "synthesize"), _last(site, "edit")), None, [place.begun, edit.begun], show_progress="hidden")


def _state(site: Site, number: int) -> tuple[int, str]:
    entry = site.store.get(int(number)) if number else None
    return number, entry.state if entry else ""


def _last(site: Site, kind: str, *states: str) -> int:
    return next((entry.id for entry in site.store.entries(states, limit=1, kind=kind)), 0)


@contextmanager
def serving(site: Site, port: int | None = None) -> Iterator[str]:
    """Serves the page on this machine alone for as long as the block lasts; yields its address. Raises InputError where the port
    is taken."""
    site.store  # noqa: B018  makes the list of jobs, or says why not
    os.environ.setdefault("GRADIO_TEMP_DIR", str((site.state / "served").resolve()))
    demo = build(site)
    demo.queue(max_size=64, default_concurrency_limit=4)
    with working(site.state, site.bundles, site.output):
        try:
            _, address, _ = demo.launch(
                server_name=HOST, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
                show_error=False, max_file_size=MOST_UPLOADED, ssr_mode=False, footer_links=[], enable_monitoring=False,
                allowed_paths=[str(p.resolve()) for p in (site.output, site.bundles, site.uploads, site.state / "previews")],
                theme=gr.themes.Default(font=SYSTEM, font_mono=["monospace"]), css=f"{STYLE}\n{thing_styles()}\n{chip_styles()}",
                app_kwargs={"middleware": [local_only()]},
            )  # fmt: skip
        except OSError as error:
            raise InputError(f"the page cannot be served on port {port} ({error}); choose another --port") from None
        try:
            yield str(address)
        finally:
            demo.close(verbose=False)


def site_in(folder: Path) -> Site:
    """The folders as the commands use them, below `folder`."""
    return Site(folder / "Model_ours", folder / "output", folder / "my_photos", folder / WEB_STATE)


