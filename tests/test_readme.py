"""README and docs: tables say what the result files say, links lead somewhere, the README stays short."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from _pages import PAGES, ROOT, commands_of


def test_the_pages_hold_the_measured_numbers() -> None:
    """The script that makes the tables finds nothing to change."""
    done = subprocess.run([sys.executable, "-m", "scripts.readme_tables", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_is_there(page: Path) -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_every_comparison_with_break_a_scene_says_that_it_does_not_hold() -> None:
    """Until it is measured again."""
    text = (ROOT / "docs" / "results.md").read_text()
    tables = re.findall(r"<!-- table:\w+ -->.*?<!-- end -->", text, re.DOTALL)
    said = {table: re.sub(r"`python -m [^`]*`", "", table) for table in tables}  # a command may name a recipe that is not shown
    comparing = [table for table in tables if "reak-a-scene" in said[table].lower() and "table:main_job" not in table]
    assert len(comparing) >= 4 and all("does not hold as it stands" in table for table in comparing)


def test_the_commands_of_the_pages_have_the_options_that_they_name() -> None:
    import shlex

    from typer.main import get_command

    from mifo.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    lines = [line for page in PAGES for line in commands_of(page)]
    assert len(lines) > 15
    for line in lines:
        words = shlex.split(line, comments=True)
        command = known[words[0]]
        while hasattr(command, "commands"):  # `cluster learn`
            words = words[1:]
            command = command.commands[words[0]]
        options = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word for word in words[1:] if re.fullmatch(r"--[a-z].*", word) and word.split("=")[0] not in options]
        assert not unknown, f"{line}: {unknown}"
