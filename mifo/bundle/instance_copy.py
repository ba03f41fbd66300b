"""The instance kept inside a bundle, at the model's resolution, so that a bundle can be evaluated by itself.

    <bundle>/instance/  img.png, mask0.png .., words.txt and truth.json where the instance had them,
                        img1.png, img1_mask0.png .. of further photos
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from PIL import Image

from ..data.asset_crops import cut_out
from ..data.instance import (
    MAX_ASSETS,
    MAX_PHOTOS,
    MAX_TRUTH_BYTES,
    FittedInstance,
    Instance,
    is_instance_picture,
    load_instance,
    with_background,
)
from ..errors import InputError
from ..io.image_file import MAX_IMAGE_BYTES
from ..io.read_files import read_regular
from ..prompts import BACKGROUND_TOKEN

FOLDER = "instance"
TRUTH = "truth.json"


def keep_instance(bundle: Path, instance: Instance, fitted: FittedInstance) -> None:
    """Writes the fitted picture and masks; `load_instance` reads them as it reads the original."""
    folder = bundle / FOLDER
    folder.mkdir()
    fitted.image.save(folder / "img.png", "PNG")
    things = instance.count - instance.has_background  # the background's mask follows from the others
    for index, mask in enumerate(fitted.masks[:things]):
        mask.convert("1").save(folder / f"mask{index}.png", "PNG")
    for photo in fitted.others:
        photo.image.save(folder / f"{photo.name}.png", "PNG")
        for index in (i for i in photo.shown if i < things):
            photo.masks[index].convert("1").save(folder / f"{photo.name}_mask{index}.png", "PNG")  # type: ignore[union-attr]
    if instance.words:
        (folder / "words.txt").write_text("\n".join(instance.words[:things]) + "\n", encoding="utf-8")
    if truth := _truth_of(Path(instance.source)):  # of a drawn scene: what was drawn
        (folder / TRUTH).write_bytes(truth)


def _truth_of(source: Path) -> bytes | None:
    """The `truth.json` of a drawn scene; None where there is none, or another file of that name."""
    try:
        content = read_regular(source / TRUTH, MAX_TRUTH_BYTES)
        record = json.loads(content)
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(record, dict) and isinstance(record.get("things"), list) else None


def instance_digest(bundle: Path) -> str | None:
    """Of the files of the kept instance that are read; None where there is none, or one that is not fit to be read.

    The instance is read later than the bundle, where a job needs it: by this it is seen whether it is still the same.
    """
    folder, digest = bundle / FOLDER, hashlib.sha256()
    try:
        names = sorted(n for n in os.listdir(folder) if n.lower() in ("words.txt", TRUTH) or is_instance_picture(n))
        if len(names) > (MAX_ASSETS + 1) * (MAX_PHOTOS + 1) + 8:
            return None
        for name in names:
            content = read_regular(folder / name, MAX_IMAGE_BYTES)
            digest.update(f"{name} {len(content)} ".encode("utf-8", "surrogateescape") + content)
    except OSError:
        return None
    return digest.hexdigest()[:32]


def check_kept(bundle: Path, digest: str | None) -> None:
    """Raises InputError when the kept instance is no longer the one that had this `instance_digest`."""
    if instance_digest(bundle) != digest:
        raise InputError(f"{bundle} was replaced while it was being used: its photo is another one now; start the command again")


def kept_instance(bundle: Path, tokens: tuple[str, ...], digest: str | None = None) -> Instance:
    """The instance a bundle was learned from. Raises InputError when the bundle is older and has none, when it does not fit, or
    when it is not the one that has this `instance_digest`, if one is given."""
    folder = bundle / FOLDER
    if not os.path.isdir(folder):
        raise InputError(
            f"{bundle} does not hold the picture it was learned from, as bundles do now; learn it again, or give evaluate that "
            "folder with --instance"
        )
    instance = load_instance(folder)
    if digest is not None:
        check_kept(bundle, digest)
    if BACKGROUND_TOKEN in tokens:
        instance = with_background(instance)
    check_count(instance, tokens)
    return instance


def kept_crops(bundle: Path, tokens: tuple[str, ...], digest: str | None = None) -> dict[str, Image.Image]:
    """Each asset's own picture, RGBA; none for a bundle that does not hold its photo: a ranking then does without.

    Raises InputError when the photo is not the one that has this `instance_digest`, if one is given.
    """
    try:
        instance = kept_instance(bundle, tokens)
    except InputError:
        return {}
    if digest is not None:
        check_kept(bundle, digest)
    side = max(instance.image.size)
    return {t: cut_out(instance.image, mask, side) for t, mask in zip(instance.tokens, instance.masks, strict=True)}


def check_count(instance: Instance, tokens: tuple[str, ...]) -> None:
    """Raises InputError unless the instance has one mask per token."""
    if instance.count != len(tokens):
        raise InputError(
            f"{instance.source} has {instance.count} masks, but the bundle has {len(tokens)} assets; give the instance that it "
            "was learned from"
        )
