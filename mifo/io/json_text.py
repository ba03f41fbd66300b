"""JSON as other programs read it. Python's own writer makes `NaN` and `Infinity` of what is not finite, which is no JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_NAMED = 20  # of the values that are not finite


def json_text(value: Any, indent: int | None = None, **options: Any) -> str:
    """`value` as JSON. Raises ValueError where a number is not finite; options are those of `json.dumps`."""
    return json.dumps(value, indent=indent, allow_nan=False, **options)


def named_infinities(value: Any) -> Any:
    """`value` with each number that is not finite as a string, "-inf": settings of schedulers have such numbers by right."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, Mapping):
        return {k: named_infinities(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [named_infinities(v) for v in value]
    return value


def record_text(record: Mapping[str, Any], indent: int | None = None) -> str:
    """A record of measurements as JSON: what is not finite becomes null, and the key `not_finite` lists where and what it was."""
    found: list[str] = []
    clean = _finite(dict(record), "", found)
    if found:
        more = [f"and {len(found) - MAX_NAMED} more"] if len(found) > MAX_NAMED else []
        clean = {**clean, "not_finite": [*found[:MAX_NAMED], *more]}
    return json_text(clean, indent)


def _finite(value: Any, where: str, found: list[str]) -> Any:
    """`value` with null for each number that is not finite; `found` gets its place, such as "losses.3.prior was nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        found.append(f"{where or 'the value'} was {float(value)}")
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v, f"{where}.{k}" if where else str(k), found) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v, f"{where}.{k}" if where else str(k), found) for k, v in enumerate(value)]
    return value
