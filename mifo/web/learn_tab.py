"""The tab that makes masks of a photo and learns its things."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..bundle.shelf import check_name
from ..errors import InputError
from ..io.image_file import StoredImage
from ..jobs.job import LearnJob
from ..jobs.store import CANCELLED, FAILED
from ..segmentation.instance_folder import overview, save_instance
from .canvas import Drawn, canvas, canvas_update, hex_color, picture_address, read_value
from .draft import MAX_THINGS, BoolArray, Draft, check_masks_of, new_draft, open_draft
from .site import MOST_QUEUED, Site, guarded, told

PAINTED_SIDES = 256, 512  # pixels of the longer side of a picture that is painted on: a browser without a GPU is slow at more
PAINT = 140  # of 255: how opaque a mask is while it is painted
NAMED_COLORS = ("red", "blue", "green", "orange", "purple", "cyan", "pink", "brown")
MASK_FILE = re.compile(r"mask(\d+)\.png")
PICTURES = [".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"]


@dataclass(frozen=True)
class LearnActions:
    """What the tab's parts do; each gives back the new values of what `learn_tab` names as its outputs."""

    site: Site

    def present(self, draft: Draft | None, base: str = "toybox") -> list[Any]:
        """A draft as the page shows it: its name (twice: the next visit finds it again by the second), the photo with its marks,
        the things to choose from, what is wrong with the masks, and a word for each thing."""
        if draft is None:
            hidden = [gr.update(visible=False)] * MAX_THINGS
            return ["", "", canvas_update(Drawn("mark"), ""), gr.update(choices=[], value=None), "", *hidden]
        stored, image = draft.open()
        masks = draft.masks(image)
        boxes = tuple((str(k), thing.box) for k, thing in enumerate(draft.things))
        points = tuple(point for thing in draft.things for point in thing.points)
        drawn = Drawn("mark", image.width / image.height, boxes, points)
        things = [(f"thing {k} ({NAMED_COLORS[k]})", k) for k in range(len(draft.things))]
        boxes_of_words = [gr.update(visible=k < len(draft.things), value=draft.things[k].word if k < len(draft.things) else "")
                          for k in range(MAX_THINGS)]  # fmt: skip
        said = mask_notes(stored, image, masks, base) if masks else ""
        return [draft.name, draft.name, canvas_update(drawn, picture_address(overview(image, masks))),
                gr.update(choices=things, value=things[-1][1] if things else None), said, *boxes_of_words]  # fmt: skip

    def draft(self, name: str) -> Draft:
        draft = open_draft(self.site.drafts, name)
        if draft is None:
            raise InputError("there is no photo yet; drop one above")
        return draft

    @guarded
    def take_photo(self, path: str | None) -> list[Any]:
        return self.present(new_draft(self.site.drafts, Path(path)) if path else None)

    @guarded
    def mark(self, name: str, base: str, value: str, *said: str) -> list[Any]:
        draft, added = self.draft(name).name_things(said), read_value(value).added
        if "box" in added:
            draft = draft.add_box(_floats(added["box"]))
        elif "point" in added:
            x, y = _floats(added["point"])
            draft = draft.add_point((x, y))
        elif isinstance(added.get("removed"), int):
            draft = draft.remove(added["removed"])
        return self.present(draft, base)

    @guarded
    def take_away(self, name: str, base: str, index: int | None, *said: str) -> list[Any]:
        draft = self.draft(name).name_things(said)
        return self.present(draft.remove(_chosen(draft, index)), base)

    @guarded
    def load_mask(self, name: str, index: int | None) -> Any:
        draft = self.draft(name)
        chosen = _chosen(draft, index)
        whole = draft.open()[1]
        mask = Image.fromarray(draft.masks(whole)[chosen].astype(np.uint8) * PAINT)
        image = for_painting(whole)
        mask = mask.resize(image.size, Image.Resampling.BOX)
        layer = Image.new("RGBA", image.size, "#e63946")
        layer.putalpha(mask)
        return {"background": image, "layers": [layer], "composite": None}

    @guarded
    def store_mask(self, name: str, base: str, index: int | None, painted: dict[str, Any] | None, *said: str) -> list[Any]:
        draft = self.draft(name).name_things(said)
        chosen = _chosen(draft, index)
        mask = painted_mask(painted)
        if mask is None:
            raise InputError("nothing is painted; choose 'Show its mask here' first")
        return self.present(draft.paint(chosen, mask), base)

    @guarded
    def begin(self, name: str, called: str, base: str, seed: float, first: float, second: float, background: bool, gib: float,
              *said: str) -> tuple[int, Any]:  # fmt: skip
        draft = self.draft(name).name_things(said)
        called = check_name(called.strip())
        if (self.site.bundles / called).exists():
            raise InputError(f"there is a bundle called {called} already; choose another name, or delete it in the Library")
        if gib:
            plan_text(base, len(draft.things), gib, check=True)
        folder = self.site.photos / called
        if folder.exists():
            folder = self.site.photos / f"{called}-{time.strftime('%Y%m%d-%H%M%S')}"
        draft.save(folder)
        job = LearnJob(str(folder), called, base.strip() or "toybox", int(seed), background, int(first) or None,
                       int(second) or None, float(gib) or None)  # fmt: skip
        number = self.site.store.add(job, most_queued=MOST_QUEUED)
        gr.Info(f"Learning {called} begins; how far it is stands at the top of the page.")
        return number, gr.update(visible=False)

    @guarded
    def go_on(self) -> tuple[int, Any]:
        stopped = interrupted(self.site)
        if stopped is None:
            raise InputError("no learning was stopped")
        return self.site.store.add(stopped, most_queued=MOST_QUEUED), gr.update(visible=False)

    @guarded
    def show_plan(self, name: str, base: str, gib: float) -> str:
        draft = open_draft(self.site.drafts, name)
        return plan_text(base, len(draft.things) if draft and draft.things else 3, gib)

    def restore(self, name: str) -> list[Any]:
        try:
            draft = open_draft(self.site.drafts, name)
            return [*self.present(draft), gr.update(visible=interrupted(self.site) is not None)]
        except InputError:
            return [*self.present(None), gr.update(visible=interrupted(self.site) is not None)]


