"""Masks from boxes on three photographs that scikit-image ships (`pip install -e '.[bench]'`), as a sheet to look at.

    python -m scripts.quality.draw_segment_photos

There is no truth to compare with; what is right and wrong with each is said beside the sheet, in docs/learn.md.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from mifo.boxes import Box, Layout
from mifo.io.sheets import ASSET_COLORS, caption_below, draw_boxes, grid, outline
from mifo.segmentation.segment import read_photo, segment

SIDE = 320  # pixels of a picture's longer side on the sheet
#: Photograph -> (what, box that a person would draw) of each thing.
PHOTOS: dict[str, list[tuple[str, tuple[float, float, float, float]]]] = {
    "coffee": [("cup with its saucer", (0.13, 0.02, 0.83, 0.99))],
    "chelsea": [("cat", (0.0, 0.0, 0.88, 1.0))],
    "astronaut": [("person", (0.08, 0.02, 0.72, 1.0)), ("model rocket", (0.74, 0.0, 0.93, 0.53))],
}


def main(sheet: Annotated[Path, typer.Option(help="The picture to write.")] = Path("docs/segment_photos.jpg")) -> None:
    from skimage import data

    cells = []
    for name, things in PHOTOS.items():
        with TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.png"
            Image.fromarray(getattr(data, name)()).save(path)
            photo, image = read_photo(path)
            found = segment(photo, image, [Box(*box) for _, box in things])
        scale = SIDE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        small = image.resize(size, Image.Resampling.LANCZOS)
        layout = Layout(tuple(f"<asset{k}>" for k in range(len(things))), tuple(Box(*box) for _, box in things))
        cells.append(caption_below(draw_boxes(small, layout), f"{name}: boxes"))
        shown = small
        for k, mask in enumerate(found.masks):
            drawn = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
            shown = outline(shown, drawn.point(lambda v: 255 if v >= 128 else 0), ASSET_COLORS[k])
        cells.append(caption_below(shown, ", ".join(what for what, _ in things)))
    grid(cells, columns=2).convert("RGB").save(sheet, quality=88)
    print(sheet)


if __name__ == "__main__":
    typer.run(main)
