"""Small drawing helpers for sheets that explain themselves: grids, captions, boxes, outlines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

if TYPE_CHECKING:
    import torch

RGB = tuple[int, int, int]
ASSET_COLORS: tuple[RGB, ...] = (
    (230, 57, 70), (29, 120, 220), (42, 157, 80), (244, 162, 20), (150, 70, 200), (20, 180, 190), (240, 100, 170), (120, 90, 60),
)  # fmt: skip
#: The pages of a contact sheet.
SHEET_NAME = re.compile(r"contact(-\d+)?\.png")
CELLS_A_PAGE = 64
MAX_CELL = 512  # pixels of a cell's longer side
PAPER: RGB = (255, 255, 255)
TEXT: RGB = (40, 40, 48)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> RGB images."""
    arrays = (pixels.float().cpu() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(a) for a in arrays]


def pixels_to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB image -> (1, 3, H, W) in [-1, 1]."""
    import numpy as np
    import torch

    array = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
    return array.permute(2, 0, 1)[None].float() / 127.5 - 1


def caption_below(image: Image.Image, text: str, size: int = 13) -> Image.Image:
    """The image on white, its caption centred below, cut to the image's width."""
    font = ImageFont.load_default(size)
    while len(text) > 1 and font.getlength(text) > image.width - 2:
        text = text[:-2].rstrip() + "…"
    out = Image.new("RGB", (image.width, image.height + size + 7), PAPER)
    out.paste(image, (0, 0))
    ImageDraw.Draw(out).text((image.width / 2, image.height + 2), text, TEXT, font, anchor="ma")
    return out


def grid(cells: Sequence[Image.Image], columns: int, gap: int = 6) -> Image.Image:
    """Cells in rows of `columns`, each cell as large as the largest."""
    width, height = max(c.width for c in cells), max(c.height for c in cells)
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for k, cell in enumerate(cells):
        sheet.paste(cell, (gap + (k % columns) * (width + gap), gap + (k // columns) * (height + gap)))
    return sheet


def outline(image: Image.Image, mask: Image.Image, color: RGB) -> Image.Image:
    """The image with the mask's edge drawn on it; `mask` is mode 'L' of the same size."""
    width = max(3, 2 * (max(image.size) // 128) + 1)
    edge = ImageChops.difference(mask.filter(ImageFilter.MaxFilter(width)), mask.filter(ImageFilter.MinFilter(width)))
    out = image.copy()
    out.paste(color, (0, 0), edge)
    return out


class _Box(Protocol):
    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]: ...


def draw_boxes(image: Image.Image, layout: Iterable[tuple[str, _Box]]) -> Image.Image:
    """The image with each box of a layout and its asset's name."""
    out = image.convert("RGB")
    draw = ImageDraw.Draw(out)
    width = max(2, out.width // 160)
    font = ImageFont.load_default(max(10, out.width // 20))
    for index, (token, box) in enumerate(layout):
        color = ASSET_COLORS[index % len(ASSET_COLORS)]
        x0, y0, x1, y1 = box.pixels(out.width, out.height)
        draw.rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=color, width=width)
        draw.text((x0 + 2 * width, y0 + width), token.strip("<>"), fill=color, font=font, stroke_width=2, stroke_fill=PAPER)
    return out


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """At least `side` pixels wide: small pictures grow by a whole factor, so that pixels stay sharp."""
    factor = max(1, round(side / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def thumbnail(image: Image.Image, side: int = 256) -> Image.Image:
    """For a cell of a sheet: small pictures enlarged as `enlarge` does, large ones shrunk to MAX_CELL."""
    scale = MAX_CELL / max(image.size)
    if scale >= 1:
        return enlarge(image, side)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def save_sheets(folder: Path, cells: Iterable[Image.Image], columns: int) -> list[Path]:
    """`contact.png`, `contact-2.png` and so on, CELLS_A_PAGE cells each; no more than one page's cells are held at a time."""
    paths = []
    for number, page in enumerate(_pages(cells), 1):
        paths.append(folder / ("contact.png" if number == 1 else f"contact-{number}.png"))
        grid(page, columns=min(columns, len(page))).save(paths[-1], "PNG")
    return paths


def sheets_in(folder: Path) -> list[str]:
    """The pages of the contact sheet in a folder of results, in order."""
    names = [path.name for path in folder.iterdir() if SHEET_NAME.fullmatch(path.name)]
    return [str(folder / name) for name in sorted(names, key=lambda name: (len(name), name))]


def _pages(cells: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    page: list[Image.Image] = []
    for cell in cells:
        page.append(cell)
        if len(page) == CELLS_A_PAGE:
            yield page
            page = []
    if page:
        yield page
