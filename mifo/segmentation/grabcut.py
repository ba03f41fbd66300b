"""Masks without any weights: a model of the background beside the box, then GrabCut (Rother et al., SIGGRAPH 2004).

GrabCut by itself takes everything outside the box for background, other things included, and starts from all that is inside.
Here the background is learned from a ring around the box alone, and GrabCut starts from the pixels that do not look like it.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from ..boxes import Box
from ..errors import InputError
from .hints import Hint

BoolArray = npt.NDArray[np.bool_]
Pixels = tuple[int, int, int, int]

WORKING_SIDE = 512
"""Longer side, in pixels, at which a box is cut out; larger ones are scaled down for it."""
RING = 0.15
"""Width of the ring around a box, as a share of its longer side."""
CLUSTERS = 5  # of the background's colours
MIN_VARIANCE = 4.0  # of a cluster, in Lab units squared: JPEG's noise
FAR = 9.0  # squared distance, in variances, from which a colour is no background's: three deviations
RING_SHARE = 99  # percent of the ring that must look like background all the same
SECTORS, SEEN, FEW = 24, 0.02, 0.05  # around a box; a colour is in a sector from that share on, and an intruder in so few of them
MIN_PART = 0.1  # of the largest part's area; smaller parts are crumbs


class GrabCut:
    """Segments by colours alone; the same input gives the same masks."""

    name = "grabcut"

    def masks(self, image: Image.Image, hints: Sequence[Hint]) -> list[BoolArray]:
        """(H, W) for each hint; may be empty."""
        pixels = np.asarray(image.convert("RGB"))[:, :, ::-1]
        boxes = [hint.pixels(image.size) for hint in hints]
        unmarked = [hint.pixels(image.size) for hint in propose(image)]
        masks = []
        for box, hint in zip(boxes, hints, strict=True):
            others = [b for b in boxes if b != box] + [b for b in unmarked if _apart(b, box)]
            masks.append(self._mask(pixels, box, hint.point_pixels(image.size), others))
        return masks

    def _mask(self, pixels: npt.NDArray[np.uint8], box: Pixels, points: Sequence[tuple[int, int]],
              others: Sequence[Pixels]) -> BoolArray:  # fmt: skip
        height, width = pixels.shape[:2]
        window = grown(box, max(8, int(RING * max(box[2] - box[0], box[3] - box[1]))), (width, height))
        left, top, right, bottom = window
        scale = min(1.0, WORKING_SIDE / max(right - left, bottom - top))
        size = max(4, round(scale * (right - left))), max(4, round(scale * (bottom - top)))
        part = cv2.resize(pixels[top:bottom, left:right], size, interpolation=cv2.INTER_AREA)

        def within(rectangles: Sequence[Pixels]) -> BoolArray:
            marked = np.zeros(part.shape[:2], bool)
            for x0, y0, x1, y1 in rectangles:
                x0, x1 = (round(np.clip(v - left, 0, right - left) * size[0] / (right - left)) for v in (x0, x1))
                y0, y1 = (round(np.clip(v - top, 0, bottom - top) * size[1] / (bottom - top)) for v in (y0, y1))
                marked[y0:y1, x0:x1] = True
            return marked

        inside = within([box])
        ring = ~inside & ~within(others)
        if ring.sum() < 64:  # a box as large as the picture, or one among others: its own rim is the best guess
            ring = inside & ~cv2.erode(inside.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0).astype(bool)
            inside = inside & ~ring
        clicked = np.zeros_like(inside)
        for x, y in points:
            place = round((x - left) * scale), round((y - top) * scale)
            cv2.circle(marks := clicked.astype(np.uint8), place, max(2, max(size) // 100), 1, -1)
            clicked = marks.astype(bool)
        found = cut_out(part, inside, ring, clicked & inside)
        whole = cv2.resize(found.astype(np.float32), (right - left, bottom - top), interpolation=cv2.INTER_LINEAR) >= 0.5
        mask = np.zeros((height, width), bool)
        mask[top:bottom, left:right] = whole
        return mask


def _apart(first: Pixels, second: Pixels) -> bool:
    """Whether less than a tenth of the smaller one is shared."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (first, second))
    return max(0, width) * max(0, height) < 0.1 * smaller


def grown(box: Pixels, by: int, size: tuple[int, int]) -> Pixels:
    """The box with a margin of `by` pixels, as far as the picture goes."""
    return max(0, box[0] - by), max(0, box[1] - by), min(size[0], box[2] + by), min(size[1], box[3] + by)


def cut_out(pixels: npt.NDArray[np.uint8], inside: BoolArray, ring: BoolArray, clicked: BoolArray) -> BoolArray:
    """(H, W): the thing `inside`, of (H, W, 3) BGR pixels; `ring` shows background, `clicked` the thing."""
    ring = ring & ~intruders(pixels, ring)
    distance = distance_from(pixels, ring)
    start = (distance > max(FAR, float(np.percentile(distance[ring], RING_SHARE)))) & inside
    start = cv2.morphologyEx(start.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)).astype(bool)
    start = filled(start) | clicked
    if start.sum() < 20 or not (inside & ~start).any():
        return _parts(start, clicked)
    labels = np.where(start, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[~inside], labels[clicked] = cv2.GC_BGD, cv2.GC_FGD
    seen = pixels.copy()
    seen[~inside & ~ring] = pixels[ring].mean(0)  # other things shall not count as background
    cv2.setRNGSeed(0)
    cv2.grabCut(seen, labels, None, np.zeros((1, 65)), np.zeros((1, 65)), 3, cv2.GC_INIT_WITH_MASK)
    return _parts(filled((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD)) & inside, clicked)


def distance_from(pixels: npt.NDArray[np.uint8], background: BoolArray) -> npt.NDArray[np.float64]:
    """(H, W): how far each pixel's colour is from the nearest cluster of the background's, squared, in that cluster's variances
    (CIE Lab)."""
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_BGR2Lab)
    known = lab[background]
    known = known[np.linspace(0, len(known) - 1, min(len(known), 4000)).astype(int)]
    count = min(CLUSTERS, len(known))
    labels, centers = _clusters(known, count)
    best = np.full(lab.shape[:2], np.inf)
    for k in range(count):
        members = known[labels == k]
        variance = (members.var(0) if len(members) > 3 else np.zeros(3)) + MIN_VARIANCE
        best = np.minimum(best, ((lab - centers[k]) ** 2 / variance).sum(-1))
    return best


