"""Random command lines in a folder full of a user's own files: whatever each of them does, is every file still there as it was?

    python -m scripts.robustness.canaries --lines 1000

Canaries stand in targets, parents and inputs of every writing command: beside `evaluation.json`, `bundle.json` and
`asset0.safetensors`, in old half-written folders, behind links with a lock's name, inside learned bundles. What mifo itself wrote
may be replaced, but only with --overwrite, or by learning the same photo again; and with --overwrite the one file that
--output-path of `boxes` or `check` names. On a tiny random model, drawing grey pictures.
Writes scripts/results/canaries.json; status 1 if a canary changed, or a command ended otherwise than with 0, 1 or 2.
"""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from _tiny import tiny_base_folder, write_instance  # noqa: E402
from PIL import Image  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from mifo import demo  # noqa: E402
from mifo.bundle.store import load_bundle  # noqa: E402
from mifo.cli import app  # noqa: E402
from mifo.editing import edit  # noqa: E402
from mifo.evaluation import run as evaluation  # noqa: E402
from mifo.io.files import write_folder  # noqa: E402
from mifo.io.manifest import MANIFEST  # noqa: E402
from mifo.learning import learn  # noqa: E402
from mifo.model import load_base  # noqa: E402
from mifo.synthesis import synthesize as synthesis  # noqa: E402
from mifo.synthesis import variations as scenes  # noqa: E402
from mifo.toybox.examples import write_example  # noqa: E402

BOXES = "[[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]"
PROMPT = "a photo of <asset0> and <asset1>"
LEARN = ["--phase1-train-steps", "1", "--phase2-train-steps", "0", "--checkpoint-every", "0", "--keep-base-path"]
OLD = 100_000  # seconds: long enough for a half-written folder to count as left behind
OURS = ("Model_ours/cups", "Model_ours/twins", "out/own")
"""Folders that mifo wrote, all of them as it wrote them."""


class Place:
    """A project folder that is made again whenever a command has changed something in it."""

    def __init__(self, home: Path):
        self.home, self.template = home / "project", home / "template"
        self.base = home / "base"
        shutil.copytree(tiny_base_folder(), self.base)
        self._make_template()
        self.reset()
        self.right = self.digests()
        self.base_digests = _digests(self.base)

    def reset(self) -> None:
        os.chdir(self.home.parent)
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self.template, self.home, symlinks=True)
        (self.home / "traps" / "hard.png").unlink()
        os.link(self.home / "photos" / "cups" / "mask0.png", self.home / "traps" / "hard.png")
        for path in self.home.rglob(".*partial"):
            long_ago = time.time() - OLD
            os.utime(path, (long_ago, long_ago), follow_symlinks=False)
        os.chdir(self.home)

    def digests(self) -> dict[str, str]:
        return _digests(self.home)

    def broken(self, arguments: list[str]) -> list[str]:
        """The canaries that this command line was not allowed to change, and has."""
        found = self.digests()
        overwrite = "--overwrite" in arguments
        asked = [_output(arguments)] if overwrite and arguments[0] in ("boxes", "check") else []  # one file, named and asked for
        ours = OURS if overwrite or arguments[0] == "learn" else ()
        changed = [n for n, digest in self.right.items() if found.get(n) != digest and not n.startswith(ours)
                   and self.home / n not in asked]  # fmt: skip
        if changed or found != self.right:
            self.reset()
        return [*changed, *self._broken_base(arguments, asked)]

    def _broken_base(self, arguments: list[str], asked: list[Path | None]) -> list[str]:
        """What of the base model's folder has changed, or is new there although the command reads it."""
        found = _digests(self.base)
        if found == self.base_digests:
            return []
        reads_it = arguments[0] not in ("boxes", "check", "demo")
        names = found.keys() | self.base_digests.keys() if reads_it else self.base_digests.keys()
        changed = [n for n in names if found.get(n) != self.base_digests.get(n) and self.base / n not in asked]
        shutil.rmtree(self.base)
        shutil.copytree(tiny_base_folder(), self.base)
        return [f"base/{name}" for name in changed]

    # --- what stands there ---

    def _make_template(self) -> None:
        place = self.template
        write_instance(place / "photos" / "cups")
        write_instance(place / "more" / "cups", assets=1)  # another photo of the same name
        write_example("twins", place / "photos" / "twins")
        for words in (["cups"], ["twins"], ["cups", "--name", "kept"], ["cups", "--name", "changed"]):
            call("learn", *words, "--folder-path", place / "photos", "--model-path", self.base, "--output-dir",
                 place / "Model_ours", *LEARN)  # fmt: skip
        for name in ("own", "own_plus"):
            call("synthesize", "cups", "--output-dir", place / "Model_ours", "--prompt", PROMPT, "--output-path",
                 place / "out" / name)  # fmt: skip
        shutil.rmtree(place / "Model_ours" / ".prior", ignore_errors=True)
        for name, text in FILES.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text)
        for name in ("traps/photo.png", "traps/hard.png", "output/boxes-0001.png", "out/edit00.png", "check.png"):
            Image.effect_noise((96, 64), 60).convert("RGB").save(place / name)
        Image.open(place / "photos" / "cups" / "mask0.png").save(place / "traps" / "mask.png")
        for name, target in LINKS.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).symlink_to(target)
        (place / "traps" / "empty").mkdir()


