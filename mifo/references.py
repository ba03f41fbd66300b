"""The instance kept inside a bundle, at the model's resolution, so that a bundle can be evaluated by itself.

    <bundle>/instance/  img.png, mask0.png .., words.txt and truth.json where the instance had them

Knows instances and files. Knows nothing of models.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from PIL import Image

from .asset_crops import cut_out
from .errors import InputError
from .instance import Instance, fit_instance, load_instance, with_background
from .prompts import BACKGROUND_TOKEN

FOLDER = "instance"


def keep_instance(bundle: Path, instance: Instance, resolution: int) -> None:
    """Writes the fitted picture and masks; `load_instance` reads them as it reads the original."""
    folder = bundle / FOLDER
    folder.mkdir()
    fitted = fit_instance(instance, resolution)
    fitted.image.save(folder / "img.png", "PNG")
    things = instance.count - instance.has_background  # the background's mask follows from the others
    for index, mask in enumerate(fitted.masks[:things]):
        mask.convert("1").save(folder / f"mask{index}.png", "PNG")
    if instance.words:
        (folder / "words.txt").write_text("\n".join(instance.words[:things]) + "\n", encoding="utf-8")
    truth = Path(instance.source) / "truth.json"
    if truth.is_file():  # of a drawn scene: what was drawn
        shutil.copyfile(truth, folder / truth.name)


def kept_instance(bundle: Path, tokens: tuple[str, ...]) -> Instance:
    """The instance a bundle was learned from. Raises InputError when the bundle is older and has none, or it does not fit."""
    folder = bundle / FOLDER
    if not os.path.isdir(folder):
        raise InputError(
            f"{bundle} does not hold the picture it was learned from, as bundles do now; learn it again, or give evaluate that "
            "folder with --instance"
        )
    instance = load_instance(folder)
    if BACKGROUND_TOKEN in tokens:
        instance = with_background(instance)
    check_count(instance, tokens)
    return instance


def kept_crops(bundle: Path, tokens: tuple[str, ...]) -> dict[str, Image.Image]:
    """Each asset's own picture, RGBA; none for a bundle that does not hold its photo: a ranking then does without."""
    try:
        instance = kept_instance(bundle, tokens)
    except InputError:
        return {}
    side = max(instance.image.size)
    return {t: cut_out(instance.image, mask, side) for t, mask in zip(instance.tokens, instance.masks, strict=True)}


def check_count(instance: Instance, tokens: tuple[str, ...]) -> None:
    """Raises InputError unless the instance has one mask per token."""
    if instance.count != len(tokens):
        raise InputError(
            f"{instance.source} has {instance.count} masks, but the bundle has {len(tokens)} assets; give the instance that it "
            "was learned from"
        )
