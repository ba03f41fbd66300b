"""The tab that places assets in new pictures."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..boxes import Box, Layout, parse_layout
from ..bundle.catalogue import Entry, list_bundles
from ..errors import InputError
from ..io.json_text import json_text
from ..io.sheets import draw_boxes, thumbnail
from ..jobs.job import SynthesizeJob
from ..prompts import BACKGROUND_TOKEN, asset_token, assets_in, check_prompt
from ..segmentation.segment import read_photo
from ..synthesis.recipe import read_recipe, read_record
from .canvas import Drawn, canvas, canvas_update, hex_color, picture_address, read_value, spread
from .learn_tab import PICTURES
from .site import MOST_QUEUED, Site, guarded

MAX_CHIPS = 16
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


@dataclass(frozen=True)
class Offer:
    """The assets of the chosen bundles: of the first `<asset0>` and so on, of others `<shelf.asset0>`."""

    bundles: tuple[str, ...]
    tokens: tuple[str, ...]
    captions: tuple[str, ...]
    """Of the chips"""

    def named_in(self, text: str) -> list[str]:
        """The things in a prompt, in its order."""
        lower = text.lower()
        found = {t: text.find(t) if "." in t else lower.find(t) for t in self.tokens if t != BACKGROUND_TOKEN}
        return sorted((token for token, place in found.items() if place >= 0), key=found.__getitem__)

    def numbered(self, text: str) -> str:
        """The prompt as if all were one bundle's."""
        for k, token in enumerate(self.tokens):
            if token != BACKGROUND_TOKEN:
                text = text.replace(token, asset_token(k))  # the first bundle's stay as they are
        return text

    def used_by(self, text: str) -> tuple[str, ...]:
        """The first bundle, and the others that the prompt names."""
        return tuple(name for k, name in enumerate(self.bundles) if k == 0 or f"<{name}." in text)


def offered(site: Site, first: Any, more: Any) -> Offer:
    """Raises InputError where there is no such bundle."""
    names = [first, *(name for name in more or [] if name != first)]
    entries = [entry_of(site, name) for name in names]
    tokens, captions = [], []
    for k, entry in enumerate(entries):
        things = [token for token in entry.tokens if k == 0 or token != BACKGROUND_TOKEN]
        own = [token if k == 0 else f"<{entry.name}.{token.strip('<>')}>" for token in things]
        tokens += own
        captions += [f"{shown} {entry.words[i] if i < len(entry.words) else ''}".strip() for i, shown in enumerate(own)]
    return Offer(tuple(entry.name for entry in entries), tuple(tokens), tuple(captions))


@dataclass(frozen=True)
class PlaceTab:
    """What the rest of the page uses of it."""

    begun: gr.State
    """The number of the job that it began last"""
    gallery: gr.Gallery
    bundle: gr.Dropdown
    more: gr.Dropdown
    """The bundles beside it"""
    shelf: gr.Gallery
    send: gr.Button
    """Sends the chosen picture to Edit"""
    chosen: gr.State