def learn_tab(site: Site, demo: gr.Blocks) -> None:
    """Builds the tab inside the caller's context."""
    draft_name = gr.State("")
    remembered = gr.BrowserState("", storage_key="mifo-draft")
    begun = gr.State(0)
    gr.Markdown("### 1. A photo\nOne photo with the things that you want to teach.")
    upload = gr.File(label="Photo (PNG, JPEG, WebP)", file_types=PICTURES, type="filepath", elem_id="learn-photo", height=120)
    gr.Markdown("### 2. The things in it\n"
                "Click on each thing, or drag a box around it. Look whether its colour covers all of it.")
    marks = canvas("mark", "learn-canvas")
    words = []
    with gr.Row(elem_classes="words"):
        for k in range(MAX_THINGS):
            words.append(gr.Textbox(label=f"Thing {k} ({NAMED_COLORS[k]}) is a", placeholder="red car", visible=False,
                                    max_lines=1, elem_id=f"word-{k}", elem_classes=f"thing-{k}", min_width=150))  # fmt: skip
    with gr.Row():
        which = gr.Dropdown([], label="A thing to correct or take away", elem_id="learn-which", min_width=150)
        remove = gr.Button("Take it away", min_width=120, elem_id="learn-remove")
    with gr.Accordion("Paint its mask by hand", open=False):
        painter = gr.ImageEditor(label="Paint over the thing; rub out what is too much", type="pil", sources=(), layers=False,
                                 transforms=(), elem_id="learn-painter",
                                 brush=gr.Brush(default_size=20, colors=["#e63946"], color_mode="fixed"))  # fmt: skip
        with gr.Row():
            show_mask = gr.Button("Show its mask here", min_width=140)
            use_mask = gr.Button("Use what is painted", min_width=140)
    notes = gr.Markdown(elem_id="learn-notes")
    gr.Markdown("### 3. Learn")
    with gr.Row():
        name = gr.Textbox(label="Name of the bundle", value=time.strftime("photo-%H%M"), max_lines=1, elem_id="learn-name",
                          min_width=150)  # fmt: skip
        model = gr.Textbox(label="Base model", value="toybox", max_lines=1, min_width=150, elem_id="learn-model",
                           info="toybox, sd1.5, sd2.1, sdxl, a hub id, or a folder")  # fmt: skip
    with gr.Accordion("Settings", open=False):
        with gr.Row():
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, min_width=120)
            tokens_steps = gr.Number(label="Steps of phase 1 (0: the preset's)", value=0, precision=0, minimum=0, min_width=150,
                                     elem_id="learn-steps1")  # fmt: skip
            lora_steps = gr.Number(label="Steps of phase 2 (0: the preset's)", value=0, precision=0, minimum=0, min_width=150,
                                   elem_id="learn-steps2")  # fmt: skip
        background = gr.Checkbox(label="Learn the background too", value=False)
        budget = gr.Slider(0, 48, value=0, step=1, label="GPU memory that may be used, GiB (0: as it comes)",
                           elem_id="learn-budget")  # fmt: skip
        planned = gr.Markdown(elem_id="learn-plan")
    start = gr.Button("Learn", variant="primary", elem_id="learn-start")
    resume = gr.Button("Go on with the learning that was stopped", visible=False, elem_id="learn-resume")

    does = LearnActions(site)
    shown = [draft_name, remembered, marks, which, notes, *words]
    upload.upload(does.take_photo, upload, shown)
    marks.input(does.mark, [draft_name, model, marks, *words], shown, show_progress="hidden")
    remove.click(does.take_away, [draft_name, model, which, *words], shown)
    show_mask.click(does.load_mask, [draft_name, which], painter)
    use_mask.click(does.store_mask, [draft_name, model, which, painter, *words], shown)
    budget.release(does.show_plan, [draft_name, model, budget], planned)
    start.click(does.begin, [draft_name, name, model, seed, tokens_steps, lora_steps, background, budget, *words],
                [begun, resume])  # fmt: skip
    resume.click(does.go_on, None, [begun, resume])
    demo.load(does.restore, remembered, [*shown, resume], show_progress="hidden")


