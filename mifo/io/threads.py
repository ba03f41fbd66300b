"""How many threads compute, and how they wait: chosen in one place, before PyTorch starts.

PyTorch's threads spin while they wait for each other. Beside other work that makes small models four times as slow and more
(measured on two cores), so they are told to sleep. A model as small as the embedded one gains nothing from threads within an
operation: it computes on one, and training takes parts of a batch on threads of their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

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


def map_in_order(work: Callable[[A], B], items: Iterable[A], parallel: bool) -> Iterator[B]:
    """`map`, and if `parallel` with a thread for each core. Results come in the items' order; what has not begun when one fails,
    or when the caller stops taking them, is left undone.

    Gradients are switched on and off by thread: `work` says for itself whether it needs any.
    """
    if not parallel:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(cores())
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
