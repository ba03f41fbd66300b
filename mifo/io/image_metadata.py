"""What an image file says beside its pixels: how much of it is read, and what of its EXIF data an edit keeps.

    file  ->  check_metadata  ->  (opened)  ->  exif bytes  ->  exif_to_write("safe")  ->  exif bytes, what was left out
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..errors import InputError

#: Bytes of metadata in one file. A camera's profile, previews and depth map stay below 10 MB; decoders join such parts
#: piece by piece, and need minutes for some hundred megabytes of them.
MAX_METADATA = 16 << 20
#: Of a GIF's, which comes in blocks of 255 bytes: joined one by one, 16 MB of them take minutes.
MAX_BLOCKS = 1 << 20
SMALLEST_PART = 64  # what the smallest part counts as, so that millions of empty ones are too many as well
MAX_VALUE = 200  # characters or numbers of an EXIF value that is kept
ORIENTATION = 0x0112
EXIF_IFD, GPS_IFD, THUMBNAIL_IFD, MAKER_NOTE = 0x8769, 0x8825, 1, 0x927C
HEADER = b"Exif\0\0"

#: EXIF 2.32, IFD0: make, model, resolution, date. No description, artist, copyright, host computer.
SAFE_TAGS = (0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0132)
#: Exif IFD: exposure, dates and their zones, lens, picture style. No serial numbers, owner, comments, maker note, unique id.
SAFE_EXIF_TAGS = (
    0x829A, 0x829D, 0x8822, 0x8827, 0x8830, 0x9003, 0x9004, 0x9010, 0x9011, 0x9012, 0x9201, 0x9202, 0x9203, 0x9204, 0x9205,
    0x9207, 0x9208, 0x9209, 0x920A, 0x9290, 0x9291, 0x9292, 0xA001, 0xA217, 0xA402, 0xA403, 0xA404, 0xA405, 0xA406, 0xA408,
    0xA409, 0xA40A, 0xA432, 0xA433, 0xA434,
)  # fmt: skip
#: What names a person, a place or a device, in the words of the note about it.
PRIVATE_TAGS = {
    0x010E: "description", 0x013B: "artist", 0x013C: "computer's name", 0x8298: "copyright", 0x9286: "comment",
    MAKER_NOTE: "maker note", 0xA420: "unique id", 0xA430: "owner", 0xA431: "serial number", 0xA435: "lens's serial number",
    0x9C9D: "artist", 0xC62F: "serial number",
}  # fmt: skip


# --- how much there is --------------------------------------------------------------------------


def check_metadata(path: Path) -> None:
    """Raises InputError for a file with more metadata than is read; nothing is decoded. Unknown formats pass.

    Raises OSError when the file cannot be read.
    """
    total = 0
    exif: list[bytes] = []
    with path.open("rb") as file:
        for kind, length in _parts(file):
            if kind == "exif" and total + length <= MAX_METADATA:
                here = file.tell()
                part = file.read(length)
                file.seek(here)
                exif.append(part.removeprefix(HEADER))
            total += max(length, SMALLEST_PART)
            limit = MAX_BLOCKS if kind == "blocks" else MAX_METADATA
            if total > limit:
                raise InputError(
                    f"{path} has more than {limit >> 20} MB of metadata beside its pixels; save it again without metadata."
                )
    check_exif(path, b"".join(exif))


def check_exif(path: Path, exif: bytes) -> None:
    """Raises InputError for EXIF data whose entries share their bytes, and would be many times as large once read."""
    claimed = sum(_claims(exif))
    if claimed > 4 * len(exif) + (1 << 16):
        raise InputError(
            f"{path} has damaged EXIF data: {len(exif)} bytes whose entries claim {claimed}; save it again without metadata."
        )


def _claims(exif: bytes) -> Iterator[int]:
    """Bytes of each entry of IFD0 and of the Exif and GPS IFDs, as far as they lie inside the data."""
    order = _byte_order(exif)
    if not order:
        return
    sizes = (1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)  # of the TIFF types, by their number; 0 is unused
    waiting = [struct.unpack(order + "I", exif[4:8])[0]]
    for offset in waiting:  # grows by the sub-IFDs of IFD0
        for tag, kind, count, value, _ in _entries(exif, offset, order):
            length = count * (sizes[kind] if kind < len(sizes) else 1)
            if length > 4:
                yield max(0, min(length, len(exif) - value))
            if tag in (EXIF_IFD, GPS_IFD) and len(waiting) < 3:
                waiting.append(value)


def _byte_order(exif: bytes) -> str:
    """struct's sign for the byte order of TIFF data; empty when it is none."""
    return {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4], "") if len(exif) >= 8 else ""


def _entries(exif: bytes, offset: int, order: str) -> Iterator[tuple[int, int, int, int, int]]:
    """(tag, type, count, value or its offset, place of the entry) of one IFD."""
    if offset + 2 > len(exif):
        return
    (count,) = struct.unpack_from(order + "H", exif, offset)
    for index in range(count):
        place = offset + 2 + 12 * index
        if place + 12 > len(exif):
            return
        yield (*struct.unpack_from(order + "HHII", exif, place), place)


