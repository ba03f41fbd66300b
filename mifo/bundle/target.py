"""Whether `learn` may write a bundle where one stands already: again what it was learned from, or another."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..data.instance import Instance, with_background, without_background
from ..errors import InputError
from ..io.files import check_replaceable
from ..io.read_files import read_regular
from ..prompts import BACKGROUND_TOKEN
from .catalogue import RECORD
from .files import MAX_JSON_BYTES
from .store import KIND


def photo_digest(instance: Instance) -> str:
    """Of the photo's and the masks' pixels, and of further photos'."""
    pixels = hashlib.sha256(f"{instance.image.size}".encode() + instance.image.tobytes())
    for mask in instance.masks:
        pixels.update(mask.tobytes())
    for photo in instance.others:
        pixels.update(f"{photo.name} {photo.image.size} {photo.shown}".encode() + photo.image.tobytes())
        for index in photo.shown:
            pixels.update(photo.masks[index].tobytes())  # type: ignore[union-attr]
    return pixels.hexdigest()[:32]


def check_target(folder: Path, instance: Instance, fingerprint: str | None, overwrite: bool) -> str | None:
    """What to tell the user when the bundle at `folder` will be replaced; None where there is none.

    `fingerprint` is the base model's, or None before it is known. Raises InputError when `folder` holds anything but a bundle
    just as it was written, and, without `overwrite`, when that was learned from another photo or other masks, or on another base.
    """
    folder = Path(os.path.realpath(folder))
    check_replaceable(folder, KIND, overwrite=True)
    if not os.path.isdir(folder) or not os.listdir(folder):
        return None
    try:
        record = json.loads(read_regular(folder / RECORD, MAX_JSON_BYTES))
    except (OSError, ValueError):  # taken away; what it was learned from cannot be told
        record = {}
    if not overwrite and (other := _differences(record, instance, fingerprint)):
        raise InputError(f"{folder} holds a bundle that was learned {other}; give another --name, or --overwrite to replace it")
    return f"the bundle in {folder} will be replaced; it stays until the new one is whole"


def _differences(record: dict[str, Any], instance: Instance, fingerprint: str | None) -> str:
    there = record.get("base")
    base = there if isinstance(there, dict) else {}
    if record.get("photo_digest") != photo_digest(instance):
        return _with_or_without_background(record, instance) or "from another photo or other masks"
    if fingerprint is not None and base.get("fingerprint") != fingerprint:
        return f"on another base model ({str(base.get('name'))[:100]})"
    return ""


def _with_or_without_background(record: dict[str, Any], instance: Instance) -> str:
    """What is told where photo and masks are the same but for `<background>`; else empty."""
    try:
        turned = without_background(instance) if instance.has_background else with_background(instance)
    except InputError:  # there is none
        return ""
    if record.get("photo_digest") != photo_digest(turned):
        return ""
    return f"{'without' if instance.has_background else 'with'} {BACKGROUND_TOKEN} from the same photo"
