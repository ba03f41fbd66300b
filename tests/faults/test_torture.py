"""A few rounds of scripts/robustness/torture.py: real processes, killed and starved. The long run is for hours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from _tiny import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_little_torture(tmp_path: Path):
    command = [sys.executable, "scripts/robustness/torture.py", "--kills", "2", "--faults", "1", "--steps", "4", "--no-write"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout and "disk full: status 2, old bundle" in done.stdout, done.stdout
    assert list(tmp_path.iterdir()) == [], "left in the folder for temporary files"
