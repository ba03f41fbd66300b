"""The one component that Gradio has not got: boxes on a picture, drawn, moved and resized by pointer and by keyboard.

`gradio-image-annotation` comes closest, but arrow keys move none of its boxes, it tells no clicks, and needs a picture.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..io.json_text import json_text
from ..io.sheets import ASSET_COLORS

HERE = Path(__file__).parent  # canvas.css and canvas.js lie beside
TEMPLATE = '<div class="mifo-canvas"></div>'
SHOWN_SIDE = 1024  # pixels of a picture's longer side in the page


@dataclass(frozen=True)
class Drawn:
    """What is on the canvas."""

    mode: str
    """'mark' (a photo's things) or 'place' (assets in a new picture)"""
    aspect: float = 1.0
    """Width by height"""
    boxes: tuple[tuple[str, tuple[float, float, float, float]], ...] = ()
    """(label, box)"""
    points: tuple[tuple[float, float], ...] = ()
    added: dict[str, Any] = field(default_factory=dict)
    """What the last action was, in 'mark': a "box", a "point", or the number that was "removed"."""

    def to_value(self) -> str:
        boxes = [{"label": label, "color": hex_color(k), "box": list(box)} for k, (label, box) in enumerate(self.boxes)]
        return json_text({"mode": self.mode, "aspect": self.aspect, "boxes": boxes, "points": [list(p) for p in self.points]})


def read_value(value: Any) -> Drawn:
    """What the page sent. A page can send anything: what is no box is left out."""
    try:
        data = json.loads(value)
        boxes = tuple((str(each["label"])[:120], _numbers(each["box"], 4)) for each in data["boxes"][:100])
        points = tuple(_numbers(each, 2) for each in (data.get("points") or ())[:100])
        added = data.get("added")
        return Drawn("mark" if data.get("mode") == "mark" else "place", float(data.get("aspect") or 1), boxes,  # type: ignore[arg-type]
                     points, added if isinstance(added, dict) else {})  # type: ignore[arg-type]  # fmt: skip
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Drawn("place")


def _numbers(values: Any, count: int) -> tuple[float, ...]:
    found = tuple(min(1.0, max(0.0, float(v))) for v in values)
    if len(found) != count or any(v != v for v in found):
        raise ValueError("no numbers")
    return found


def hex_color(index: int) -> str:
    """Of asset or thing `index`, as everywhere in mifo's pictures."""
    return "#{:02x}{:02x}{:02x}".format(*ASSET_COLORS[index % len(ASSET_COLORS)])


def canvas(mode: str, name: str) -> gr.HTML:
    """The component; its value is `Drawn.to_value`, its prop `image` an address such as `picture_address` makes."""
    return gr.HTML(Drawn(mode).to_value(), html_template=TEMPLATE, css_template=(HERE / "canvas.css").read_text(),
                   js_on_load=(HERE / "canvas.js").read_text(), elem_id=name, image="")  # fmt: skip


def canvas_update(drawn: Drawn, image: str | None = None) -> Any:
    """`image` None leaves the picture as it is."""
    return gr.update(value=drawn.to_value(), **({} if image is None else {"image": image}))


def picture_address(image: Image.Image | None) -> str:
    """The picture itself, as text: no file is served for it."""
    if image is None:
        return ""
    small = image.convert("RGB")
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    if max(small.size) < SHOWN_SIDE // 2:
        scale = SHOWN_SIDE // 2 // max(small.size)
        small = small.resize((small.width * scale, small.height * scale), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spread(labels: Sequence[str]) -> tuple[tuple[str, tuple[float, float, float, float]], ...]:
    """Square boxes beside each other for things that have none yet, in rows; the last row stands in the middle."""
    columns = max(1, math.ceil(math.sqrt(len(labels))))
    rows = max(1, math.ceil(len(labels) / columns))
    side, found = 0.84 / max(columns, 2), []
    for k, label in enumerate(labels):
        row = k // columns
        in_row = min(columns, len(labels) - row * columns)
        x, y = 0.5 + (k % columns - (in_row - 1) / 2) / columns, (row + 0.5) / rows
        found.append((label, (x - side / 2, y - side / 2, x + side / 2, y + side / 2)))
    return tuple(found)
