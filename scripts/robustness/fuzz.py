"""Generated input for everything that reads files or text from strangers: no traceback, no hang, bounded memory.

    python -m scripts.robustness.fuzz --runs 100000

Guided by coverage with atheris (`pip install atheris`: Linux, Python 3.11 and later); without it, or with --blind, right inputs
are spoiled at random. The targets are those of the property tests. Each target runs in a process of its own, stopped after
5 s on one input or 1 GiB above its start; an input that fails is kept as `crash-*` in --workdir, and the run ends with status 1.
Writes scripts/results/fuzz.json.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

SECONDS = 5
ABOVE_MIB = 1024
MAX_BYTES = 1 << 20


def main(
    runs: Annotated[int, typer.Option(min=1, help="Inputs, shared out among the targets.")] = 100_000,
    target: Annotated[str | None, typer.Option(help="One target only, in this process.")] = None,
    blind: Annotated[bool, typer.Option(help="Without coverage, whether atheris is there or not.")] = False,
    seed: int = 1,
    workdir: Annotated[Path | None, typer.Option(help="Keeps failing inputs.")] = None,
) -> None:
    """Fuzzes every target and writes scripts/results/fuzz.json."""
    blind = blind or importlib.util.find_spec("atheris") is None
    folder = workdir or Path(tempfile.mkdtemp(prefix="mifo-fuzz-found-"))
    folder.mkdir(parents=True, exist_ok=True)
    if target:
        (_blind if blind else _guided)(target, runs, seed, folder)
        return
    from _targets import TARGETS

    found = {name: _in_a_process(name, -(-runs // len(TARGETS)), blind, seed, folder) for name in TARGETS}
    for name, facts in found.items():
        print(name, facts)
    from scripts.record import write_result

    inputs = sum(facts["inputs"] for facts in found.values())
    kind = "spoiled at random" if blind else "guided by coverage (atheris)"
    print(write_result("fuzz", {"kind": kind, "inputs": inputs, "seconds_allowed": SECONDS, "mib_allowed": ABOVE_MIB,
                                "failures": sum(facts["failed"] for facts in found.values()), "targets": found}))  # fmt: skip
    if any(facts["failed"] for facts in found.values()):
        print(f"failing inputs: {folder}")
        raise SystemExit(1)


def _in_a_process(name: str, runs: int, blind: bool, seed: int, folder: Path) -> dict[str, Any]:
    started = time.monotonic()
    command = [sys.executable, __file__, "--target", name, "--runs", str(runs), "--seed", str(seed), "--workdir", str(folder)]
    with tempfile.TemporaryDirectory(prefix="mifo-fuzz-") as scratch:  # a fuzzer that ends its process tidies nothing up
        done = subprocess.run([*command, *(["--blind"] if blind else [])], capture_output=True, text=True, errors="replace",
                              env={**os.environ, "TMPDIR": scratch})  # fmt: skip
    counted = re.findall(r"(?:stat::number_of_executed_units:|^INPUTS) *(\d+)", done.stderr, re.M)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    peak = re.findall(r"^PEAK_ABOVE (\d+)", done.stderr, re.M) or re.findall(r"stat::peak_rss_mb: *(\d+)", done.stderr)
    if done.returncode:
        (folder / f"{name}.log").write_text(done.stderr)
        print(name, *done.stderr.splitlines()[-25:], sep="\n  ")
    return {
        "inputs": int(counted[-1]) if counted else 0,
        "failed": int(done.returncode != 0),
        "seconds": round(time.monotonic() - started, 1),
        "peak_mib_above_start" if blind else "peak_rss_mib": int(peak[-1]) if peak else None,
        **({"coverage": int(covered[-1])} if covered else {}),
    }


def _prepare(target: str) -> int:
    """Imports and fixtures before anything is limited; returns the resident MiB then."""
    from _targets import attempt, seeds

    for each in seeds(target):
        attempt(target, each)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _guided(target: str, runs: int, seed: int, folder: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["mifo", "json", "PIL"]):
        from _targets import attempt, seeds
    base = _prepare(target)
    corpus = folder / f"corpus-{target}"
    corpus.mkdir(exist_ok=True)
    for index, each in enumerate(seeds(target)):
        (corpus / f"seed{index}").write_bytes(each)
    options = [f"-runs={runs}", f"-seed={seed}", f"-timeout={SECONDS}", f"-rss_limit_mb={base + ABOVE_MIB}",
               "-print_final_stats=1", f"-max_len={MAX_BYTES}", f"-artifact_prefix={folder}/crash-{target}-"]  # fmt: skip

    def one(data: bytes) -> None:
        attempt(target, data)

    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()  # ends the process


def _blind(target: str, runs: int, seed: int, folder: Path) -> None:
    from _targets import attempt, seeds
    from test_properties import spoil

    base = _prepare(target)

    def too_long(*_: object) -> None:
        raise TimeoutError(f"{SECONDS} s on one input")

    signal.signal(signal.SIGALRM, too_long)
    rng, right = random.Random(f"{target} {seed}"), seeds(target)
    for _ in range(runs):
        data = rng.choice(right)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = spoil(data, rng)
        signal.alarm(SECONDS)
        try:
            attempt(target, data[:MAX_BYTES])
            above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - base
            if above > ABOVE_MIB:
                raise MemoryError(f"{above} MiB above the start")
        except BaseException:
            (folder / f"crash-{target}-blind").write_bytes(data)
            raise
        finally:
            signal.alarm(0)
    print(f"INPUTS {runs}\nPEAK_ABOVE {above}", file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