@dataclass(frozen=True)
class PlaceActions:
    """What the tab's parts do; each gives back the new values of what `place_tab` names as its outputs."""

    site: Site

    @guarded
    def choose(self, name: str | None, more: list[str]) -> list[Any]:
        if not name:
            return [canvas_update(Drawn("place"), ""), "", *[gr.update(visible=False)] * MAX_CHIPS]
        offer = offered(self.site, name, more)
        text = PROMPT.format(" and ".join(offer.tokens[:2]))
        return [canvas_update(_boxes_for(text, Drawn("place"), offer)), text, *_chips(offer)]

    @guarded
    def widen(self, name: str | None, more: list[str]) -> list[Any]:
        return _chips(offered(self.site, name, more)) if name else [gr.skip()] * MAX_CHIPS

    @guarded
    def insert(self, index: int, name: str, more: list[str], text: str, value: str) -> tuple[Any, str]:
        offer, drawn = offered(self.site, name, more), read_value(value)
        token = offer.tokens[index]
        if token not in text and token not in offer.named_in(text):
            joined = text.rstrip() if text.strip() else "a photo of"
            text = f"{joined} {'and ' if offer.named_in(text) else ''}{token}"
        return canvas_update(_boxes_for(text, drawn, offer)), text

    @guarded
    def add_next(self, name: str, more: list[str], text: str, value: str) -> tuple[Any, str]:
        offer, drawn = offered(self.site, name, more), read_value(value)
        free = [t for t in offer.tokens if t not in offer.named_in(text) and t != BACKGROUND_TOKEN]
        if not free:
            raise InputError("all assets of the chosen bundles are in the prompt already")
        text = f"{text.rstrip()} and {free[0]}"
        made = _boxes_for(text, drawn, offer)
        if drawn.boxes:
            x0, y0, x1, y1 = drawn.boxes[-1][1]
            left, top = min(x0 + 0.08, 1 - (x1 - x0)), min(y0 + 0.08, 1 - (y1 - y0))
            made = Drawn("place", made.aspect, (*made.boxes[:-1], (free[0], (left, top, left + x1 - x0, top + y1 - y0))))
        return canvas_update(made), text

    @guarded
    def follow_prompt(self, name: str | None, more: list[str], text: str, value: str) -> Any:
        return canvas_update(_boxes_for(text, read_value(value), offered(self.site, name, more))) if name else gr.skip()

    @guarded
    def put_under(self, path: str | None, value: str) -> Any:
        drawn = read_value(value)
        if not path:
            return canvas_update(Drawn("place", 1.0, drawn.boxes), "")
        image = read_photo(Path(path))[1]
        return canvas_update(Drawn("place", 1.0, drawn.boxes), picture_address(image))

    @guarded
    def begin(self, name: str, more: list[str], text: str, value: str, count: float, seed: float, best: float, steps: float,
              scale: float, contrast: float, negative: str) -> int:  # fmt: skip
        offer = offered(self.site, name, more)
        plain = offer.numbered(text)
        check_prompt(plain, [BACKGROUND_TOKEN if t == BACKGROUND_TOKEN else asset_token(k) for k, t in enumerate(offer.tokens)])
        named = offer.named_in(text)
        boxes = {label: [round(side, 4) for side in box] for label, box in read_value(value).boxes if label in named}
        parse_layout(json_text({offer.numbered(label): box for label, box in boxes.items()}), assets_in(plain))
        job = SynthesizeJob(text, offer.used_by(text), json_text(boxes) if boxes else None, int(seed),
                            int(count) if not best else 1, int(best) or None, int(steps) or None, float(scale) or None,
                            negative.strip() or None, contrast_scale=float(contrast) or None)  # fmt: skip
        return self.site.store.add(job, most_queued=MOST_QUEUED)

    @guarded
    def select(self, event: gr.SelectData, number: int) -> tuple[Any, ...]:
        path = picture_of(self.site, number, event.index)
        record = read_record(Path(path))
        return path, {k: v for k, v in record.items() if k != "base_fingerprint"}, *[gr.update(interactive=True)] * 2, \
            gr.update(interactive=True, value=path)  # fmt: skip

    @guarded
    def draw_again(self, path: str) -> int:
        made = read_recipe(Path(path))
        boxes = json_text(made.layout.to_json()) if made.layout else None
        config = made.config
        job = SynthesizeJob(made.prompt, made.bundles, boxes, made.seed, 1, None, config.steps, config.guidance_scale,
                            config.negative_prompt or None, config.width, config.height,
                            contrast_scale=config.contrast_scale or None)  # fmt: skip
        return self.site.store.add(job, most_queued=MOST_QUEUED)

    def take_from_shelf(self, event: gr.SelectData) -> Any:
        usable = [e for e in list_bundles(self.site.bundles) if not e.problem]
        return usable[event.index].name if event.index < len(usable) else gr.skip()

    def fill(self) -> tuple[Any, Any, Any]:
        choices = bundle_choices(self.site)
        return shelf_pictures(self.site), gr.update(choices=choices, value=choices[0][1] if choices else None), \
            gr.update(choices=choices)  # fmt: skip


