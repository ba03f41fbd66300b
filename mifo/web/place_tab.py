"""The tab that places assets in new pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..boxes import parse_layout
from ..bundle.catalogue import Entry, list_bundles
from ..errors import InputError
from ..io.json_text import json_text
from ..io.sheets import draw_boxes, thumbnail
from ..jobs.job import SynthesizeJob
from ..prompts import assets_in, check_prompt
from ..segmentation.segment import read_photo
from ..synthesis.recipe import read_recipe, read_record
from .canvas import Drawn, canvas, canvas_update, hex_color, picture_address, read_value, spread
from .learn_tab import PICTURES
from .site import MOST_QUEUED, Site, guarded

MAX_CHIPS = 10
PROMPT = "a photo of {}"


def bundle_choices(site: Site) -> list[tuple[str, str]]:
    """(what is shown, name) of every bundle that can be used."""
    return [(f"{e.name} ({', '.join(e.words or e.tokens)})", e.name) for e in list_bundles(site.bundles) if not e.problem]


def entry_of(site: Site, name: Any) -> Entry:
    """Raises InputError where there is no such bundle."""
    for entry in list_bundles(site.bundles):
        if entry.name == name and not entry.problem:
            return entry
    raise InputError("no bundle is chosen; learn a photo first, or choose one of the list")


Parts = tuple[gr.State, gr.Gallery, gr.Dropdown, gr.Gallery, gr.Button, gr.State]


def place_tab(site: Site, demo: gr.Blocks) -> Parts:
    """Builds the tab inside the caller's context; returns the number of the job that it began last, its gallery, its bundle,
    its shelf of bundles, its button "send to Edit", and the picture that is chosen."""
    begun, chosen = gr.State(0), gr.State("")
    shelf = gr.Gallery(label="Bundles: choose one", columns=4, height=170, object_fit="contain", elem_id="place-shelf",
                       allow_preview=False, interactive=False, buttons=[])  # fmt: skip
    bundle = gr.Dropdown([], label="Bundle", elem_id="place-bundle")
    prompt = gr.Textbox(label="Prompt", elem_id="place-prompt", placeholder="a photo of <asset0> in the snow", lines=2)
    gr.Markdown("A click on an asset puts its word into the prompt and a box onto the picture.")
    with gr.Row(elem_classes="chips"):
        chips = [gr.Button("", visible=False, size="sm", min_width=90, elem_id=f"chip-{k}", elem_classes=f"thing-{k % 8}")
                 for k in range(MAX_CHIPS)]  # fmt: skip
    layout = canvas("place", "place-canvas")
    with gr.Row():
        add = gr.Button("Add the next asset, as large as the last", size="sm", min_width=150)
        clear = gr.Button("Start over", size="sm", min_width=100)
    with gr.Accordion("A picture under the boxes", open=False):
        under = gr.File(label="Only to place boxes by; it is not drawn", file_types=PICTURES, type="filepath", height=100)
    with gr.Row():
        count = gr.Slider(1, 16, value=1, step=1, label="Pictures", min_width=140, elem_id="place-count")
        seed = gr.Number(label="Seed of the first", value=0, precision=0, minimum=0, min_width=120, elem_id="place-seed")
        best_of = gr.Slider(0, 16, value=0, step=1, label="Best of (0: keep all)", min_width=140, elem_id="place-best")
    with gr.Accordion("Settings", open=False), gr.Row():
        steps = gr.Number(label="Steps (0: the preset's)", value=0, precision=0, minimum=0, min_width=120, elem_id="place-steps")
        guidance = gr.Number(label="Guidance scale (0: the preset's)", value=0, minimum=0, min_width=120)
        negative = gr.Textbox(label="Negative prompt", max_lines=1, min_width=150)
    draw = gr.Button("Draw", variant="primary", elem_id="place-draw")
    with_boxes = gr.Checkbox(label="Show the boxes on the pictures", value=False, elem_id="place-show-boxes")
    gallery = gr.Gallery(label="Pictures", columns=4, object_fit="contain", elem_id="place-gallery", interactive=False,
                         format="png", buttons=["download", "fullscreen"])  # fmt: skip
    with gr.Row():
        again = gr.Button("Same seed again", size="sm", min_width=120, interactive=False, elem_id="place-again")
        send = gr.Button("Send to Edit", size="sm", min_width=120, interactive=False, elem_id="place-send")
        download = gr.DownloadButton("Download", size="sm", min_width=120, interactive=False)
    recipe = gr.JSON(label="How the chosen picture was made", elem_id="place-recipe", open=False)
    words_shown = [layout, prompt, *chips]

    def boxes_for(text: str, drawn: Drawn, tokens: tuple[str, ...]) -> Drawn:
        """Every asset of the prompt has its box: the one that it had, or a new one; boxes that nobody has touched make room."""
        wanted = [t for t in assets_in(text) if t in tokens]
        made = spread([label for label, _ in drawn.boxes])
        untouched = all(math.isclose(a, b, abs_tol=1e-6) for (_, old), (_, new) in zip(drawn.boxes, made, strict=True)
                        for a, b in zip(old, new, strict=True))  # fmt: skip
        there = {} if untouched else dict(drawn.boxes)
        new = dict(spread(wanted))
        return Drawn("place", drawn.aspect, tuple((t, there.get(t, new[t])) for t in wanted))

    @guarded
    def choose(name: str | None) -> list[Any]:
        if not name:
            return [canvas_update(Drawn("place"), ""), "", *[gr.update(visible=False)] * MAX_CHIPS]
        entry = entry_of(site, name)
        buttons = [gr.update(visible=k < len(entry.tokens), value=_chip(entry, k)) for k in range(MAX_CHIPS)]
        text = PROMPT.format(" and ".join(entry.tokens[:2]))
        return [canvas_update(boxes_for(text, Drawn("place"), entry.tokens)), text, *buttons]

    @guarded
    def insert(index: int, name: str, text: str, value: str) -> tuple[Any, str]:
        entry, drawn = entry_of(site, name), read_value(value)
        token = entry.tokens[index]
        if token not in assets_in(text):
            joined = text.rstrip() if text.strip() else "a photo of"
            text = f"{joined} {'and ' if assets_in(text) else ''}{token}"
        return canvas_update(boxes_for(text, drawn, entry.tokens)), text

    @guarded
    def add_next(name: str, text: str, value: str) -> tuple[Any, str]:
        entry, drawn = entry_of(site, name), read_value(value)
        free = [t for t in entry.tokens if t not in assets_in(text)]
        if not free:
            raise InputError("all assets of this bundle are in the prompt already")
        text = f"{text.rstrip()} and {free[0]}"
        made = boxes_for(text, drawn, entry.tokens)
        if drawn.boxes:
            x0, y0, x1, y1 = drawn.boxes[-1][1]
            left, top = min(x0 + 0.08, 1 - (x1 - x0)), min(y0 + 0.08, 1 - (y1 - y0))
            made = Drawn("place", made.aspect, (*made.boxes[:-1], (free[0], (left, top, left + x1 - x0, top + y1 - y0))))
        return canvas_update(made), text

    @guarded
    def follow_prompt(name: str | None, text: str, value: str) -> Any:
        return canvas_update(boxes_for(text, read_value(value), entry_of(site, name).tokens)) if name else gr.skip()

    @guarded
    def put_under(path: str | None, value: str) -> Any:
        drawn = read_value(value)
        if not path:
            return canvas_update(Drawn("place", 1.0, drawn.boxes), "")
        image = read_photo(Path(path))[1]
        return canvas_update(Drawn("place", 1.0, drawn.boxes), picture_address(image))

    @guarded
    def begin(name: str, text: str, value: str, count: float, seed: float, best: float, steps: float, scale: float,
              negative: str) -> int:  # fmt: skip
        entry = entry_of(site, name)
        check_prompt(text, entry.tokens)
        boxes = {label: list(box) for label, box in read_value(value).boxes if label in assets_in(text)}
        parse_layout(json_text(boxes), assets_in(text))
        job = SynthesizeJob(text, (name,), json_text(boxes) if boxes else None, int(seed), int(count) if not best else 1,
                            int(best) or None, int(steps) or None, float(scale) or None, negative.strip() or None)  # fmt: skip
        return site.store.add(job, most_queued=MOST_QUEUED)

    @guarded
    def select(event: gr.SelectData, number: int) -> tuple[Any, ...]:
        path = picture_of(site, number, event.index)
        record = read_record(Path(path))
        return path, {k: v for k, v in record.items() if k != "base_fingerprint"}, *[gr.update(interactive=True)] * 2, \
            gr.update(interactive=True, value=path)  # fmt: skip

    @guarded
    def draw_again(path: str) -> int:
        made = read_recipe(Path(path))
        boxes = json_text(made.layout.to_json()) if made.layout else None
        config = made.config
        return site.store.add(SynthesizeJob(made.prompt, made.bundles, boxes, made.seed, 1, None,
                                            config.steps, config.guidance_scale, config.negative_prompt or None, config.width,
                                            config.height), most_queued=MOST_QUEUED)  # fmt: skip

    def take_from_shelf(event: gr.SelectData) -> Any:
        usable = [e for e in list_bundles(site.bundles) if not e.problem]
        return usable[event.index].name if event.index < len(usable) else gr.skip()

    def fill() -> tuple[Any, Any]:
        choices = bundle_choices(site)
        return shelf_pictures(site), gr.update(choices=choices, value=choices[0][1] if choices else None)

    bundle.change(choose, bundle, words_shown)
    shelf.select(take_from_shelf, None, bundle)
    for k, chip in enumerate(chips):
        chip.click(lambda name, text, value, k=k: insert(k, name, text, value), [bundle, prompt, layout], [layout, prompt],
                   show_progress="hidden")  # fmt: skip
    add.click(add_next, [bundle, prompt, layout], [layout, prompt], show_progress="hidden")
    clear.click(choose, bundle, words_shown)
    prompt.blur(follow_prompt, [bundle, prompt, layout], layout, show_progress="hidden")
    under.change(put_under, [under, layout], layout)
    draw.click(begin, [bundle, prompt, layout, count, seed, best_of, steps, guidance, negative], begun)
    gallery.select(select, begun, [chosen, recipe, again, send, download])
    again.click(draw_again, chosen, begun)
    with_boxes.change(lambda number, wanted: gallery_pictures(site, number, wanted), [begun, with_boxes], gallery)
    begun.change(lambda number, wanted: gallery_pictures(site, number, wanted), [begun, with_boxes], gallery)
    demo.load(fill, None, [shelf, bundle], show_progress="hidden")
    return begun, gallery, bundle, shelf, send, chosen


def shelf_pictures(site: Site) -> list[tuple[Any, str]]:
    """The photo that each bundle was learned from, or else what was drawn with it."""
    return [(_picture(e), e.name) for e in list_bundles(site.bundles) if not e.problem]


def _picture(entry: Entry) -> Any:
    photos = [p for p in sorted((Path(entry.folder) / "instance").glob("img.*")) if p.suffix in PICTURES]
    for path in (*photos, *([Path(entry.preview)] if entry.preview else [])):
        try:
            small = read_photo(path)[1]
        except InputError:
            continue
        return thumbnail(small, 256)
    return Image.new("RGB", (256, 256), "#dddddd")


def picture_of(site: Site, number: int, index: int) -> str:
    """The file of a finished job's picture. Raises InputError."""
    entry = site.store.get(int(number))
    images = (entry.result or {}).get("images", []) if entry else []
    if not 0 <= index < len(images):
        raise InputError("that picture is not there any more; draw it again")
    return str(images[index])


