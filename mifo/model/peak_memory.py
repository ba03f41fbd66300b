"""Peak memory of a job, and the budget of a GPU."""

from __future__ import annotations

import sys

import torch

if sys.platform != "win32":
    import resource

GIB = 2**30


def with_index(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" is the current one. Some of PyTorch's functions refuse one without."""
    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def limit_memory(device: torch.device | str, size: int) -> None:
    """PyTorch's allocator refuses what goes beyond `size` bytes of this GPU."""
    chosen = with_index(device)
    total = torch.cuda.get_device_properties(chosen).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total), chosen)


class PeakMemory:
    """Within the block, the peak memory on `device`: `gib` is it so far, and after the block the block's.

    On a GPU what its allocator held at most since the block began, weights included. On a CPU the process's largest resident
    memory since it started, libraries included: the system keeps no other. `of` says which: "GPU" or "process". Blocks may
    stand within one another.
    """

    _open: list[PeakMemory] = []  # noqa: RUF012 - the allocator has one counter a device, which the blocks share

    def __init__(self, device: torch.device | str):
        self._on_gpu = torch.device(device).type == "cuda"
        self._device = torch.device(device)
        self._seen = 0.0
        self._ended = False

    def __enter__(self) -> PeakMemory:
        if self._on_gpu:
            self._device = with_index(self._device)
            self._note_all()
            torch.cuda.reset_peak_memory_stats(self._device)
            self._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            self._note_all()
            self._open.remove(self)
        else:
            self._seen = process_peak_gib()
        self._ended = True

    @property
    def of(self) -> str:
        return "GPU" if self._on_gpu else "process"

    @property
    def gib(self) -> float:
        if not self._ended:
            if self._on_gpu:
                self._note_all()
            else:
                self._seen = process_peak_gib()
        return self._seen

    def _note_all(self) -> None:
        """Before the counter is reset or read: every block that is open on this device has seen what it says."""
        for block in self._open:
            if block._device == self._device:
                block._seen = max(block._seen, torch.cuda.max_memory_allocated(self._device) / GIB)


def process_peak_gib() -> float:
    """GiB: the process's peak resident memory since it started, weights and libraries included."""
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / GIB if sys.platform == "darwin" else peak / 2**20
