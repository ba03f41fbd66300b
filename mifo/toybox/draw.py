"""Paints the toybox world: objects and backgrounds, drawn large with Pillow and scaled down.

Coordinates inside an object are fractions of its box, (0, 0) top left, (1, 1) bottom right.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLE = 4  # everything is drawn this many times larger, then averaged down

COLORS: dict[str, RGB] = {
    "red": (222, 32, 38),
    "orange": (248, 132, 16),
    "yellow": (250, 222, 40),
    "green": (34, 150, 54),
    "cyan": (60, 214, 214),
    "blue": (34, 70, 214),
    "purple": (128, 44, 170),
    "pink": (250, 138, 190),
    "brown": (122, 70, 32),
    "gray": (136, 140, 146),
    "white": (246, 246, 246),
    "black": (34, 34, 38),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("beach", "snow", "grass", "night", "brick wall", "wooden floor", "plain")

INK: RGB = (28, 24, 34)
GLASS: RGB = (196, 230, 250)
CREAM: RGB = (250, 238, 214)


class Painter:
    """Draws one object on an RGBA tile. Fill `body` is the patterned fill, `main` the plain main colour."""

    def __init__(self, width_px: int, height_px: int, main: RGB, second: RGB, pattern: str, unit_px: float):
        self.size = (width_px, height_px)
        self.main = main
        self.line_px = max(2, round(unit_px))
        self.tile = Image.new("RGB", self.size, main)
        self.alpha = Image.new("L", self.size, 0)
        self.body = _pattern_tile(self.size, main, second, pattern, unit_px)
        self._draw = ImageDraw.Draw(self.tile)
        self._draw_alpha = ImageDraw.Draw(self.alpha)

    def _scaled(self, points: list[Point]) -> list[Point]:
        w, h = self.size[0] - 1, self.size[1] - 1
        return [(x * w, y * h) for x, y in points]

    def _paint(self, shape: str, points: list[Point], fill: str | RGB, **options: float) -> None:
        points = self._scaled(points)
        getattr(self._draw_alpha, shape)(points, fill=255, **options)
        if fill == "body":
            mask = Image.new("L", self.size, 0)
            getattr(ImageDraw.Draw(mask), shape)(points, fill=255, **options)
            self.tile.paste(self.body, mask=mask)
        color = None if fill == "body" else self.main if fill == "main" else fill
        getattr(self._draw, shape)(points, fill=color, outline=INK, width=self.line_px, **options)

    def ellipse(self, box: tuple[float, float, float, float], fill: str | RGB) -> None:
        self._paint("ellipse", [box[:2], box[2:]], fill)

    def rounded(self, box: tuple[float, float, float, float], fill: str | RGB, radius: float = 0.12) -> None:
        self._paint("rounded_rectangle", [box[:2], box[2:]], fill, radius=radius * min(self.size))

    def polygon(self, points: list[Point], fill: str | RGB) -> None:
        self._paint("polygon", points, fill)

    def arc(self, box: tuple[float, float, float, float], start: float, end: float, color: RGB, width: float) -> None:
        """An inked band from `start` to `end` degrees; `width` is a fraction of the object's smaller side."""
        points, px = self._scaled([box[:2], box[2:]]), max(3, round(width * min(self.size)))
        self._draw_alpha.arc(points, start, end, fill=255, width=px)
        self._draw.arc(points, start, end, fill=INK, width=px)
        inner = [(points[0][0] + self.line_px, points[0][1] + self.line_px),
                 (points[1][0] - self.line_px, points[1][1] - self.line_px)]  # fmt: skip
        self._draw.arc(inner, start, end, fill=color, width=max(1, px - 2 * self.line_px))

    def dot(self, x: float, y: float, radius: float, color: RGB) -> None:
        """A filled disc without outline; `radius` is a fraction of the object's smaller side."""
        (cx, cy), r = self._scaled([(x, y)])[0], radius * min(self.size)
        self._draw.ellipse([cx - r, cy - r, cx + r, cy + r], fill=color)
        self._draw_alpha.ellipse([cx - r, cy - r, cx + r, cy + r], fill=255)


