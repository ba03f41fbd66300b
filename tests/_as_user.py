"""Root may write anywhere. Here a test that runs as root, in a container say, meets permissions as any user does."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

VERSION_3 = 0x20080522  # of capget(2) and capset(2)
IGNORING_PERMISSIONS = 0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
CAN_OBEY = sys.platform == "linux" or getattr(os, "geteuid", lambda: 0)() != 0


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Within the block this thread has none of root's rights over other people's files (Linux; others are no root)."""
    if sys.platform != "linux" or os.geteuid():
        yield
        return
    header, data = (ctypes.c_uint32 * 2)(VERSION_3, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    before = data[0]  # effective, the first 32
    try:
        data[0] &= ~IGNORING_PERMISSIONS
        if libc.capset(header, data):
            raise OSError(ctypes.get_errno(), "capset")
        yield
    finally:
        data[0] = before
        libc.capset(header, data)
