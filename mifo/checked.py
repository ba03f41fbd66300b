"""Settings that check themselves: a frozen dataclass's fields against their own type hints, when it is made.

Understood are bool, int, float, str, tuples of them, `Literal`, `X | None`, other dataclasses, and bounds by
`Annotated[..., Within(...)]`.
"""

from __future__ import annotations

import math
import numbers
import types
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InputError


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of every number of a tuple."""

    low: float
    high: float = math.inf
    below: bool = False
    """The upper bound itself is too large."""

    def __contains__(self, value: float) -> bool:
        return self.low <= value and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"at least {self.low:g} and {'less than' if self.below else 'at most'} {self.high:g}"


class Checked:
    """Base of such a dataclass. Making one raises InputError that names the field, what was given and what is expected.

    Numbers are kept in their field's own type (2 as 2.0 where a float is expected), so that what is equal is also written alike.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise InputError(f"{type(self).__name__}.{name} is {repr(value)[:80]}, expected {_expected(hint)}")
            object.__setattr__(self, name, _in_type(value, hint))  # frozen


def field_types(kind: type) -> dict[str, Any]:
    """Field name -> type hint, bounds included."""
    if kind not in _field_types:
        hints = get_type_hints(kind, include_extras=True)
        _field_types[kind] = {f.name: hints[f.name] for f in fields(kind)}
    return _field_types[kind]


_field_types: dict[type, dict[str, Any]] = {}


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        numbers_in = value if isinstance(value, tuple) else () if value is None else (value,)
        return _fits(value, inside[0]) and all(n in bounds for n in numbers_in for bounds in inside[1:])
    if origin is Literal:
        return isinstance(value, str) and value in inside
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inside)
    if origin is tuple:
        each = inside[:1] * len(value) if isinstance(value, tuple) and inside[-1] is Ellipsis else inside
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint)


def _in_type(value: Any, hint: Any) -> Any:
    """A value that fits, its numbers as plain Python's int and float."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _in_type(value, inside[0])
    if origin in (Union, types.UnionType):
        return _in_type(value, next(option for option in inside if _fits(value, option)))
    if origin is tuple:
        each = inside[:1] * len(value) if inside[-1] is Ellipsis else inside
        return tuple(map(_in_type, value, each))
    return hint(value) if hint in (int, float) else value


def _expected(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_expected(inside[0])}, {' and '.join(map(str, inside[1:]))}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, inside))}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_expected, inside))
    if origin is tuple:
        return f"a list of {_expected(inside[0])} each" if inside[-1] is Ellipsis else f"{len(inside)} numbers"
    if is_dataclass(hint):
        return "an object"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "nothing"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))
