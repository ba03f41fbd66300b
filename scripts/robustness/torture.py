"""`learn` killed at random moments, starved of disk and memory, its folders removed: what is on the disk afterwards?

    python -m scripts.robustness.torture --kills 50 --faults 20

The rule, checked after every single fault: the bundle that was there before is still there and whole, or the new one is, bit by
bit what an undisturbed run learns; never anything between. A killed run is resumed until it ends, and must end with those bits.
On a tiny random model, in forked processes (Unix). Writes scripts/results/torture.json; status 1 if the rule was broken.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# The parent imports everything and computes nothing: a process that has computed with threads cannot be forked safely.
from _as_user import CAN_OBEY, obeying_permissions  # noqa: E402
from _tiny import snapshot, tiny_base_folder, write_instance  # noqa: E402

from mifo.bundle.store import load_bundle  # noqa: E402
from mifo.data.instance import load_instance  # noqa: E402
from mifo.errors import InputError  # noqa: E402
from mifo.learning.checkpoints import Checkpointing, latest  # noqa: E402
from mifo.learning.learn import learn  # noqa: E402
from mifo.model.load_base import load_base_model  # noqa: E402
from mifo.presets import learn_preset  # noqa: E402

NAME = "cups"


class Torture:
    """One place with a base model, an instance, an old bundle and what an undisturbed run makes of them."""

    def __init__(self, place: Path, steps: int, seed: int):
        self.place, self.steps, self.rng = place, steps, random.Random(seed)
        tempfile.tempdir = str(place)  # children are killed, or leave without tidying up
        self.statuses: Counter[str] = Counter()
        self.broken: list[str] = []
        self.base = place / "base"
        self._in_child(lambda: shutil.move(tiny_base_folder(), self.base))
        write_instance(place / NAME)
        self._in_child(lambda: self._learn(place / "old", seed=1))
        started = time.monotonic()
        self._in_child(lambda: self._learn(place / "new"))
        self.seconds = time.monotonic() - started
        self.old, self.new = (self._bytes(place / kind / NAME) for kind in ("old", "new"))
        assert self.old != self.new

    def _learn(self, output: Path, seed: int = 0) -> None:
        torch.set_num_threads(1)
        config = learn_preset("stable-diffusion")
        config = replace(
            config,
            embedding=replace(config.embedding, train_steps=self.steps),
            lora=replace(config.lora, train_steps=self.steps, rank=2),
            prior=replace(config.prior, num_class_images=1, sampling_steps=1),
            seed=seed,
        )
        checkpointing = Checkpointing(2, resume=True)
        learn(load_instance(self.place / NAME), load_base_model(str(self.base)), config, output / NAME, lambda _: None, None,
              checkpointing)  # fmt: skip

    @staticmethod
    def _in_child(job: Callable[[], object]) -> None:
        _, status = os.waitpid(fork(job), 0)
        if status:
            raise SystemExit(f"the undisturbed part of the torture failed ({status})")

    @staticmethod
    def _bytes(folder: Path) -> dict[str, bytes | None]:
        return {name: content for name, content in snapshot(folder).items() if name not in ("bundle.json", "manifest.json")}

    def fresh_place(self) -> Path:
        """A folder with the old bundle in it."""
        output = Path(tempfile.mkdtemp(dir=self.place))
        shutil.copytree(self.place / "old" / NAME, output / NAME)
        return output

    def check(self, output: Path, what: str, may_be_gone: bool = False) -> str:
        """The rule. Returns "old", "new" or "gone"."""
        folder = output / NAME
        if may_be_gone and not folder.exists():
            return "gone"
        try:
            load_bundle(folder)
            found = self._bytes(folder)
            if found in (self.old, self.new):
                return "old" if found == self.old else "new"
            self.broken.append(f"{what}: the bundle loads but is neither the old nor the new one")
        except InputError as error:
            self.broken.append(f"{what}: the old bundle is lost ({error})")
        return "broken"

    # --- kills ---

    def kill(self, kills: int) -> dict[str, int]:
        """Kills `kills` runs at random moments, each resumed until it ends."""
        moments: Counter[str] = Counter()
        output, done = self.fresh_place(), 0
        while done < kills:
            pid = fork(partial(self._learn, output))
            time.sleep(self.rng.uniform(0, 1.1 * self.seconds))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            killed = os.WIFSIGNALED(status)
            kind = self.check(output, f"kill {done + 1}")
            if killed:
                done += 1
                saved = latest(output / NAME)
                moments["after the swap" if kind == "new" else saved.where if saved else "before the first checkpoint"] += 1
            elif status:
                self.broken.append(f"a resumed run failed ({status})")
            if not killed or done == kills:
                self._finish(output)
                output = self.fresh_place()
        return dict(moments)

    def _finish(self, output: Path) -> None:
        """Resumes until it ends; then the bits are the undisturbed run's, and nothing else is left."""
        _, status = os.waitpid(fork(lambda: self._learn(output)), 0)
        if status or self.check(output, "after the last resumption") != "new":
            self.broken.append(f"the resumed run ended with {status} and other bits than the undisturbed one")
        left = sorted(p.name for p in output.iterdir() if p.name not in (NAME, ".prior") and not p.name.endswith(".partial"))
        if left:
            self.broken.append(f"left behind: {left}")
        shutil.rmtree(output)

    # --- other faults ---

    def starve(self, kind: str) -> None:
        """One run under one fault; afterwards the rule holds, and an undisturbed run still ends well."""
        output = self.fresh_place()
        moment = self.rng.uniform(0, self.seconds)

        def job() -> None:
            if kind == "disk full":
                size = int(10 ** self.rng.uniform(2, 5.5))
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            if kind == "memory limit":
                used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                limit = used + int(10 ** self.rng.uniform(6, 8.7))
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            with obeying_permissions():
                self._learn(output)

        pid = fork(job)
        if kind in ("folder removed", "read-only folder"):
            time.sleep(moment)
        if kind == "folder removed":
            shutil.rmtree(output, ignore_errors=True)
        if kind == "read-only folder":
            _set_mode(output, 0o555)
        _, status = os.waitpid(pid, 0)
        _set_mode(output, 0o755)
        self.rng.random()  # the child drew from a copy
        name = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        bundle = self.check(output, f"{kind}, {name}", may_be_gone=kind == "folder removed")
        self.statuses[f"{kind}: {name}, {bundle} bundle"] += 1
        output.mkdir(exist_ok=True)
        self._finish(output)


