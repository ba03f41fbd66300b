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


def test_every_comparison_with_break_a_scene_is_after_its_own_search_or_says_that_it_is_not() -> None:
    """One with neither was shown once, and had to be taken back."""
    text = (ROOT / "docs" / "results.md").read_text()
    tables = dict(re.findall(r"<!-- table:(\w+) -->(.*?)<!-- end -->", text, re.DOTALL))
    # a command may name what is not shown
    said = {name: re.sub(r"`python -m [^`]*`", "", table).lower() for name, table in tables.items()}
    comparing = {name for name, table in said.items() if "reak-a-scene" in table}
    settings = re.compile("break-a-scene-tuned|break-a-scene-first-search")
    tuned = {name for name in comparing if settings.search(tables[name]) or "tuned as hard" in said[name]} | {"search"}
    published = {name for name in comparing - tuned if "reak-a-scene" not in said[name].replace("break-a-scene-as-published", "")}
    assert {"answers", "composites", "study", "toybench", "toybench_tuned"} <= tuned and "toybench_published" in published
    assert comparing == tuned | published | {name for name in comparing if "no loss had a search here" in said[name]}


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