FILES = {
    ".git/HEAD": "ref: refs/heads/main", "notes.txt": "mine", "evaluation.json": "{}", "bundle.json": "{}",
    "prompts.txt": PROMPT, "boxes.json": BOXES, "synthesis.json": "{}", "traps/evaluation/evaluation.json": "{}",
    "traps/evaluation/mine.txt": "mine",
    "traps/bundle/bundle.json": "{}", "traps/bundle/mine.txt": "mine", "traps/export/asset0.safetensors": "mine",
    "traps/export/asset_sources.psd": "mine", "traps/web/manifest.json": '{"manifest_version": 3}',
    "traps/web/index.html": "mine",
    "traps/forged/manifest.json": '{"written_by": "mifo", "kind": "evaluation", "files": {}}', "traps/forged/mine.txt": "mine",
    "traps/.x.partial/mine.txt": "mine", "traps/.mifo-0123456789abcdef.partial/mine.txt": "mine",
    "photos/.old.partial/mine.txt": "mine", "out/.desk.partial/mine.txt": "mine", "output/cups/0001/mine.txt": "mine",
    "output/cups/.keep.partial/mine.txt": "mine", "Model_ours/kept/mine.txt": "mine", "Model_ours/changed/bundle.json": "{}",
    "Model_ours/.checkpoints/third/lock": "my combination", "out/own_plus/mine.txt": "mine", ".x.partial/mine.txt": "mine",
    "Model_ours/.cups.partial/mine.txt": "mine", "Model_ours/.checkpoints/cups/.a.partial/mine.txt": "mine",
    "Model_ours/.checkpoints/fifth/00000001.safetensors": "mine",
}  # fmt: skip
LINKS = {
    "traps/link": "evaluation", "traps/dangling": "nowhere", "traps/to_photos": "../photos/cups", "traps/notes": "../notes.txt",
    "Model_ours/.checkpoints/first/lock": "../../../notes.txt", "Model_ours/.checkpoints/second/lock": "nowhere",
    "Model_ours/.checkpoints/fourth": "../../photos/cups", "out/.checkpoints": "../traps/web",
}  # fmt: skip
NAMES = ("cups", "first", "second", "third", "fourth", "fifth", "kept", "changed", "new", "twins")


def call(*words: object) -> int:
    """The command line in this process. Raises what a user would see as a traceback."""
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code