def _pattern_tile(size: tuple[int, int], main: RGB, second: RGB, pattern: str, unit_px: float) -> Image.Image:
    """The body's paint: `unit_px` is one pixel of the finished picture, so patterns survive scaling down."""
    w, h = size
    if pattern == "plain":
        return Image.new("RGB", size, main)
    ys, xs = np.mgrid[0:h, 0:w]
    side = min(w, h)
    if pattern == "striped":  # upright stripes, 56 % main colour
        period = max(7.0 * unit_px, side / 4.2)
        use_second = (xs - w / 2 + 0.28 * period) % period > 0.56 * period
    elif pattern == "checkered":
        cell = max(4.0 * unit_px, side / 6.5)
        use_second = (np.floor((xs - w / 2) / cell) + np.floor((ys - h / 2) / cell)) % 2 == 0
    else:  # dotted, rows shifted by half a step
        step = max(7.0 * unit_px, side / 3.9)
        row = np.floor((ys - h / 2) / (0.86 * step))
        dx = (xs - w / 2 + row * step / 2) % step - step / 2
        dy = (ys - h / 2) % (0.86 * step) - 0.43 * step
        use_second = dx**2 + dy**2 < (0.31 * step) ** 2
    tile = np.where(use_second[..., None], np.array(second), np.array(main)).astype(np.uint8)
    return Image.fromarray(tile)


# --- the classes ------------------------------------------------------------------------------


def _car(p: Painter) -> None:
    p.polygon([(0.22, 0.50), (0.34, 0.06), (0.70, 0.06), (0.86, 0.50)], "main")
    p.polygon([(0.33, 0.44), (0.40, 0.16), (0.51, 0.16), (0.51, 0.44)], GLASS)
    p.polygon([(0.57, 0.44), (0.57, 0.16), (0.66, 0.16), (0.75, 0.44)], GLASS)
    p.rounded((0.0, 0.36, 1.0, 0.84), "body", 0.16)
    for x in (0.24, 0.76):
        p.ellipse((x - 0.125, 0.62, x + 0.125, 1.0), INK)
        p.dot(x, 0.81, 0.09, (214, 214, 220))


def _fish(p: Painter) -> None:
    p.polygon([(0.30, 0.5), (0.0, 0.10), (0.06, 0.5), (0.0, 0.90)], "main")
    p.polygon([(0.42, 0.22), (0.58, 0.0), (0.72, 0.22)], "main")
    p.ellipse((0.16, 0.13, 1.0, 0.97), "body")
    p.dot(0.82, 0.44, 0.10, (250, 250, 250))
    p.dot(0.84, 0.45, 0.055, INK)


def _balloon(p: Painter) -> None:
    p.polygon([(0.485, 0.80), (0.515, 0.80), (0.56, 1.0), (0.50, 0.98)], INK)
    p.polygon([(0.36, 0.86), (0.5, 0.72), (0.64, 0.86)], "main")
    p.ellipse((0.02, 0.0, 0.98, 0.80), "body")


def _mug(p: Painter) -> None:
    p.arc((0.56, 0.20, 1.0, 0.76), -95, 95, p.main, 0.17)
    p.rounded((0.0, 0.06, 0.76, 1.0), "body", 0.14)
    p.ellipse((0.0, 0.0, 0.76, 0.22), CREAM)


def _house(p: Painter) -> None:
    p.rounded((0.10, 0.40, 0.90, 1.0), "body", 0.02)
    p.polygon([(0.0, 0.46), (0.5, 0.0), (1.0, 0.46)], "main")
    p.rounded((0.40, 0.64, 0.60, 1.0), CREAM, 0.02)


def _star(p: Painter) -> None:
    tips = []
    for k in range(10):
        radius, angle = (0.54 if k % 2 == 0 else 0.27), np.pi * k / 5 - np.pi / 2
        tips.append((0.5 + radius * np.cos(angle), 0.54 + radius * np.sin(angle)))
    p.polygon(tips, "body")
    for x in (0.41, 0.59):
        p.dot(x, 0.50, 0.07, INK)


def _mushroom(p: Painter) -> None:
    p.rounded((0.33, 0.45, 0.67, 1.0), CREAM, 0.14)
    p._paint("pieslice", [(0.0, 0.0), (1.0, 1.24)], "body", start=180, end=360)


def _robot(p: Painter) -> None:
    p.rounded((0.0, 0.48, 0.18, 0.80), "main", 0.06)
    p.rounded((0.82, 0.48, 1.0, 0.80), "main", 0.06)
    p.rounded((0.22, 0.82, 0.44, 1.0), "main", 0.04)
    p.rounded((0.56, 0.82, 0.78, 1.0), "main", 0.04)
    p.rounded((0.14, 0.38, 0.86, 0.90), "body", 0.06)
    p.polygon([(0.47, 0.0), (0.53, 0.0), (0.53, 0.12), (0.47, 0.12)], INK)
    p.rounded((0.22, 0.07, 0.78, 0.42), "main", 0.08)
    for x in (0.37, 0.63):
        p.dot(x, 0.24, 0.085, (250, 250, 250))
        p.dot(x, 0.24, 0.045, INK)


