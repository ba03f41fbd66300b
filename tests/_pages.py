"""README and docs, and the commands that they show."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    return found


def commands_of(page: Path) -> list[str]:
    """What stands after `python cli.py`, continuation lines joined."""
    lines = [line for block in blocks_of(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("cli.py ", 1)[1] for line in lines if "cli.py " in line]
