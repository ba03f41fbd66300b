"""Who may import whom: arrows run one way, from plain data to the command line."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import mifo

PACKAGE = Path(mifo.__file__).parent
#: A room imports from rows above its own, and within its row as long as that makes no circle.
#: `attention` and `toybox` are folders; inside them, files count as one room here and are looked at below.
ROWS = (
    ("errors", "checked", "json_text", "read_files"),
    ("config", "boxes", "prompts", "memory", "console", "interrupts", "terminal", "options",
     "files", "manifest", "temporary", "swap", "lock", "outputs"),  # plain data and the machine
    ("tensor_file", "memory_trace", "known_models", "quantize", "half_precision", "finite"),
    ("image_file", "image_metadata", "colour_profile", "mask_file", "mask_orientation"),  # picture files
    ("instance", "asset_crops", "references", "pictures", "picture_file", "edit_frame", "blending", "clean_plate",
     "ranking"),  # pixels
    ("keep_best", "stepper", "embedding", "losses", "mask_sizes", "attention", "guidance", "denoise",
     "samplers"),  # tensors, a bare UNet
    ("base_config", "base_weights", "digest_cache", "single_file", "fingerprint", "base_model"),
    ("bundle_files", "bundle", "bundle_target", "dataset", "prior", "mask_check", "checkpoints",
     "batch", "lora", "export", "sample", "layout_control", "supervision"),  # what a base is dressed and fed with
    ("learn_report", "learn_state", "learn", "synthesize", "edit", "edit_files", "scenes"),
    ("plan_trace", "planner", "plan_report"),  # counts what the jobs above will need
    ("toybox",),  # nothing that works on any base model may know the toybox's world
    ("evaluate",),  # measures what the jobs made, in any world
    ("demo", "command_parts"),
    ("edit_commands", "measure_commands"),
    ("cli",),
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
        "from .boxes import Box\nfrom . import losses, __version__\nimport mifo.config\nfrom mifo import prompts\nimport torch\n"
        "if TYPE_CHECKING:\n    from .learn import Learner\n"
        "def later():\n    from .attention.sites import Site\n    from .attention import bounded\n"
    )
    rooms = {"boxes", "losses", "config", "prompts", "learn", "attention.sites", "attention.bounded"}
    assert imports_of("room", source) == rooms
    source.write_text("from ..boxes import Box\nfrom .draw import COLORS\n")
    assert imports_of("toybox.scoring", source) == {"boxes", "toybox.draw"}
    assert len(GRAPH) > 20 and "attention.sites" in GRAPH["guidance"]


def test_every_room_has_its_row() -> None:
    homeless = sorted({room(m) for m in GRAPH} - set(ROW_OF))
    assert not homeless, f"{', '.join(homeless)}: give it a row in ROWS of {Path(__file__).name}"


def test_arrows_run_one_way() -> None:
    backward = [
        f"{name} (row {ROW_OF[room(name)]}) imports {target} (row {ROW_OF[room(target)]})"
        for name, targets in GRAPH.items()
        for target in sorted(targets)
        if ROW_OF[room(target)] > ROW_OF[room(name)]
    ]
    assert not backward, "\n".join(backward)


def test_no_imports_go_in_a_circle() -> None:
    list(TopologicalSorter(GRAPH).static_order())  # raises CycleError, which names the circle


def test_learning_and_synthesis_never_meet() -> None:
    assert "synthesize" not in reachable("learn")
    assert not {"learn", "learn_report"} & reachable("synthesize")
    assert not {"attention.bounded", "guidance", "boxes"} & GRAPH["learn"], "learning knows nothing of boxes"
    assert not {"attention.record", "losses", "dataset"} & GRAPH["synthesize"], "synthesis knows nothing of learning"


def test_the_toyboxs_world_stands_alone() -> None:
    for name in ("toybox.draw", "toybox.world"):
        assert {room(target) for target in reachable(name)} <= {"toybox"}, f"{name} reaches {reachable(name)}"
    used_by = {name for name, targets in GRAPH.items() if any(room(t) == "toybox" for t in targets)}
    assert {room(name) for name in used_by} <= {"toybox", "evaluate", "demo", "cli"}


def test_the_attention_folder_knows_neither_losses_nor_steps() -> None:
    for name in (m for m in GRAPH if room(m) == "attention"):
        assert {room(target) for target in GRAPH[name]} <= {"attention", "boxes", "prompts", "errors"}, name
    assert GRAPH["losses"] == set()