def _rocket(p: Painter) -> None:
    p.polygon([(0.36, 0.84), (0.5, 1.0), (0.64, 0.84)], (250, 170, 40))
    p.polygon([(0.24, 0.52), (0.0, 0.90), (0.30, 0.84)], "main")
    p.polygon([(0.76, 0.52), (1.0, 0.90), (0.70, 0.84)], "main")
    p.polygon([(0.26, 0.86), (0.20, 0.52), (0.28, 0.22), (0.5, 0.0),
               (0.72, 0.22), (0.80, 0.52), (0.74, 0.86)], "body")  # fmt: skip
    p.ellipse((0.36, 0.24, 0.64, 0.46), GLASS)


def _umbrella(p: Painter) -> None:
    p.polygon([(0.475, 0.40), (0.525, 0.40), (0.525, 0.90), (0.475, 0.90)], INK)
    p.arc((0.26, 0.78, 0.525, 1.0), 0, 180, (150, 100, 60), 0.10)
    p._paint("pieslice", [(0.0, 0.02), (1.0, 1.06)], "body", start=180, end=360)
    for x in (0.0, 0.335, 0.67):
        p._paint("pieslice", [(x, 0.46), (x + 0.33, 0.64)], "main", start=180, end=360)


#: class name -> (painter, width / height). Trained classes first.
CLASSES: dict[str, tuple[Callable[[Painter], None], float]] = {
    "car": (_car, 1.50),
    "fish": (_fish, 1.35),
    "balloon": (_balloon, 0.78),
    "mug": (_mug, 1.08),
    "house": (_house, 1.0),
    "star": (_star, 1.0),
    "mushroom": (_mushroom, 1.0),
    "robot": (_robot, 0.86),
}
#: shapes the base model never saw: ground truth for learning something truly new
RARE_CLASSES: dict[str, tuple[Callable[[Painter], None], float]] = {
    "rocket": (_rocket, 0.72),
    "umbrella": (_umbrella, 1.0),
}


def paint_object(class_name: str, main: str, second: str, pattern: str, size_px: tuple[int, int],
                 flipped: bool, unit_px: float) -> tuple[Image.Image, Image.Image]:  # fmt: skip
    """Returns (RGB tile, alpha 'L' tile), both `size_px` wide and high."""
    paint, _ = {**CLASSES, **RARE_CLASSES}[class_name]
    painter = Painter(*size_px, COLORS[main], COLORS[second], pattern, unit_px)
    paint(painter)
    if not flipped:
        return painter.tile, painter.alpha
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    return painter.tile.transpose(flip), painter.alpha.transpose(flip)


# --- backgrounds ------------------------------------------------------------------------------


def _gradient(size: int, top: RGB, bottom: RGB, y0: float = 0.0, y1: float = 1.0) -> np.ndarray:
    """(rows, size, 3) vertical blend for the rows between fractions y0 and y1."""
    rows = round(size * y1) - round(size * y0)
    blend = np.linspace(0, 1, max(rows, 1))[:, None, None]
    return np.broadcast_to((1 - blend) * np.array(top) + blend * np.array(bottom), (rows, size, 3))


def paint_background(name: str, size: int, rng: np.random.Generator) -> Image.Image:
    """An RGB background, `size` pixels square (already supersampled); details vary with `rng`."""
    return _BACKGROUND_PAINTERS[name](size, rng)


def _stack(*bands: np.ndarray) -> Image.Image:
    return Image.fromarray(np.concatenate(bands).astype(np.uint8))


