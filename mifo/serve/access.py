"""Who may ask, how much, and how often."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..io.read_files import UnusableFile, read_regular

MAX_KEYS_BYTES = 1 << 20
SHORTEST = 16  # characters of a key
OPEN = "anybody on this machine"


def read_keys(path: Path | None) -> dict[str, str]:
    """SHA-256 of each key -> whose it is, from a file with `name key` a line; a word that begins with `#` begins a remark.

    Raises InputError.
    """
    if path is None:
        return {}
    try:
        lines = read_regular(path, MAX_KEYS_BYTES).decode().split("\n")
    except (OSError, UnusableFile, UnicodeDecodeError) as error:
        raise InputError(f"the keys in {path} cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = re.split(r"(?:^|\s)#", line)[0].split()  # a key may have a # within it
        if not words:
            continue
        if len(words) != 2 or len(words[1]) < SHORTEST:
            raise InputError(f"{path}, line {number}: expected a name and a key of at least {SHORTEST} characters")
        digest = hashlib.sha256(words[1].encode()).hexdigest()
        if digest in found:
            raise InputError(f"{path}, line {number}: this key is {found[digest]}'s already")
        found[digest] = words[0]
    if not found:
        raise InputError(f"{path} has no keys; write a name and a key a line")
    return found


def whose(keys: Mapping[str, str], key: str | None) -> str | None:
    """The name to a key; None for a wrong one. Without any keys everybody is OPEN."""
    if not keys:
        return OPEN
    digest = hashlib.sha256((key or "").encode()).hexdigest()
    owner = None
    for known, name in keys.items():  # all of them, whatever is found: the time says nothing
        if hmac.compare_digest(known, digest):
            owner = name
    return owner


@dataclass
class Rate:
    """At most `most` requests of one owner in `seconds`."""

    most: int
    seconds: float = 60.0
    _times: dict[str, deque[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait_for(self, owner: str) -> float:
        """0 where the request may come, which then counts; else the seconds until one may."""
        now = time.monotonic()
        with self._lock:
            times = self._times.setdefault(owner, deque())
            while times and now - times[0] >= self.seconds:
                times.popleft()
            if len(times) >= self.most:
                return self.seconds - (now - times[0])
            times.append(now)
            return 0.0
