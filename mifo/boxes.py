"""Where each asset goes: boxes, xyxy and normalized to [0, 1], and layouts that give one to every asset of a prompt.

Pure geometry and parsing. Knows neither models nor tokenizers.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .io.json_text import json_text
from .io.read_files import read_regular

MAX_LAYOUT_BYTES = 1 << 20
MAX_BOXES = 100  # a prompt holds fewer than 40 assets
EXAMPLE = '[[0.0, 0.2, 0.5, 0.9], [0.5, 0.2, 1.0, 0.9]] or {"<asset0>": [0.0, 0.2, 0.5, 0.9]}'
KEY_PATTERN = re.compile(r"(?:<asset([0-9]+)>|(?:asset)?([0-9]+))", re.IGNORECASE)


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, right and bottom edge as fractions of the image's width and height.

    Raises InputError unless all four are finite numbers in [0, 1] with x0 < x1 and y0 < y1.
    """

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        for name in ("x0", "y0", "x1", "y1"):
            object.__setattr__(self, name, self._number(name))
        if not all(0 <= v <= 1 for v in self.as_tuple()):
            hint = (
                " Values above 1 look like pixels or percents: divide x by the image's width and y by its height"
                " (or percents by 100)." if max(self.as_tuple()) > 1 else ""
            )  # fmt: skip
            raise InputError(f"Box {self._shown()} leaves the image: every coordinate must lie between 0 and 1.{hint}")
        if self.x0 >= self.x1 or self.y0 >= self.y1:
            raise InputError(
                f"Box {self._shown()} has no area: it must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1, "
                "that is left, top, right, bottom (not x, y, width, height)."
            )

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InputError(f"Box {self._shown()}: {name} must be a number in [0, 1], not {reprlib.repr(value)}.")
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise InputError(f"Box {self._shown()}: {name} must be a finite number in [0, 1].")
        return number

    def _shown(self) -> str:
        return f"[{', '.join(f'{v:.6g}' if isinstance(v, float) else reprlib.repr(v) for v in self.as_tuple())}]"

    def as_tuple(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1), normalized."""
        return self.x0, self.y0, self.x1, self.y1

    @property
    def area(self) -> float:
        """The part of the image that the box covers, in (0, 1]."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    def iou(self, other: Box) -> float:
        """Intersection over union with `other`, in [0, 1]."""
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        intersection = max(width, 0.0) * max(height, 0.0)
        union = self.area + other.area - intersection
        return intersection / union if union > 0 else float(self == other)  # the areas of hair-thin boxes underflow

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Edges (x0, y0, x1, y1) on a grid of `width` x `height` pixels, rounded half up; x1 and y1 are exclusive."""
        x0, x1 = (math.floor(x * width + 0.5) for x in (self.x0, self.x1))
        y0, y1 = (math.floor(y * height + 0.5) for y in (self.y0, self.y1))
        return x0, y0, x1, y1

    def rasterize(self, height: int, width: int) -> npt.NDArray[np.bool_]:
        """True inside the box: a bool array of shape (height, width)."""
        x0, y0, x1, y1 = self.pixels(width, height)
        mask = np.zeros((height, width), dtype=np.bool_)
        mask[y0:y1, x0:x1] = True
        return mask

    def check_visible(self, height: int, width: int) -> None:
        """Raises InputError if the box rounds to no pixel at all on a map of this size."""
        x0, y0, x1, y1 = self.pixels(width, height)
        if x0 == x1 or y0 == y1:
            raise InputError(
                f"Box {self._shown()} covers no pixel of a {width}x{height} map; "
                f"make it at least {1 / width:.4g} wide and {1 / height:.4g} high."
            )

    def made_visible(self, height: int, width: int) -> Box:
        """This box; in a direction in which it rounds to no pixel of a map of this size, grown to whole pixels of it."""
        x0, y0, x1, y1 = self.pixels(width, height)
        across = (self.x0, self.x1) if x0 < x1 else _whole(self.x0, self.x1, width)
        down = (self.y0, self.y1) if y0 < y1 else _whole(self.y0, self.y1, height)
        return Box(across[0], down[0], across[1], down[1])


def _whole(start: float, end: float, cells: int) -> tuple[float, float]:
    return math.floor(start * cells) / cells, math.ceil(end * cells) / cells


@dataclass(frozen=True)
class Layout:
    """One box for each asset token, in order. Raises ValueError if the lengths differ or a token repeats."""

    tokens: tuple[str, ...]
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.boxes):
            raise ValueError(f"{len(self.tokens)} tokens but {len(self.boxes)} boxes")
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"a token repeats in {self.tokens}")

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[tuple[str, Box]]:
        return iter(zip(self.tokens, self.boxes, strict=True))

    def box_of(self, token: str) -> Box:
        """The box of `token`. Raises KeyError if it has none."""
        return dict(self)[token]

    def to_json(self) -> dict[str, list[float]]:
        """What `parse_layout` reads: token -> [x0, y0, x1, y1]."""
        return {token: list(box.as_tuple()) for token, box in self}


#: A box per asset in the prompt's order, a mapping of tokens to boxes, JSON text or a file of it, or a Layout.
Boxes = Layout | Sequence[Sequence[float]] | Mapping[str, Sequence[float]] | str | Path


def layout_of(boxes: Boxes | None, tokens: Sequence[str]) -> Layout | None:
    """`boxes` in any of their forms as `parse_layout` gives them; a layout passes as it is. Raises InputError."""
    if boxes is None or isinstance(boxes, Layout):
        return boxes
    if isinstance(boxes, Path | str):
        return parse_layout(boxes, tokens)
    plain = np.asarray(boxes).tolist() if isinstance(boxes, np.ndarray) else boxes
    try:
        text = json_text({k: list(v) for k, v in plain.items()} if isinstance(plain, Mapping) else [list(box) for box in plain])
    except (TypeError, ValueError) as error:
        raise InputError(
            f"boxes is {str(boxes)[:80]!r}, expected one [x0, y0, x1, y1] per asset, from 0 to 1 ({error})"
        ) from None
    return parse_layout(text, tokens)


def parse_layout(source: str | Path, tokens: Sequence[str]) -> Layout:
    """One box for each of `tokens`, the asset tokens in the order in which they stand in the prompt.

    `source` is JSON text (it starts with a bracket) or the path of a file that holds it: a list of boxes in the order
    of `tokens`, or an object from token (`<asset0>`, `asset0` or `0`) to box. Raises InputError for anything else.
    """
    data = read_boxes(source)
    if isinstance(data, dict):
        entries = _match_keys(data, tokens)
    elif isinstance(data, list):
        entries = _match_order(data, tokens)
    else:
        _refuse(f"The boxes must be a JSON list or object, not {reprlib.repr(data)}.")
    return Layout(tuple(tokens), tuple(_parse_box(token, entry) for token, entry in zip(tokens, entries, strict=True)))


def _refuse(problem: str) -> NoReturn:
    raise InputError(f"{problem} Boxes look like this: {EXAMPLE}.") from None


def read_boxes(source: str | Path) -> Any:
    """JSON text, or a file of it, as plain data that may be boxes. Raises InputError."""
    inline = isinstance(source, str) and source.lstrip("\ufeff \t\r\n")[:1] in ("[", "{", "")
    text = str(source).lstrip("\ufeff") if inline else _read_text(Path(source))
    where = "The boxes" if inline else f"The boxes in {source}"
    if not text.strip():
        _refuse(f"{where} are empty.")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_LAYOUT_BYTES:
        _refuse(f"{where} are larger than 1 MiB.")
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        _refuse(f"{where} are not JSON: line {error.lineno}, column {error.colno}: {error.msg}.")
    except InputError:
        raise
    except RecursionError:
        _refuse(f"{where} are nested too deeply.")
    except ValueError as error:  # Python refuses to read an integer of thousands of digits
        _refuse(f"{where} hold a number that cannot be read ({error}).")


def _read_text(path: Path) -> str:
    try:
        content = read_regular(path, MAX_LAYOUT_BYTES)
    except FileNotFoundError:
        _refuse(f"There is no boxes file {str(path)!r}, and it is not a JSON list or object either.")
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        _refuse(f"The boxes file {str(path)[:200]!r} cannot be read ({getattr(error, 'strerror', None) or error}).")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        _refuse(f"The boxes in {path} are not UTF-8 text; save the file as UTF-8.")


def _refuse_constant(name: str) -> NoReturn:
    _refuse(f"The boxes hold {name}, but every coordinate must be a finite number in [0, 1].")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            _refuse(f"The boxes give {reprlib.repr(key)} twice; give each asset one box.")
        result[key] = value
    return result


def _match_order(data: list[Any], tokens: Sequence[str]) -> list[Any]:
    if len(data) == 4 and not any(isinstance(v, (list, dict)) for v in data):
        _refuse(f"The boxes are {reprlib.repr(data)}, a single box; put it in a second pair of brackets.")
    if len(data) != len(tokens):
        _refuse(f"There are {len(data)} boxes, but {_assets_of_prompt(tokens)}; give one box for each, in that order.")
    return data


def _match_keys(data: dict[str, Any], tokens: Sequence[str]) -> list[Any]:
    by_token: dict[str, Any] = {}
    for key, entry in data.items():
        match = KEY_PATTERN.fullmatch(key.strip())
        token = f"<asset{match[1] or match[2]}>" if match else key
        if token not in tokens:
            _refuse(f"There is a box for {reprlib.repr(key)}, but {_assets_of_prompt(tokens)}.")
        if token in by_token:
            _refuse(f"The boxes give {token} twice; give each asset one box.")
        by_token[token] = entry
    if missing := [token for token in tokens if token not in by_token]:
        _refuse(f"There is no box for {', '.join(missing)}: {_assets_of_prompt(tokens)}; give each asset one box.")
    return [by_token[token] for token in tokens]


def _token_of(key: str) -> str:
    match = KEY_PATTERN.fullmatch(key.strip())
    if not match or len(match[1] or match[2]) > 9:
        _refuse(f"There is a box for {reprlib.repr(key)}, expected <asset0>, asset0 or 0.")
    return f"<asset{match[1] or match[2]}>"


def _assets_of_prompt(tokens: Sequence[str]) -> str:
    return f"the assets in the prompt are {', '.join(tokens)}" if tokens else "the prompt has no asset"


def _parse_box(token: str, entry: Any) -> Box:
    if not isinstance(entry, list) or len(entry) != 4:
        count = f" ({len(entry)} numbers)" if isinstance(entry, list) else ""
        _refuse(f"The box of {token} is {reprlib.repr(entry)}{count}, but it must be four numbers [x0, y0, x1, y1].")
    try:
        return Box(*entry)
    except InputError as error:
        raise InputError(f"The box of {token} is wrong. {error}") from None


def parse_boxes_alone(source: str | Path) -> Layout:
    """Boxes without a prompt: a list is numbered `<asset0>`, `<asset1>`, ...; an object names its assets itself.

    Raises InputError as `parse_layout` does.
    """
    data = read_boxes(source)
    if isinstance(data, (list, dict)) and not data:
        _refuse("The boxes are empty; give at least one [x0, y0, x1, y1].")
    if isinstance(data, dict):
        tokens = [_token_of(key) for key in data]
        if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
            _refuse(f"The boxes give {', '.join(twice)[:100]} twice; give each asset one box.")
    elif isinstance(data, list):
        tokens = [f"<asset{index}>" for index in range(len(data))]
    else:
        _refuse(f"The boxes must be a JSON list or object, not {reprlib.repr(data)}.")
    if len(tokens) > MAX_BOXES:
        _refuse(f"There are {len(tokens)} boxes, but at most {MAX_BOXES} can be drawn.")
    entries = data.values() if isinstance(data, dict) else data
    return Layout(tuple(tokens), tuple(_parse_box(token, entry) for token, entry in zip(tokens, entries, strict=True)))


# --- boxes of masks -----------------------------------------------------------------------------


def bounds(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what is True; right and bottom are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def mask_box(mask: npt.NDArray[np.bool_]) -> Box:
    """The bounding box of what is True, in fractions of the mask's size."""
    left, top, right, bottom = bounds(mask)
    height, width = mask.shape
    return Box(left / width, top / height, right / width, bottom / height)