def _beach(s: int, rng: np.random.Generator) -> Image.Image:
    horizon, shore = rng.uniform(0.30, 0.42), rng.uniform(0.52, 0.66)
    image = _stack(_gradient(s, (120, 198, 250), (206, 236, 252), 0, horizon),
                   _gradient(s, (24, 128, 190), (90, 200, 214), horizon, shore),
                   _gradient(s, (244, 222, 168), (230, 198, 134), shore, 1))  # fmt: skip
    draw = ImageDraw.Draw(image)
    x, r = rng.uniform(0.1, 0.9) * s, 0.07 * s
    draw.ellipse([x - r, 0.13 * s - r, x + r, 0.13 * s + r], fill=(255, 236, 130))
    draw.line([(0, shore * s), (s, shore * s)], fill=(250, 250, 250), width=max(2, s // 40))
    return image


def _snow(s: int, rng: np.random.Generator) -> Image.Image:
    horizon = rng.uniform(0.38, 0.56)
    image = _stack(_gradient(s, (158, 178, 200), (206, 218, 230), 0, horizon),
                   _gradient(s, (250, 252, 255), (222, 232, 244), horizon, 1))  # fmt: skip
    draw = ImageDraw.Draw(image)
    for x in rng.uniform(0, 1, 3):  # fir trees on the horizon
        w, h = 0.07 * s, rng.uniform(0.13, 0.2) * s
        draw.polygon([(x * s - w, horizon * s), (x * s, horizon * s - h), (x * s + w, horizon * s)], fill=(70, 106, 98))
    for x, y in rng.uniform(0, 1, (14, 2)):
        r = 0.011 * s
        draw.ellipse([x * s - r, y * s - r, x * s + r, y * s + r], fill=(255, 255, 255))
    return image


def _grass(s: int, rng: np.random.Generator) -> Image.Image:
    horizon = rng.uniform(0.34, 0.52)
    image = _stack(_gradient(s, (110, 186, 246), (190, 226, 250), 0, horizon),
                   _gradient(s, (130, 206, 92), (84, 168, 62), horizon, 1))  # fmt: skip
    draw = ImageDraw.Draw(image)
    x, y = rng.uniform(0.1, 0.8), rng.uniform(0.08, 0.2)
    for dx, r in ((0.0, 0.05), (0.07, 0.07), (0.14, 0.05)):
        draw.ellipse([(x + dx - r) * s, (y - r * 0.7) * s, (x + dx + r) * s, (y + r * 0.7) * s], fill=(250, 252, 255))
    for x, y in rng.uniform(0, 1, (16, 2)):
        y = horizon + 0.04 + y * (0.94 - horizon)
        draw.line([(x * s, y * s), ((x + 0.012) * s, (y - 0.05) * s)], fill=(60, 138, 52), width=max(2, s // 80))
    return image


def _night(s: int, rng: np.random.Generator) -> Image.Image:
    image = _stack(_gradient(s, (16, 20, 62), (58, 56, 128)))
    draw = ImageDraw.Draw(image)
    for x, y in rng.uniform(0, 1, (18, 2)):
        r = rng.uniform(0.006, 0.012) * s
        draw.ellipse([x * s - r, y * s - r, x * s + r, y * s + r], fill=(255, 250, 214))
    x, r = rng.uniform(0.12, 0.88) * s, 0.08 * s
    draw.ellipse([x - r, 0.14 * s - r, x + r, 0.14 * s + r], fill=(246, 240, 206))
    draw.ellipse([x - 0.4 * r, 0.13 * s - r, x + 1.4 * r, 0.13 * s + 0.8 * r], fill=(22, 26, 72))
    return image


def _brick_wall(s: int, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (s, s), (222, 206, 190))
    draw = ImageDraw.Draw(image)
    rows, across = 8, 4
    h, w, gap = s / rows, s / across, s / 70
    start = rng.uniform(0, 1)
    for row in range(rows):
        for column in range(-2, across + 1):
            shade = rng.uniform(0.92, 1.08)
            x = (column + start + 0.5 * (row % 2)) * w
            fill = tuple(int(c * shade) for c in (178, 92, 74))
            draw.rectangle([x + gap / 2, row * h + gap / 2, x + w - gap / 2, (row + 1) * h - gap / 2], fill=fill)
    return image


def _wooden_floor(s: int, rng: np.random.Generator) -> Image.Image:
    image = Image.new("RGB", (s, s), (140, 92, 52))
    draw = ImageDraw.Draw(image)
    planks = 6
    h, gap = s / planks, s / 80
    for row in range(planks):
        cut = rng.uniform(0, s)
        for x0, x1 in ((-s, cut), (cut + gap, 2 * s)):
            shade = rng.uniform(0.93, 1.07)
            fill = tuple(min(255, int(c * shade)) for c in (206, 154, 98))
            draw.rectangle([x0, row * h, x1, (row + 1) * h - gap], fill=fill)
    return image


def _plain(s: int, rng: np.random.Generator) -> Image.Image:
    tone = rng.uniform(-6, 6)
    t = int(tone)
    return _stack(_gradient(s, (222 + t, 226 + t, 216 + t), (204 + t, 208 + t, 198 + t)))


_BACKGROUND_PAINTERS: dict[str, Callable[[int, np.random.Generator], Image.Image]] = {
    "beach": _beach,
    "snow": _snow,
    "grass": _grass,
    "night": _night,
    "brick wall": _brick_wall,
    "wooden floor": _wooden_floor,
    "plain": _plain,
}
