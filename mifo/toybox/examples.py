"""The example instances, drawn by the world: scenes that the base model was not trained on, with their ground truth.

    toy_car  three cars of one shape: look-alikes that differ in colour and pattern
    shelf    three different things
    twins    two of one class and colour that differ in pattern only
    rare     two shapes that the training world does not have
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..io.json_text import json_text
from .world import Scene, Thing, draw_scene, placed

NOWHERE = (0.0, 0.0, 1.0, 1.0)
PIXELS = 256  # drawn larger than the model's 128, as a photo would be


def _thing(class_name: str, main: str, second: str, pattern: str, center: tuple[float, float], longer: float,
           flipped: bool = False) -> Thing:  # fmt: skip
    return placed(Thing(class_name, main, second, pattern, NOWHERE, flipped), center, longer)


EXAMPLES: dict[str, Scene] = {
    "toy_car": Scene((
        _thing("car", "red", "white", "striped", (0.27, 0.24), 0.42),
        _thing("car", "blue", "white", "plain", (0.72, 0.47), 0.42),
        _thing("car", "green", "yellow", "dotted", (0.31, 0.76), 0.42),
    ), "wooden floor", 11),
    "shelf": Scene((
        _thing("robot", "purple", "yellow", "striped", (0.22, 0.32), 0.40),
        _thing("mug", "orange", "white", "dotted", (0.70, 0.27), 0.36, True),
        _thing("mushroom", "cyan", "brown", "checkered", (0.54, 0.76), 0.38),
    ), "brick wall", 12),
    "twins": Scene((
        _thing("fish", "orange", "blue", "striped", (0.30, 0.30), 0.46),
        _thing("fish", "orange", "blue", "dotted", (0.68, 0.70), 0.46, True),
    ), "grass", 13),
    "rare": Scene((
        _thing("rocket", "red", "white", "checkered", (0.28, 0.46), 0.52),
        _thing("umbrella", "blue", "yellow", "striped", (0.70, 0.52), 0.46),
    ), "snow", 14),
}  # fmt: skip


def write_example(name: str, folder: Path, pixels: int = PIXELS) -> None:
    """Writes `img.png`, `mask0.png` .., `words.txt` and `truth.json` into `folder`."""
    write_instance(EXAMPLES[name], folder, pixels)


def write_instance(scene: Scene, folder: Path, pixels: int = PIXELS, words: Sequence[str] | None = None) -> None:
    """Any drawn scene as an instance folder; `words` default to each thing's own description."""
    drawing = draw_scene(scene, pixels)
    folder.mkdir(parents=True, exist_ok=True)
    drawing.image.save(folder / "img.png", optimize=True)
    for index, mask in enumerate(drawing.masks):
        mask.convert("1").save(folder / f"mask{index}.png", optimize=True)
    words = words or [thing.phrase().split(" ", 1)[1] for thing in scene.things]
    (folder / "words.txt").write_text("\n".join(words) + "\n")
    (folder / "truth.json").write_text(json_text(scene.truth(), indent=2) + "\n")
