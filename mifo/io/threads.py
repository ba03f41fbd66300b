"""How many threads compute, and how they wait: chosen in one place, before PyTorch starts.

PyTorch's threads spin while they wait for each other. Beside other work that makes small models four times as slow and more
(measured on two cores), so they are told to sleep. A model as small as the embedded one gains nothing from threads within an
operation: it computes on one, and training takes parts of a batch on threads of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def choose_waiting() -> None:
    """Tells OpenMP's threads to sleep while they wait, where nobody has said otherwise. Too late once PyTorch is imported."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)


@contextmanager
def one_thread_an_operation(wanted: bool) -> Iterator[None]:
    """Within the block each operation runs on one thread, if `wanted`."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
