"""Photos as cameras and editors write them: colour profiles by their bytes, EXIF data, JPEG segments."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
from PIL import Image

ORIENTATION = 0x0112
#: What a camera does to an upright scene before it stores it with that EXIF orientation: the turns below, undone.
STORED_AS = {
    1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
}  # fmt: skip
#: Red, green and blue as XYZ under D50, one a column (ICC's connection space).
MATRICES = {
    "p3": [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
    "prophoto": [[0.79767, 0.13519, 0.03135], [0.28804, 0.71188, 0.00009], [0.0, 0.0, 0.82521]],
    "srgb": [[0.43607, 0.38515, 0.14308], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]],
}
GAMMA_18 = 1.8


def as_stored(image: Image.Image, orientation: int) -> Image.Image:
    turn = STORED_AS[orientation]
    return image.copy() if turn is None else image.transpose(turn)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def icc_profile(name: str, kind: bytes = b"RGB ", device: bytes = b"mntr") -> bytes:
    """An ICC profile of version 4.2, by its bytes (ICC.1:2010): three matrix columns and a curve; or a grey curve."""

    def s15(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    xyz = [b"XYZ \0\0\0\0" + s15(*(row[c] for row in MATRICES.get(name, MATRICES["srgb"]))) for c in range(3)]
    srgb_curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + s15(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    plain_curve = b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + s15(GAMMA_18)
    curve = plain_curve if name in ("prophoto", "grey") else srgb_curve
    text = f"{name} of the tests".encode("utf-16-be")
    words = b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(text), 28) + text
    white = b"XYZ \0\0\0\0" + s15(0.9642, 1.0, 0.8249)
    tags = {b"desc": words, b"cprt": words, b"wtpt": white}
    tags |= {b"kTRC": curve} if kind == b"GRAY" else {
        b"rXYZ": xyz[0], b"gXYZ": xyz[1], b"bXYZ": xyz[2], b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}  # fmt: skip
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s12x4s28x", 128 + len(table) + len(body), b"\0" * 4, 0x04200000, device, kind, b"XYZ ", b"acsp")
    head += s15(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + table + body


def to_srgb(colours: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    """The conversion in numbers: (..., 3) levels of 255 in that space to sRGB levels, not rounded."""
    values = np.asarray(colours, float) / 255
    srgb = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = values**GAMMA_18 if name == "prophoto" else srgb
    light = (linear @ np.array(MATRICES[name]).T @ np.linalg.inv(np.array(MATRICES["srgb"])).T).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def jpeg_with_segments(jpeg: bytes, marker: int, content: bytes, count: int) -> bytes:
    """A JPEG with `count` more segments behind its first marker."""
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content
    return jpeg[:2] + segment * count + jpeg[2:]
