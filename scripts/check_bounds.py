"""The test suite with the lowest versions that pyproject.toml allows, or with the newest that the registry has.

    python scripts/check_bounds.py lowest
    python scripts/check_bounds.py newest

Makes a virtual environment in --workdir, installs, runs the tests, and writes scripts/results/bounds_<which>.json with every
version that was installed. Needs the network; pip's own settings (index, wheels) apply.
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

ROOT = Path(__file__).resolve().parent.parent


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
) -> None:
    """Installs, tests, and writes the result."""
    folder = workdir or Path(tempfile.mkdtemp(prefix=f"mifo-{which.value}-"))
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")
    wanted = requirements(which.value, (ROOT / "pyproject.toml").read_text())
    installed = subprocess.run([python, "-m", "pip", "install", "-q", *wanted, "pytest", "hypothesis"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    last, status = "the versions cannot be installed together", installed.returncode
    if not status:
        done = subprocess.run([python, "-m", "pytest", *tests.split()], cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout[-8000:], done.stderr[-2000:])
        last, status = (done.stdout.strip().splitlines() or ["no output"])[-1], done.returncode
    frozen = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True).stdout.splitlines()
    from results import write_result

    print(write_result(f"bounds_{which.value}", {"asked": wanted, "passed": status == 0, "pytest": last, "installed": frozen}))
    raise SystemExit(status)


if __name__ == "__main__":
    typer.run(main)