def interrupted(site: Site) -> LearnJob | None:
    """The last learning job, if it was stopped or failed."""
    last = site.store.entries(limit=1, kind=LearnJob.kind)
    job = last[0].job if last and last[0].state in (CANCELLED, FAILED) else None
    return job if isinstance(job, LearnJob) else None


def mask_notes(photo: StoredImage, image: Image.Image, masks: Sequence[BoolArray], base: str) -> str:
    """What `mifo check` would say of the masks on that base model, before anything starts."""
    from ..data.instance import load_instance
    from ..data.mask_check import check_masks
    from ..learning.supervision import sizes_by_name

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photo"
        try:
            check_masks_of(masks)
            save_instance(folder, photo, image, masks, [])
            report = check_masks(load_instance(folder), sizes_by_name(base.strip() or "toybox", None))
        except InputError as error:
            return f"**{told(error)}**"
    lines = [MASK_FILE.sub(r"thing \1", told(line)) for line in (*report.notes, *report.warnings)]
    return "\n".join(f"- {line}" for line in lines) if lines else "The masks look good."


def plan_text(base: str, things: int, gib: float, check: bool = False) -> str:
    """What the planner says of a budget; empty for none."""
    if not gib:
        return ""
    from ..api import plan

    found = plan(base.strip() or "toybox", "learn", float(gib), assets=things)
    if check:
        found.check()
    peak = found.largest.peak / 2**30
    given_up = ", ".join(found.given_up) or "nothing"
    fits = "fits" if found.fits else "**does not fit**"
    return f"{fits}: {peak:.1f} GiB at most, of {gib:g}. Turned on for it: {given_up}. (On a CPU the budget does not bind.)"


def for_painting(image: Image.Image) -> Image.Image:
    """As large as a brush needs it, its longer side within PAINTED_SIDES."""
    side = max(image.size)
    scale = min(max(side, PAINTED_SIDES[0]), PAINTED_SIDES[1]) / side
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)


def painted_mask(painted: dict[str, Any] | None) -> Any:
    """(H, W) bool, where the editor's layers are painted; None where nothing is."""
    layers = (painted or {}).get("layers") or []
    found = None
    for layer in layers:
        alpha = np.asarray(layer.convert("RGBA"))[..., 3] > 40
        found = alpha if found is None else found | alpha
    return found if found is not None and found.any() else None


def _chosen(draft: Draft, index: Any) -> int:
    if not isinstance(index, int) or not 0 <= index < len(draft.things):
        raise InputError("no thing is chosen; mark one in the photo first")
    return index


def _floats(values: Any) -> list[float]:
    try:
        return [float(v) for v in values]
    except (TypeError, ValueError):
        raise InputError("that was no box and no point; try again") from None


def thing_styles() -> str:
    """CSS that gives the words of a thing its colour."""
    return "\n".join(f".thing-{k} {{ border-left: 6px solid {hex_color(k)} !important; }}" for k in range(MAX_THINGS))