def _digests(folder: Path) -> dict[str, str]:
    """Every path below `folder` -> what it is and holds."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            relative = str(path.relative_to(folder))
            if path.is_symlink():
                found[relative] = f"link to {os.readlink(path)}"
            elif path.is_dir():
                found[relative] = "folder"
            else:
                found[relative] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


# --- random command lines -----------------------------------------------------------------------


def command_line(place: Place, rng: random.Random) -> list[str]:
    """One of the writing commands, with inputs and outputs from anywhere in the project."""
    there = [n for n in place.right if rng.random() < 0.9 or "/" not in n]

    def anywhere() -> str:
        name = rng.choice([*there, *there, ".", "traps", "new", "traps/empty", *OURS])
        path = rng.choice((name, name, str(place.home / name), f"~/{name}", f"traps/../{name}", str(place.base)))
        return rng.choice((path, path, path, f"{path}/new", f"{path}/deep/new.png", os.path.dirname(path) or "."))

    command = rng.choice(list(COMMANDS))
    given = COMMANDS[command](rng, anywhere, str(place.base))
    output = "--output-dir" if command == "learn" else "--output-path"
    if command == "export" or rng.random() < 0.85:
        given += [f"{output}={anywhere() if rng.random() < 0.8 else 'Model_ours' if command == 'learn' else 'out/own'}"]
    return [command, *given, *(["--overwrite"] if rng.random() < 0.5 else [])]


def _output(arguments: list[str]) -> Path | None:
    given = [a.split("=", 1)[1] for a in arguments if a.startswith("--output-path=")]
    return Path(os.path.realpath(os.path.expanduser(given[0]))) if given else None


def _bundle(rng: random.Random) -> str:
    return f"Model_ours/{rng.choice(('cups', 'cups', 'kept', 'twins'))}"


Anywhere = Callable[[], str]
COMMANDS: dict[str, Callable[[random.Random, Anywhere, str], list[str]]] = {
    "learn": lambda rng, anywhere, base: [
        *rng.choice((["cups", "--folder-path", "photos"], ["cups", "--folder-path", "more"], ["photos/twins"], [anywhere()])),
        "--model-path", base, *(["--name", rng.choice(NAMES)] if rng.random() < 0.7 else []), *LEARN],
    "synthesize": lambda rng, anywhere, base: [
        _bundle(rng), "--prompt", PROMPT, "--boxes", rng.choice((BOXES, "boxes.json")), "--seed", str(rng.randrange(3))],
    "edit": lambda rng, anywhere, base: [
        _bundle(rng), "--init-image", rng.choice(("photos/cups/img.png", "out/edit00.png", "traps/photo.png")), "--mask",
        rng.choice(("photos/cups/mask0.png", "traps/mask.png")), "--prompt", "a photo of <asset0>"],
    "decompose": lambda rng, anywhere, base: [_bundle(rng)],
    "variations": lambda rng, anywhere, base: [_bundle(rng), "--count", "2", "--prompts-file", "prompts.txt"],
    "evaluate": lambda rng, anywhere, base: [
        "Model_ours/twins", "--backend", "toybox", "--samples", "1", *rng.choice((
            ["--prompts", "prompts.txt"], ["--images", "out/own"], ["--images", anywhere()]))],
    "export": lambda rng, anywhere, base: [_bundle(rng)],
    "boxes": lambda rng, anywhere, base: [
        rng.choice((BOXES, "boxes.json")), *rng.choice(([], ["--image", "traps/photo.png"], ["--image", "traps/hard.png"]))],
    "check": lambda rng, anywhere, base: [rng.choice(("photos/cups", "photos/twins", "traps/to_photos"))],
    "demo": lambda rng, anywhere, base: [],
}  # fmt: skip


# --- instead of drawing -------------------------------------------------------------------------


def grey_pictures() -> None:
    """What takes long does nothing: here only files matter. Models are read once."""
    load, loaded = load_base.load_base_model, {}

    def load_once(name: str, *more: Any) -> Any:
        key = str(Path(name).resolve()) if os.path.isdir(name) else name
        if key not in loaded:
            loaded[key] = load(name, *more)
        return loaded[key]

    def drawn(base: Any, prompt: str, layout: Any, tokens: Any, config: Any, seed: int = 0, count: int = 1, *_: Any) -> Any:
        return synthesis.Synthesis([Image.new("RGB", (64, 64), "grey")] * count, prompt, layout, config, seed, 0.0, 0.0)

    def learned(instance: Any, base: Any, config: Any, folder: Path, *_: Any) -> Any:
        with write_folder(folder, "bundle", overwrite=True) as temporary:
            shutil.copytree("Model_ours/cups", temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        return load_bundle(folder)

    load_base.load_base_model = load_once  # type: ignore[assignment]
    for module in (synthesis, scenes, evaluation, demo):
        module.synthesize = drawn  # type: ignore[attr-defined]
    for name in ("draw_preview", "draw_attention_sheet"):
        setattr(learn, name, lambda *_: Image.new("RGB", (8, 8)))
    own: Any = demo
    own.learn, own.load_base_model = learned, lambda *_: load_once(str(tiny_base_folder()))
    demo.BOXES = BOXES  # for two things, as the photo has
    own.attach = lambda *_: nullcontext()
    own.sample_prompts = lambda base, prompts, *_: [Image.new("RGB", (64, 64), "grey")] * len(prompts)
    editing: Any = edit
    editing.denoise = lambda unet, scheduler, latents, *_: latents


def main(
    lines: Annotated[int, typer.Option(min=1)] = 1000,
    seed: int = 0,
    write: Annotated[bool, typer.Option(help="Write scripts/results/canaries.json.")] = True,
) -> None:
    """Runs random command lines, prints what happened, and ends with status 1 if a canary changed."""
    rng, statuses, broken = random.Random(seed), Counter[str](), []
    started = time.monotonic()
    grey_pictures()
    with tempfile.TemporaryDirectory(prefix="mifo-canaries-") as scratch:
        place = Place(Path(scratch))
        os.environ["HOME"] = str(place.home)
        for number in range(lines):
            words = command_line(place, rng)
            try:
                status = str(call(*words))
            except Exception as error:
                status = f"{type(error).__name__}: {error}"[:300]
            changed = place.broken(words)
            statuses[f"{words[0]}: status {status if len(status) == 1 else 'traceback'}"] += 1
            if changed or status not in ("0", "1", "2"):
                broken.append({"line": number, "command": shlex.join(words), "status": status, "changed": changed})
                print("BROKEN", broken[-1], flush=True)
        os.chdir(ROOT)
    seconds = round(time.monotonic() - started)
    facts: dict[str, Any] = {"lines": lines, "seed": seed, "canaries": len(place.right), "seconds": seconds,
             "statuses": dict(sorted(statuses.items())), "broken": broken}  # fmt: skip
    for name, count in facts["statuses"].items():
        print(f"{count:5} {name}")
    if write:
        from scripts.record import write_result

        print(write_result("canaries", facts))
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    typer.run(main)
