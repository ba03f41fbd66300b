"""Peak memory of what has run so far.

Knows the process and the GPU's allocator only.
"""

from __future__ import annotations

import sys

import torch

if sys.platform != "win32":
    import resource


def peak_gib(device: torch.device | str = "cpu") -> float:
    """GiB: the GPU allocator's peak on a GPU, else the process's peak resident memory (weights and libraries included)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        import psutil  # accelerate brings it

        return psutil.Process().memory_info().peak_wset / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
