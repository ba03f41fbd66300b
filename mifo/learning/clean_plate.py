"""The photo without its things, as film makers shoot it: what `<background>` is to be learned from."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

RADIUS = 3  # pixels around a hole's edge that its filling is made from
GROWTH = 1 / 32  # of the picture's side: masks rarely hold the last soft pixels of a thing's edge, or its shadow


def clean_plate(image: Image.Image, things: Sequence[Image.Image]) -> Image.Image:
    """The RGB `image` with all that the masks `things` (L, of its size) cover filled from around it (Telea's fast marching,
    doi:10.1080/10867651.2004.10487596, by OpenCV)."""
    return Image.fromarray(cv2.inpaint(np.asarray(image), np.asarray(holes(things)), RADIUS, cv2.INPAINT_TELEA))


def holes(things: Sequence[Image.Image]) -> Image.Image:
    """What a clean plate fills (L): the masks, a little grown."""
    covered = np.max([np.asarray(mask) for mask in things], axis=0)
    grown = 2 * max(1, round(GROWTH * max(covered.shape))) + 1
    return Image.fromarray(cv2.dilate(covered, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (grown, grown))))
