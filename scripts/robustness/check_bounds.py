"""The test suite with the lowest versions that pyproject.toml allows, or with the newest that the registry has.

    python -m scripts.robustness.check_bounds lowest
    python -m scripts.robustness.check_bounds newest --hold torch==2.13.0+cpu

Makes a virtual environment in --workdir (one that is there is used again), installs, runs the tests, and writes
scripts/results/bounds_<which>.json with every version that was installed. Needs the network; pip's own settings (index, wheels)
apply. The registry's PyTorch for Linux brings gigabytes of CUDA libraries; --hold puts a version that is at hand in its place,
and the result says so.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parents[2]


class Which(str, Enum):
    lowest = "lowest"
    newest = "newest"


def requirements(which: str, pyproject: str) -> list[str]:
    """ "torch>=2.4" -> "torch==2.4" for the lowest, "torch" for the newest."""
    block = re.search(r"^dependencies = \[(.*?)^\]", pyproject, re.M | re.S)
    assert block, "pyproject.toml lists no dependencies"
    found = re.findall(r'"([A-Za-z0-9_.-]+)>=([0-9.]+)', block[1])
    return [f"{name}=={version}" if which == "lowest" else name for name, version in found]


def main(
    which: Which,
    workdir: Annotated[Path | None, typer.Option(help="Where the environment is made; a temporary folder by default.")] = None,
    tests: Annotated[str, typer.Option(help="What pytest runs.")] = "tests",
    hold: Annotated[list[str] | None, typer.Option(help="NAME==VERSION instead of that bound; may be given again.")] = None,
    python: Annotated[str, typer.Option(help="The interpreter that the environment gets.")] = sys.executable,
) -> None:
    """Installs, tests, and writes the result."""
    folder = workdir or Path(tempfile.mkdtemp(prefix=f"mifo-{which.value}-"))
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    inside = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    held = {line.split("=")[0]: line for line in hold or []}
    listed = requirements(which.value, (ROOT / "pyproject.toml").read_text())
    wanted = [held.get(line.split("=")[0], line) for line in listed]
    upgrade = ["--upgrade"] if which is Which.newest else []
    installed = subprocess.run([inside, "-m", "pip", "install", "-q", *upgrade, *wanted, "pytest", "hypothesis"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    last, failed, status = "the versions cannot be installed together", [], installed.returncode
    if not status:
        done = subprocess.run([inside, "-m", "pytest", *tests.split()], cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout[-8000:], done.stderr[-2000:])
        last, status = (done.stdout.strip().splitlines() or ["no output"])[-1], done.returncode
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    frozen = subprocess.run([inside, "-m", "pip", "freeze"], capture_output=True, text=True).stdout.splitlines()
    version = subprocess.run([inside, "--version"], capture_output=True, text=True).stdout.strip()
    from scripts.record import write_result

    numbers = {"asked": wanted, "held": list(held.values()), "tests": tests, "passed": status == 0, "pytest": last,
               "failed": failed, "interpreter": version, "installed": frozen}  # fmt: skip
    print(write_result(f"bounds_{which.value}", numbers))
    raise SystemExit(status)


if __name__ == "__main__":
    typer.run(main)
