"""Which back end measures what: the toybox's judge for the toybox, DINOv2, CLIP and a detector for everything else."""

from __future__ import annotations

from ..data.instance import Instance
from .backend import Backend


def make_backend(kind: str, family: str, instance: Instance, device: str = "cpu", dino: str | None = None,
                 clip: str | None = None, detector: str | None = None) -> Backend:  # fmt: skip
    """`kind`: 'auto', 'toybox' or 'photo'; `family` is the base model's. The three models are names or local folders.

    Raises InputError when a model cannot be had, or the judge sees nothing in the instance.
    """
    if kind == "toybox" or (kind == "auto" and family == "toybox"):
        from .toybox_backend import ToyboxBackend

        return ToyboxBackend(instance)
    from ..model.hub_models import CLIP, DETECTOR, DINO
    from .photo_backend import PhotoBackend

    return PhotoBackend(instance, device, dino or DINO, clip or CLIP, detector or DETECTOR)
