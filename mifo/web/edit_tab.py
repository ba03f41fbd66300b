"""The tab that puts an asset into a painted part of a picture."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..errors import InputError
from ..io.files import write_file
from ..jobs.job import EditJob
from ..jobs.uploads import new_upload
from ..prompts import check_prompt
from ..segmentation.segment import read_photo
from .learn_tab import PICTURES, for_painting, painted_mask
from .place_tab import PlaceTab, bundle_choices, entry_of, picture_of
from .site import MOST_QUEUED, Site, guarded

PLAIN = ("no bundle: plain words", "")


@dataclass(frozen=True)
class EditTab:
    """What the rest of the page uses of it."""

    begun: gr.State
    """The number of the job that it began last"""
    gallery: gr.Gallery
    slider: gr.ImageSlider


@dataclass(frozen=True)
class EditActions:
    """What the tab's parts do; each gives back the new values of what `edit_tab` names as its outputs."""

    site: Site

    def kept(self, path: Path) -> Path:
        """A copy of our own: the page's temporary files go away."""
        read_photo(path)
        suffix = path.suffix.lower() if path.suffix.lower() in PICTURES else ".png"
        copy = new_upload(self.site.state, suffix)
        shutil.copyfile(path, copy)
        return copy

    @guarded
    def take_picture(self, path: str | None) -> tuple[str, Any]:
        return _shown(self.kept(Path(path))) if path else ("", None)

    @guarded
    def take_sent(self, path: str) -> tuple[Any, ...]:
        if not path:
            raise InputError("choose a picture in the gallery first")
        return *_shown(self.kept(Path(path))), gr.Tabs(selected="edit")

    @guarded
    def begin(self, name: str, painted: dict[str, Any] | None, bundle: str, text: str, count: float, seed: float,
              steps: float) -> int:  # fmt: skip
        picture = self.site.uploads / Path(name).name if name else None
        if picture is None or not picture.is_file():
            raise InputError("there is no picture yet; drop one above, or send one here from Place")
        check_prompt(text, entry_of(self.site, bundle).tokens if bundle else ())
        mask = painted_mask(painted)
        if mask is None:
            raise InputError("nothing is painted yet; paint over the part that may change")
        size = read_photo(picture)[1].size
        whole = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
        file = new_upload(self.site.state, "-mask.png")
        with write_file(file) as temporary:
            whole.save(temporary, "PNG")
        job = EditJob(text, str(picture), str(file), (bundle,) if bundle else (), None, int(seed), int(count), int(steps) or None)
        return self.site.store.add(job, most_queued=MOST_QUEUED)

    @guarded
    def select(self, event: gr.SelectData, number: int) -> tuple[Any, Any]:
        path = picture_of(self.site, number, event.index)
        entry = self.site.store.get(int(number))
        return _before_and_after(entry.request["image"], path) if entry else None, gr.update(value=path, interactive=True)


def edit_tab(site: Site, demo: gr.Blocks, place: PlaceTab, tabs: gr.Tabs) -> EditTab:
    """Builds the tab inside the caller's context. `place`: where pictures are sent from; `tabs`: what this tab is one of."""
    begun, source = gr.State(0), gr.State("")
    gr.Markdown("Every pixel outside what you paint stays as it is.")
    upload = gr.File(label="Picture (PNG, JPEG, WebP)", file_types=PICTURES, type="filepath", elem_id="edit-photo", height=120)
    painter = gr.ImageEditor(label="Paint over the part to draw anew", type="pil", sources=(), layers=False, transforms=(),
                             elem_id="edit-painter",
                             brush=gr.Brush(default_size=40, colors=["#e63946"], color_mode="fixed"))  # fmt: skip
    with gr.Row():
        bundle = gr.Dropdown([PLAIN], value="", label="Bundle", elem_id="edit-bundle", min_width=150)
        prompt = gr.Textbox(label="Prompt", placeholder="a photo of <asset0>", elem_id="edit-prompt", max_lines=2, min_width=200)
    with gr.Row():
        count = gr.Slider(1, 8, value=2, step=1, label="Candidates", min_width=140, elem_id="edit-count")
        seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120)
        steps = gr.Number(label="Steps (0: the preset's)", value=0, precision=0, minimum=0, min_width=120, elem_id="edit-steps")
    draw = gr.Button("Draw", variant="primary", elem_id="edit-draw")
    gallery = gr.Gallery(label="Candidates, the best first", columns=4, object_fit="contain", elem_id="edit-gallery",
                         interactive=False, format="png", buttons=["download", "fullscreen"])  # fmt: skip
    slider = gr.ImageSlider(label="Before and after", elem_id="edit-slider", type="filepath", format="png",
                            buttons=["download", "fullscreen"])  # fmt: skip
    download = gr.DownloadButton("Download the chosen one", size="sm", interactive=False)

    does = EditActions(site)
    upload.upload(does.take_picture, upload, [source, painter])
    place.send.click(does.take_sent, place.chosen, [source, painter, tabs])
    draw.click(does.begin, [source, painter, bundle, prompt, count, seed, steps], begun)
    gallery.select(does.select, begun, [slider, download])
    begun.change(lambda number: edit_pictures(site, number), begun, [gallery, slider])
    demo.load(lambda: gr.update(choices=[PLAIN, *bundle_choices(site)]), None, bundle, show_progress="hidden")
    return EditTab(begun, gallery, slider)


def edit_pictures(site: Site, number: int) -> tuple[Any, Any]:
    """The candidates of a finished edit, and the picture before and after the best one."""
    entry = site.store.get(int(number)) if number else None
    if entry is None or not entry.result:
        return [], None
    scores = entry.result.get("scores") or []
    captions = [", ".join(f"{name} {value:.2f}" for name, value in sorted(each.items())) for each in scores]
    images = entry.result["images"]
    return list(zip(images, captions, strict=False)), _before_and_after(entry.request["image"], images[0])


def _before_and_after(before: str, after: str) -> tuple[str, str] | None:
    """None once the picture that was edited is pruned."""
    return (before, after) if Path(before).is_file() else None


def _shown(path: Path) -> tuple[str, Any]:
    return path.name, {"background": for_painting(read_photo(path)[1]), "layers": [], "composite": None}
