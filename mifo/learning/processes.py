"""One scene on several GPUs: the processes of a launcher share each step's draws, and add up their gradients.

Every process draws all that is random in a step, from the same seed, and computes its own part; so the weights, the optimizer and
the random states are the same everywhere, and the same as those of one process with as many draws, but for rounding.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import PartialState
from torch import distributed

from ..config import LearnConfig
from ..errors import OtherProcessEnded
from ..io.processes import process_count
from .objective import StepLosses


class Processes:
    """All processes of the job; make it with `here`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.state = PartialState(cpu=device.type == "cpu")

    @staticmethod
    def here(device: torch.device) -> Processes | None:
        """None where this process is the only one."""
        if process_count() < 2:
            return None
        if not distributed.is_initialized():
            atexit.register(_leave)
        return Processes(device)

    @property
    def count(self) -> int:
        return int(self.state.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.state.is_main_process)

    def rounded(self, config: LearnConfig) -> LearnConfig:
        """With as many draws a step that each process has as many as the others, and one at least."""
        phases = (replace(phase, draws=-(-phase.draws // self.count) * self.count) for phase in (config.embedding, config.lora))
        embedding, lora = phases
        return replace(config, embedding=embedding, lora=lora)  # type: ignore[arg-type]

    def share(self, draws: int) -> slice:
        """This process's own of a step's draws."""
        each = draws // self.count
        first = int(self.state.process_index) * each
        return slice(first, first + each)

    def add_up(self, parameters: Sequence[torch.Tensor], losses: StepLosses) -> StepLosses:
        """The sums of all processes' gradients, left in the parameters, and of their losses. A parameter that no process has a
        gradient for has none afterwards."""
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        values = [x.detach().float().reshape(1) for x in (losses.diffusion, losses.attention, losses.prior)]
        flat = torch.cat([x.float().flatten().to(self.device) for x in (*parts, there, *values)])
        self._sum(flat)
        sums = flat.split([*(part.numel() for part in parts), len(there), 3])
        for parameter, part, has, grad in zip(parameters, parts, sums[-2].tolist(), sums, strict=False):
            parameter.grad = grad.view_as(part).to(part.dtype) if has else None
        return StepLosses(*sums[-1])

    def any(self, flag: bool) -> bool:
        """True in all where it is true in one."""
        found = torch.tensor([float(flag)], device=self.device)
        self._sum(found)
        return bool(found.item())

    def wait(self) -> None:
        """Until all are here."""
        self._sum(torch.zeros(1, device=self.device))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block, and then the others, for whom it has left something."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def _sum(self, values: torch.Tensor) -> None:
        """In place, over all processes.

        Raises OtherProcessEnded where one of them is gone.
        """
        try:
            distributed.all_reduce(values)
        except torch.OutOfMemoryError:  # this process's own
            raise
        except RuntimeError as error:  # what gloo and NCCL raise for a connection that the other end closed
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OtherProcessEnded(
                f"another of the job's {self.count} processes has ended or cannot be reached; it says why, unless it was killed. "
                f"Start all of them again, with --resume to go on from the last checkpoint ({said})"
            ) from error


def _leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