def place_tab(site: Site, demo: gr.Blocks) -> PlaceTab:
    """Builds the tab inside the caller's context."""
    begun, chosen = gr.State(0), gr.State("")
    shelf = gr.Gallery(label="Bundles: choose one", columns=4, height=170, object_fit="contain", elem_id="place-shelf",
                       allow_preview=False, interactive=False, buttons=[])  # fmt: skip
    bundle = gr.Dropdown([], label="Bundle", elem_id="place-bundle")
    more = gr.Dropdown([], label="Things of other photos beside it: choose their bundles", multiselect=True, elem_id="place-more")
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
        contrast = gr.Number(label="Away from the other things (0: not, 1: look-alikes)", value=0, minimum=0, maximum=10,
                             min_width=150, elem_id="place-contrast")  # fmt: skip
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

    does = PlaceActions(site)
    words_shown = [layout, prompt, *chips]
    bundle.change(does.choose, [bundle, more], words_shown)
    more.change(does.widen, [bundle, more], chips, show_progress="hidden")
    shelf.select(does.take_from_shelf, None, bundle)
    for k, chip in enumerate(chips):
        chip.click(lambda name, more, text, value, k=k: does.insert(k, name, more, text, value), [bundle, more, prompt, layout],
                   [layout, prompt], show_progress="hidden")  # fmt: skip
    add.click(does.add_next, [bundle, more, prompt, layout], [layout, prompt], show_progress="hidden")
    clear.click(does.choose, [bundle, more], words_shown)
    prompt.blur(does.follow_prompt, [bundle, more, prompt, layout], layout, show_progress="hidden")
    under.change(does.put_under, [under, layout], layout)
    draw.click(does.begin, [bundle, more, prompt, layout, count, seed, best_of, steps, guidance, contrast, negative], begun)
    gallery.select(does.select, begun, [chosen, recipe, again, send, download])
    again.click(does.draw_again, chosen, begun)
    with_boxes.change(lambda number, wanted: gallery_pictures(site, number, wanted), [begun, with_boxes], gallery)
    begun.change(lambda number, wanted: gallery_pictures(site, number, wanted), [begun, with_boxes], gallery)
    demo.load(does.fill, None, [shelf, bundle, more], show_progress="hidden")
    return PlaceTab(begun, gallery, bundle, more, shelf, send, chosen)


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
            asked = json.loads(job.boxes)  # type: ignore[attr-defined]
            layout = Layout(tuple(asked), tuple(Box(*box) for box in asked.values()))
            shown.append((draw_boxes(thumbnail(image.convert("RGB")), layout), caption))
    return shown


def _boxes_for(text: str, drawn: Drawn, offer: Offer) -> Drawn:
    """Every asset of the prompt has its box: the one that it had, or a new one; boxes that nobody has touched make room."""
    wanted = offer.named_in(text)
    made = spread([label for label, _ in drawn.boxes])
    untouched = all(math.isclose(a, b, abs_tol=1e-6) for (_, old), (_, new) in zip(drawn.boxes, made, strict=True)
                    for a, b in zip(old, new, strict=True))  # fmt: skip
    there = {} if untouched else dict(drawn.boxes)
    new = dict(spread(wanted))
    return Drawn("place", drawn.aspect, tuple((t, there.get(t, new[t])) for t in wanted))


def _chips(offer: Offer) -> list[Any]:
    """A button for each asset."""
    shown = offer.captions[:MAX_CHIPS]
    return [gr.update(visible=k < len(shown), value=shown[k] if k < len(shown) else "") for k in range(MAX_CHIPS)]


def chip_styles() -> str:
    return "\n".join(f"#chip-{k} {{ border-left: 6px solid {hex_color(k)}; }}" for k in range(MAX_CHIPS))
