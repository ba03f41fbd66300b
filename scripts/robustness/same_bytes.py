"""Whether this checkout learns, draws and edits what an earlier commit did: the same tensors and pixels at the same seeds.

    python -m scripts.robustness.same_bytes main~1

The earlier commit is checked out into a temporary folder, and both run the same short commands with the embedded model, one
thread each. Weights must be equal byte for byte, pictures pixel for pixel; records may say more than they did. Exit status 1
where anything differs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BOXES = "[[0.05, 0.45, 0.35, 0.9], [0.4, 0.45, 0.65, 0.9], [0.7, 0.45, 0.95, 0.9]]"
ALL = "a photo of <asset0> and <asset1> and <asset2> at the beach"


def commands(source: Path, place: Path) -> list[list[str]]:
    """Short runs of every command that draws or learns; results land below `place`."""
    bundle, photo = str(place / "bundles" / "toy_car"), source / "example" / "toy_car"
    return [
        ["learn", "toy_car", "--folder-path", str(source / "example"), "--output-dir", str(place / "bundles"), "--seed", "3",
         "--phase1-train-steps", "12", "--phase2-train-steps", "8", "--num-class-images", "2"],
        ["synthesize", bundle, "--prompt", ALL, "--boxes", BOXES, "--steps", "8", "--seed", "5", "--batch-size", "2",
         "--output-path", str(place / "boxes")],
        ["synthesize", bundle, "--prompt", "a photo of <asset1>", "--steps", "6", "--scheduler", "unipc", "--seed", "7",
         "--output-path", str(place / "alone")],
        ["edit", bundle, "--init-image", str(photo / "img.png"), "--mask", str(photo / "mask1.png"), "--prompt",
         "a photo of <asset0>", "--steps", "6", "--seed", "2", "--output-path", str(place / "edit")],
        ["decompose", bundle, "--steps", "4", "--output-path", str(place / "decompose")],
    ]  # fmt: skip


def run_all(source: Path, place: Path) -> dict[str, str]:
    """-> name of each result -> digest of its tensors or pixels."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    for command in commands(source, place):
        done = subprocess.run([sys.executable, str(source / "cli.py"), *command], cwd=place, env=environment, capture_output=True,
                              text=True)  # fmt: skip
        if done.returncode:
            typer.echo(f"{source}: {' '.join(command)}\n{done.stdout}{done.stderr}", err=True)
            raise typer.Exit(1)
    results = [path for path in sorted(place.rglob("*")) if path.suffix in (".png", ".safetensors")]
    return {str(path.relative_to(place)): digest(path) for path in results}


def digest(path: Path) -> str:
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with Image.open(path) as image:
        return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()


def main(earlier: Annotated[str, typer.Argument(help="A commit, tag or branch.")] = "HEAD") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run(["git", "worktree", "add", "--detach", str(before), earlier], cwd=ROOT, check=True, capture_output=True)
        try:
            found = []
            for name, source in (("earlier", before), ("now", ROOT)):
                place = Path(scratch) / name
                place.mkdir()
                found.append(run_all(source, place))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True, capture_output=True)
    missing = sorted(found[0].keys() - found[1].keys())
    differ = sorted(name for name in found[0].keys() & found[1].keys() if found[0][name] != found[1][name])
    for what, names in (("missing", missing), ("different", differ)):
        for name in names:
            typer.echo(f"{what}: {name}")
    typer.echo(f"{len(found[0]) - len(missing) - len(differ)} of {len(found[0])} results are the same as in {earlier}")
    raise typer.Exit(1 if missing or differ else 0)


if __name__ == "__main__":
    typer.run(main)
