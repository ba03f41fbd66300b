"""Who may import whom: arrows run one way, from plain data to the command line."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mifo

PACKAGE = Path(mifo.__file__).parent
#: A room imports from rows above its own. Rooms are the folders below `mifo` and the files beside them.
ROWS = (
    ("errors",),
    ("checked", "prompts", "io"),  # plain data and this machine
    ("config", "boxes", "data"),  # settings, layouts, a photo with its masks
    ("presets", "attention", "model", "toybox"),  # the frozen base; nothing that works on any base knows the one that is drawn
    ("bundle", "sampling", "segmentation"),  # what is learned, on disk; what every drawing job shares; masks from clicks
    ("learning", "synthesis", "editing"),  # the jobs; learning and synthesis meet in the bundle alone
    ("planning", "evaluation"),  # count what the jobs need, and measure what they made
    ("demo", "api"),
    ("jobs",),  # what the API does, as data, in one process or by a list
    ("web", "cluster", "serve"),  # who asks for jobs, or spreads them
    ("cli",),
    ("__main__",),
)
ROW_OF = {room: row for row, rooms in enumerate(ROWS) for room in rooms}


def modules() -> dict[str, Path]:
    """Module name below `mifo`, such as "attention.sites" -> file; the packages' own `__init__` files are left out."""
    files = [f for f in sorted(PACKAGE.rglob("*.py")) if f.name != "__init__.py"]
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}


def imports_of(name: str, path: Path) -> set[str]:
    """Modules below `mifo` that a file imports anywhere in it: at the top, inside functions, or for its types alone."""
    found, known = set(), modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [(alias.name.split("."), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = ["mifo", *name.split(".")][: -node.level] if node.level else []
            base = [*parents, *(node.module.split(".") if node.module else [])]
            targets = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, member in targets:
            if base[0] == "mifo":
                inside = ".".join(base[1:])
                longer = f"{inside}.{member}".lstrip(".")
                found.add(longer if longer in known else inside)
    return found - {"", name}


GRAPH = {name: imports_of(name, path) for name, path in modules().items()}


def room(module: str) -> str:
    return module.split(".")[0]


def reachable(start: str) -> set[str]:
    """Everything that importing `start` imports in its turn."""
    found, waiting = set(), [start]
    while waiting:
        for target in GRAPH.get(waiting.pop(), ()):
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def test_the_parser_sees_all_kinds_of_imports(tmp_path: Path) -> None:
    source = tmp_path / "room.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "from .boxes import Box\nfrom . import checked, __version__\nimport mifo.config\nfrom mifo import prompts\nimport torch\n"
        "if TYPE_CHECKING:\n    from .learning.learn import Learner\n"
        "def later():\n    from .attention.sites import Site\n    from .attention import bounded\n"
    )
    rooms = {"boxes", "checked", "config", "prompts", "learning.learn", "attention.sites", "attention.bounded"}
    assert imports_of("room", source) == rooms
    source.write_text("from ..boxes import Box\nfrom .draw import COLORS\n")
    assert imports_of("toybox.scoring", source) == {"boxes", "toybox.draw"}
    assert len(GRAPH) > 20 and "attention.sites" in GRAPH["sampling.guidance"]


def test_every_room_has_its_row() -> None:
    homeless = sorted({room(m) for m in GRAPH} - set(ROW_OF))
    assert not homeless, f"{', '.join(homeless)}: give it a row in ROWS of {Path(__file__).name}"


def test_arrows_run_one_way() -> None:
    backward = [
        f"{name} (row {ROW_OF[room(name)]}) imports {target} (row {ROW_OF[room(target)]})"
        for name, targets in GRAPH.items()
        for target in sorted(targets)
        if room(target) != room(name) and ROW_OF[room(target)] >= ROW_OF[room(name)]
    ]
    assert not backward, "\n".join(backward)


def test_no_imports_go_in_a_circle() -> None:
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the circle


def test_learning_and_synthesis_never_meet() -> None:
    def rooms(of: str) -> set[str]:
        return {room(target) for name in GRAPH if room(name) == of for target in reachable(name)}

    assert not {"synthesis", "boxes"} & {room(t) for name in GRAPH if room(name) == "learning" for t in GRAPH[name]}
    assert "synthesis" not in rooms("learning") and "learning" not in rooms("synthesis")
    assert "attention.bounded" not in GRAPH["learning.learn"], "learning knows nothing of boxes"
    assert "attention.record" not in GRAPH["synthesis.synthesize"], "synthesis knows nothing of losses"


def test_the_toyboxs_world_stands_alone() -> None:
    for name in ("toybox.draw", "toybox.world"):
        assert {room(target) for target in reachable(name)} <= {"toybox"}, f"{name} reaches {reachable(name)}"
    used_by = {name for name, targets in GRAPH.items() if any(room(t) == "toybox" for t in targets)}
    assert {room(name) for name in used_by} <= {"toybox", "evaluation", "demo", "cli"}


def test_the_attention_folder_knows_neither_losses_nor_steps() -> None:
    for name in (m for m in GRAPH if room(m) == "attention"):
        assert {room(target) for target in GRAPH[name]} <= {"attention", "boxes", "prompts", "errors"}, name
    assert GRAPH["learning.losses"] == set()
