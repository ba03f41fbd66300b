"""Which of several processes this one is, where a launcher (`accelerate launch`, `torchrun`) started them for one job.

Launchers say it in the environment; without them, one process is all there is.
"""

from __future__ import annotations

import os


def process_count() -> int:
    return _number("WORLD_SIZE", 1) if "MASTER_ADDR" in os.environ else 1


def process_index() -> int:
    """0 is the main process, which writes and speaks for all."""
    return _number("RANK", 0) if process_count() > 1 else 0


def local_index() -> int:
    """Among those on this machine: which of its GPUs is this process's."""
    return _number("LOCAL_RANK", process_index()) if process_count() > 1 else 0


def is_main_process() -> bool:
    return process_index() == 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default
