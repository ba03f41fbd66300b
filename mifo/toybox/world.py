"""The toybox world: scenes by seed, their pictures, captions and exact ground truth.

Boxes are xyxy, normalized to [0, 1].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from .draw import BACKGROUNDS, CLASSES, COLORS, PATTERNS, RARE_CLASSES, SUPERSAMPLE, paint_background, paint_object

IMAGE_SIZE = 128  # pixels; the world is resolution-free, this is what the shipped model was trained at

CLASS_NAMES = tuple(CLASSES)
COLOR_NAMES = tuple(COLORS)
BACKGROUND_PHRASES = {
    "beach": "at the beach",
    "snow": "in the snow",
    "grass": "on the grass",
    "night": "at night",
    "brick wall": "in front of a brick wall",
    "wooden floor": "on a wooden floor",
    "plain": "on a plain background",
}
#: object sizes (longer side, as a fraction of the picture) by how many objects share the scene
SIZE_RANGE = {1: (0.38, 0.62), 2: (0.34, 0.48), 3: (0.30, 0.42), 4: (0.27, 0.38)}


@dataclass(frozen=True)
class Thing:
    """One object: what it is and where. `second` is only seen when `pattern` is not 'plain'."""

    class_name: str
    main: str
    second: str
    pattern: str
    box: tuple[float, float, float, float]
    flipped: bool = False

    def phrase(self, say_color: bool = True, say_pattern: bool = True, say_class: bool = True) -> str:
        """'a red and white striped car', or less of it."""
        words = []
        if say_color and say_pattern and self.pattern != "plain":
            words += [self.main, "and", self.second, self.pattern]
        elif say_color:
            words += [self.main]
        elif say_pattern and self.pattern != "plain":
            words += [self.pattern]
        words += [self.class_name if say_class else "toy"]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `seed` fixes the background's details."""

    things: tuple[Thing, ...]
    background: str
    seed: int = 0

    def caption(self) -> str:
        """Everything that can be said of it."""
        return compose_caption([t.phrase() for t in self.things], self.background)

    def truth(self) -> dict[str, Any]:
        """The ground truth as plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Drawing:
    """A drawn scene: `image` RGB, `masks[i]` the visible pixels of `scene.things[i]` as a mode-'L' image (0 or 255)."""

    scene: Scene
    image: Image.Image
    masks: tuple[Image.Image, ...]


def compose_caption(phrases: list[str], background: str | None = None, opening: str = "a photo of ") -> str:
    """'a photo of A and B at the beach'."""
    place = f" {BACKGROUND_PHRASES[background]}" if background else ""
    return f"{opening}{' and '.join(phrases)}{place}"


@dataclass(frozen=True)
class CaptionParts:
    """What one caption says: `phrases` are (index of the thing, words for it) in the order said."""

    opening: str
    phrases: tuple[tuple[int, str], ...]
    background: str | None

    def text(self) -> str:
        return compose_caption([p for _, p in self.phrases], self.background, self.opening) if self.phrases else ""


def random_caption_parts(scene: Scene, rng: np.random.Generator) -> CaptionParts:
    """All, some or little of what could be said; 10 % say nothing (for classifier-free guidance)."""
    if rng.random() < 0.10:
        return CaptionParts("", (), None)
    order = list(range(len(scene.things)))
    rng.shuffle(order)
    phrases = [(i, scene.things[i].phrase(rng.random() > 0.08, rng.random() > 0.06, rng.random() > 0.05)) for i in order]
    background = scene.background if rng.random() > 0.15 else None
    return CaptionParts("a photo of " if rng.random() < 0.85 else "", tuple(phrases), background)


def random_caption(scene: Scene, rng: np.random.Generator) -> str:
    """The text of `random_caption_parts`."""
    return random_caption_parts(scene, rng).text()


def random_thing(rng: np.random.Generator, count: int = 1, class_name: str | None = None) -> Thing:
    """A thing of random looks and size (for `count` things in the picture), at a random place inside the picture."""
    class_name = class_name or str(rng.choice(CLASS_NAMES))
    main, second = (str(c) for c in rng.choice(COLOR_NAMES, 2, replace=False))
    pattern = str(rng.choice(PATTERNS))
    aspect = {**CLASSES, **RARE_CLASSES}[class_name][1]
    longer = rng.uniform(*SIZE_RANGE[count])
    w, h = (longer, longer / aspect) if aspect > 1 else (longer * aspect, longer)
    x, y = rng.uniform(0.02, 0.98 - w), rng.uniform(0.02, 0.98 - h)
    return Thing(class_name, main, second, pattern, (x, y, x + w, y + h), bool(rng.random() < 0.5))


def _apart(box: tuple[float, ...], others: list[tuple[float, ...]], gap: float = 0.01) -> bool:
    return all(box[2] + gap <= o[0] or o[2] + gap <= box[0] or box[3] + gap <= o[1] or o[3] + gap <= box[1]
               for o in others)  # fmt: skip


def random_scene(seed: int, count: int | None = None) -> Scene:
    """A scene of `count` (default: 1-4, small counts more often) things that do not overlap. The same seed, the same scene."""
    rng = np.random.default_rng(seed)
    count = count or int(rng.choice([1, 2, 3, 4], p=[0.40, 0.34, 0.16, 0.10]))
    background = str(rng.choice(BACKGROUNDS))
    things: list[Thing] = []
    for _ in range(200 * count):
        if len(things) == count:
            break
        thing = random_thing(rng, count)
        if _apart(thing.box, [t.box for t in things]):
            things.append(thing)
    return Scene(tuple(things), background, int(rng.integers(2**31)))


def draw_scene(scene: Scene, size: int = IMAGE_SIZE) -> Drawing:
    """Draws later things over earlier ones. The same scene, the same pixels."""
    large = size * SUPERSAMPLE
    rng = np.random.default_rng(scene.seed)
    canvas = paint_background(scene.background, large, rng)
    unit_px = large / 64
    alphas: list[Image.Image] = []
    for thing in scene.things:
        x0, y0, x1, y1 = (round(v * large) for v in thing.box)
        tile, alpha = paint_object(thing.class_name, thing.main, thing.second, thing.pattern,
                                   (x1 - x0, y1 - y0), thing.flipped, unit_px)  # fmt: skip
        canvas.paste(tile, (x0, y0), alpha)
        for below in alphas:
            below.paste(0, (x0, y0), alpha)
        whole = Image.new("L", (large, large), 0)
        whole.paste(alpha, (x0, y0))
        alphas.append(whole)
    masks = tuple(a.reduce(SUPERSAMPLE).point(lambda v: 255 if v > 127 else 0) for a in alphas)
    return Drawing(scene, canvas.reduce(SUPERSAMPLE), masks)


def mask_box(mask: Image.Image) -> tuple[float, float, float, float] | None:
    """The mask's bounding box, xyxy normalized; None when the mask is empty."""
    box = mask.getbbox()
    if box is None:
        return None
    return (box[0] / mask.width, box[1] / mask.height, box[2] / mask.width, box[3] / mask.height)


def placed(thing: Thing, center: tuple[float, float], longer: float) -> Thing:
    """The same thing with its longer side `longer`, centred at `center` (fractions of the picture)."""
    aspect = {**CLASSES, **RARE_CLASSES}[thing.class_name][1]
    w, h = (longer, longer / aspect) if aspect > 1 else (longer * aspect, longer)
    x, y = center[0] - w / 2, center[1] - h / 2
    return replace(thing, box=(x, y, x + w, y + h))
