"""Pictures that came by a page or a request: copies of our own, named by chance, which jobs read; and those that can go."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..bundle.prune import Leftover, files_in, folders_in, leftover_of
from ..errors import InputError
from ..io.json_text import json_text
from .store import QUEUED, RUNNING, JobStore
from .worker import LIST

WEB_STATE, SERVE_STATE = ".mifo_web", ".mifo_serve"  # beside the folders that are served, in none of them
UPLOADS, PHOTOS = "uploads", "photos"
FILE = re.compile(r"[0-9a-f]{16}(-mask)?\.(png|jpg|jpeg|webp|gif|bmp)")
FOLDER = re.compile(r"[0-9a-f]{16}")
PART = re.compile(r"img\.png|mask[0-9]+\.png|words\.txt")


def new_upload(state: Path, ending: str = ".png") -> Path:
    """Where a picture may be written."""
    folder = state / UPLOADS
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{secrets.token_hex(8)}{ending}"


def new_photo(state: Path) -> Path:
    """A new folder for a photo and its masks."""
    folder = state / PHOTOS / secrets.token_hex(8)
    folder.mkdir(parents=True)
    return folder


def old_uploads(state: Path) -> Iterator[Leftover]:
    """Those that no job waits for or works on; none where the list of jobs cannot be read."""
    if not (state / LIST).is_file():
        return
    try:
        unfinished = json_text([e.request for e in JobStore(state / LIST).entries((QUEUED, RUNNING), limit=1_000_000)])
    except (InputError, OSError, ValueError):
        return
    for path in files_in(state / UPLOADS, FILE):
        if path.name not in unfinished:
            yield leftover_of("upload", path, [path])
    for folder in folders_in(state / PHOTOS):
        files = files_in(folder, PART)
        if FOLDER.fullmatch(folder.name) and folder.name not in unfinished and files:
            yield leftover_of("upload", folder, files)