def intruders(pixels: npt.NDArray[np.uint8], ring: BoolArray) -> BoolArray:
    """(H, W): pixels of the ring whose colours are found on few of its sides: another thing that reaches into it, most likely.

    Such a thing may look like the one that is cut out, and would then make background of it.
    """
    lab = cv2.cvtColor(pixels.astype(np.float32) / 255, cv2.COLOR_BGR2Lab)
    rows, columns = np.nonzero(ring)
    height, width = ring.shape
    angles = np.arctan2((rows - height / 2) / height, (columns - width / 2) / width)
    sectors = ((angles + np.pi) / (2 * np.pi) * SECTORS).astype(int) % SECTORS
    labels, centers = _clusters(lab[ring], min(2 * CLUSTERS, len(rows)))
    shares = np.zeros((len(centers), SECTORS))
    np.add.at(shares, (labels, sectors), 1)
    shares /= np.maximum(1, np.bincount(sectors, minlength=SECTORS))
    there = np.count_nonzero(np.bincount(sectors, minlength=SECTORS))
    rare = (shares > SEEN).sum(1) <= FEW * there
    found = np.zeros_like(ring)
    found[rows, columns] = rare[labels]
    return found if found.sum() < 0.5 * len(rows) else np.zeros_like(ring)


def _clusters(colors: npt.NDArray[np.float32], count: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """(N, 3) -> labels (N,), centers (count, 3); the same every time."""
    cv2.setRNGSeed(0)
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    _, labels, centers = cv2.kmeans(np.ascontiguousarray(colors), count, None, criteria, 2, cv2.KMEANS_PP_CENTERS)
    return labels.ravel(), centers


def filled(mask: BoolArray) -> BoolArray:
    """With its holes: what cannot be reached from the picture's border."""
    outside = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), np.uint8)
    outside[1:-1, 1:-1] = mask
    cv2.floodFill(outside, None, (0, 0), 2)
    return np.asarray(outside[1:-1, 1:-1] != 2)


def _parts(mask: BoolArray, clicked: BoolArray) -> BoolArray:
    """Without crumbs; where something was clicked, the parts that were clicked alone."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count < 3:
        return mask
    areas = stats[1:, cv2.CC_STAT_AREA]
    kept = [k + 1 for k, area in enumerate(areas) if area >= MIN_PART * areas.max()]
    if clicked.any():
        kept = [k for k in np.unique(labels[clicked]) if k] or kept
    return np.isin(labels, kept)


# --- without boxes ------------------------------------------------------------------------------

FRAME = 0.03  # width of the picture's rim that is taken for background, as a share of its longer side
MIN_AREA, MAX_AREA = 0.003, 0.6  # of the picture
MAX_THINGS = 8
MARGIN = 0.08  # of a thing's longer side, around it


def propose(image: Image.Image) -> list[Hint]:
    """At most MAX_THINGS connected things that do not look like the picture's rim, the most salient first: large, and far from
    the rim in colour. A guess that a user chooses from."""
    scale = min(1.0, WORKING_SIDE / max(image.size))
    size = max(4, round(scale * image.width)), max(4, round(scale * image.height))
    pixels = cv2.resize(np.asarray(image.convert("RGB"))[:, :, ::-1], size, interpolation=cv2.INTER_AREA)
    rim = np.ones(pixels.shape[:2], bool)
    width = max(2, round(FRAME * max(size)))
    rim[width:-width, width:-width] = False
    distance = distance_from(pixels, rim)
    far = distance > max(FAR, float(np.percentile(distance[rim], 97)))
    far = cv2.morphologyEx(far.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8))
    far = cv2.morphologyEx(far, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)).astype(bool)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(filled(far).astype(np.uint8), connectivity=8)
    found = []
    for k in range(1, count):
        left, top, wide, high, area = (int(v) for v in stats[k])
        if MIN_AREA <= area / labels.size <= MAX_AREA:
            box = grown((left, top, left + wide, top + high), max(2, round(MARGIN * max(wide, high))), size)
            salience = area * float(np.log1p(np.median(distance[labels == k])))
            found.append((salience, box))
    found.sort(reverse=True)
    return [hint_of(box, size) for _, box in found[:MAX_THINGS]]


def hint_at(image: Image.Image, point: tuple[float, float]) -> Hint:
    """The thing under a click, with the box that `propose` would give it. Raises InputError where nothing stands out there."""
    for hint in sorted(propose(image), key=lambda h: (h.box.x1 - h.box.x0) * (h.box.y1 - h.box.y0)):
        if hint.box.x0 <= point[0] <= hint.box.x1 and hint.box.y0 <= point[1] <= hint.box.y1:
            return Hint(hint.box, (point,))
    raise InputError(f"nothing stands out at the point {point[0]:.3f},{point[1]:.3f}; give a --box around the thing instead, "
                     "or --sam2 with a model")  # fmt: skip


def hint_of(box: Pixels, size: tuple[int, int]) -> Hint:
    """A box in pixels of a picture of `size`, (width, height), as fractions."""
    return Hint(Box(box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