def _parts(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """(kind, bytes) of each part that is no pixels; "exif" parts begin where the file stands."""
    head = file.read(12)
    readers: list[tuple[bytes, int, Callable[[BinaryIO], Iterator[tuple[str, int]]]]] = [
        (b"\xff\xd8", 2, _jpeg_parts),
        (b"\x89PNG\r\n\x1a\n", 8, _png_parts),
        (b"RIFF", 12, _webp_parts),
        (b"GIF8", 6, _gif_parts),
    ]
    for magic, start, parts in readers:
        if head.startswith(magic):
            file.seek(start)
            yield from parts(file)
            return


def _jpeg_parts(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """Segments up to the first scan; bytes between segments count as parts."""
    while mark := file.read(1):
        if mark != b"\xff":
            yield "junk", 1
            continue
        code = file.read(1)
        while code == b"\xff":
            yield "junk", 1
            code = file.read(1)
        if code in (b"", b"\xda", b"\xd9"):
            return
        if code == b"\0" or 0xD0 <= code[0] <= 0xD8 or code == b"\x01":
            yield "junk", 1
            continue
        size = file.read(2)
        if len(size) < 2:
            return
        start, length = file.tell(), max(0, struct.unpack(">H", size)[0] - 2)
        if 0xE0 <= code[0] <= 0xEF or code[0] == 0xFE:
            is_exif = code[0] == 0xE1 and file.read(6) == HEADER
            file.seek(start)
            yield ("exif" if is_exif else "text"), length
        file.seek(start + length)


def _png_parts(file: BinaryIO) -> Iterator[tuple[str, int]]:
    while len(head := file.read(8)) == 8:
        start, (length, kind) = file.tell(), struct.unpack(">I4s", head)
        if kind == b"IEND":
            return
        if kind not in (b"IHDR", b"PLTE", b"IDAT", b"fdAT"):
            yield ("exif" if kind == b"eXIf" else "text"), length
        file.seek(start + length + 4)


def _webp_parts(file: BinaryIO) -> Iterator[tuple[str, int]]:
    while len(head := file.read(8)) == 8:
        start, (kind, length) = file.tell(), struct.unpack("<4sI", head)
        if kind not in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            yield ("exif" if kind == b"EXIF" else "text"), length
        file.seek(start + length + length % 2)


def _gif_parts(file: BinaryIO) -> Iterator[tuple[str, int]]:
    """Comments and other extensions, of all frames."""
    screen = file.read(7)
    if len(screen) == 7 and screen[4] & 0x80:
        file.seek(3 << (screen[4] & 7) + 1, 1)
    while mark := file.read(1):
        if mark == b",":
            frame = file.read(9)
            if len(frame) == 9 and frame[8] & 0x80:
                file.seek(3 << (frame[8] & 7) + 1, 1)
            file.read(1)
        elif mark == b"!":
            file.read(1)
        elif mark == b";":
            return
        else:
            yield "junk", 1
            continue
        while (size := file.read(1)) not in (b"", b"\0"):
            if mark == b"!":
                yield "blocks", size[0]
            file.seek(size[0], 1)


# --- what is written again ----------------------------------------------------------------------


def exif_to_write(exif: bytes, keep: str) -> tuple[bytes, tuple[str, ...]]:
    """The EXIF data for an edit of a picture whose pixels are upright now, and the names of what it leaves out.

    `keep`: 'keep' (all of it, byte for byte but for the orientation), 'safe' (date, camera, exposure) or 'strip' (none).
    Raises ValueError when the data cannot be written again.
    """
    exif = exif.removeprefix(HEADER)
    if not exif or keep == "strip":
        return b"", ()
    if keep == "keep":
        return HEADER + _upright(exif), ()
    stored = _loaded(exif)
    try:
        kept, left_out = _safe(stored)
        return (kept.tobytes() if len(kept) else b""), left_out
    except Exception as error:  # what a camera wrote may be read and still be too odd to write; PIL then raises many kinds
        raise ValueError(str(error)) from None


def xmp_to_write(xmp: bytes, keep: str) -> bytes:
    """The XMP packet for an edit: only with 'keep', and upright. Its fields name people and places, and are many."""
    if keep != "keep":
        return b""
    return re.sub(rb"(tiff:Orientation(?:=[\"']|>))[0-9]", rb"\g<1>1", xmp)


def _loaded(exif: bytes) -> Image.Exif:
    stored = Image.Exif()
    try:
        stored.load(exif)
    except Exception as error:
        raise ValueError(str(error)) from None
    return stored


def _upright(exif: bytes) -> bytes:
    """The same bytes with the orientation 1, where there is one: offsets inside maker notes stay right."""
    order = _byte_order(exif)
    if not order:
        raise ValueError("no TIFF header")
    changed = bytearray(exif)
    for tag, _, _, _, place in _entries(exif, struct.unpack(order + "I", exif[4:8])[0], order):
        if tag == ORIENTATION:
            struct.pack_into(order + "HHIHH", changed, place, ORIENTATION, 3, 1, 1, 0)
    return bytes(changed)


def _safe(stored: Image.Exif) -> tuple[Image.Exif, tuple[str, ...]]:
    kept = Image.Exif()
    details = stored.get_ifd(EXIF_IFD)
    for tag in SAFE_TAGS:
        if tag in stored and _is_short(stored[tag]):
            kept[tag] = stored[tag]
    safe = {tag: details[tag] for tag in SAFE_EXIF_TAGS if tag in details and _is_short(details[tag])}
    if safe:
        kept[EXIF_IFD] = safe
    left_out = [word for tag, word in PRIVATE_TAGS.items() if tag in stored or tag in details]
    left_out += ["position (GPS)"] if stored.get_ifd(GPS_IFD) else []
    left_out += ["thumbnail"] if stored.get_ifd(THUMBNAIL_IFD) else []
    return kept, tuple(dict.fromkeys(left_out))


def _is_short(value: Any) -> bool:
    return not isinstance(value, (str, bytes, tuple, list)) or len(value) <= MAX_VALUE
