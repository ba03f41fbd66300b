"""Threads are chosen before PyTorch starts, and only where nobody has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from _tiny import ROOT

from mifo.io.threads import WAITING, one_thread_an_operation


def settings_in_a_new_process(**given: str) -> list[str]:
    code = f"import os, sys, mifo; print(*(os.environ[n] for n in {list(WAITING)!r})); sys.exit('torch' in sys.modules)"
    environment = {k: v for k, v in os.environ.items() if k not in WAITING}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": str(ROOT), **given},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout.split()


def test_importing_the_package_makes_waiting_threads_sleep_before_pytorch_is_there() -> None:
    assert settings_in_a_new_process() == ["PASSIVE", "0", "0"]
    assert settings_in_a_new_process(OMP_WAIT_POLICY="ACTIVE") == ["ACTIVE", "0", "0"]


def test_one_thread_an_operation_for_as_long_as_the_block_lasts() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread_an_operation(True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with one_thread_an_operation(False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