def _set_mode(output: Path, mode: int) -> None:
    for path in (output, output / NAME, output / ".checkpoints", output / ".checkpoints" / NAME):
        with suppress(FileNotFoundError):
            path.chmod(mode)


def fork(job: Callable[[], object]) -> int:
    """Runs `job` in a child: status 0 done, 2 InputError, 3 out of memory, 1 anything else, which is a bug."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        job()
        status = 0
    except InputError:
        status = 2
    except BaseException as error:
        short = isinstance(error, MemoryError) or "alloc" in str(error) or "memory" in str(error)
        status = 3 if short else 1
        if not short:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status)


def main(
    kills: Annotated[int, typer.Option(min=0)] = 50,
    faults: Annotated[int, typer.Option(min=0, help="Runs under each of the other faults.")] = 20,
    steps: Annotated[int, typer.Option(min=2, help="Of each phase.")] = 6,
    seed: int = 0,
    write: Annotated[bool, typer.Option(help="Write scripts/results/torture.json.")] = True,
) -> None:
    """Tortures `learn`, prints what happened, and ends with status 1 if the rule was broken."""
    with tempfile.TemporaryDirectory(prefix="mifo-torture-") as folder:
        torture = Torture(Path(folder), steps, seed)
        print(f"undisturbed: {torture.seconds:.1f} s")
        moments = torture.kill(kills)
        print("killed", moments)
        kinds = ["disk full", "folder removed"] + ["read-only folder"] * CAN_OBEY + ["memory limit"] * (sys.platform == "linux")
        for kind in kinds:
            for k in range(faults):
                torture.rng.seed(f"{seed} {kind} {k}")
                torture.starve(kind)
        print("other faults", dict(torture.statuses))
    for line in torture.broken:
        print("BROKEN:", line)
    if write:
        from scripts.record import write_result

        numbers = {"kills": kills, "killed_at": moments, "other_faults": dict(torture.statuses), "rule_broken": torture.broken}
        print(write_result("torture", numbers))
    raise SystemExit(1 if torture.broken else 0)


if __name__ == "__main__":
    typer.run(main)