def gallery_pictures(site: Site, number: int, with_boxes: bool = False) -> Any:
    """(picture, caption) of a finished job; nothing while it runs."""
    entry = site.store.get(int(number)) if number else None
    if entry is None or not entry.result:
        return []
    job = entry.job
    scores = entry.result.get("best_of") or []
    shown = []
    for k, path in enumerate(entry.result["images"]):
        seed = scores[0]["seed"] if scores else getattr(job, "seed", 0) + k
        caption = f"seed {seed}" + (f", score {scores[0]['score']}" if scores else "")
        if not with_boxes or not getattr(job, "boxes", None):
            shown.append((path, caption))
            continue
        with Image.open(path) as image:
            layout = parse_layout(job.boxes, assets_in(job.prompt))  # type: ignore[attr-defined]
            shown.append((draw_boxes(thumbnail(image.convert("RGB")), layout), caption))
    return shown


def _chip(entry: Entry, index: int) -> str:
    if index >= len(entry.tokens):
        return ""
    word = entry.words[index] if index < len(entry.words) else ""
    return f"{entry.tokens[index]} {word}".strip()


def chip_styles() -> str:
    return "\n".join(f"#chip-{k} {{ border-left: 6px solid {hex_color(k)}; }}" for k in range(MAX_CHIPS))
