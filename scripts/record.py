"""Writes a measurement: the numbers with all that is needed to make them again."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap

from mifo.io.json_text import record_text

FOLDER = Path(__file__).parent / "results"


def write_result(name: str, numbers: dict[str, Any], device: str = "cpu") -> Path:
    """`scripts/results/<name>.json`: command, versions, commit, device, and the numbers."""
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "numpy")
    record = {
        "command": " ".join(["python -m", _module(), *_options()]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "mifo") else ""),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}},
        **numbers,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    path.write_text(record_text(record, indent=2) + "\n")
    return path


def _module() -> str:
    """The script's name as `python -m` takes it, however it was started."""
    path = Path(sys.argv[0]).resolve().with_suffix("")
    return ".".join(path.parts[path.parts.index("scripts") :]) if "scripts" in path.parts else path.name


def _options() -> list[str]:
    """The command's options, without where its pictures and its half-done work went, which changes no number, and without the
    machine's folders."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    for name in ("--sheet", "--work"):
        if name in words:
            at = words.index(name)
            del words[at : at + 2]
    return words


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return done.stdout.strip()


def share(hits: list[bool]) -> dict[str, Any]:
    """Mean of yes/no outcomes in percent, with a 95 % bootstrap interval over them."""
    if not hits:
        return {"percent": None, "of": 0}
    values = np.array(hits, dtype=float)
    percent, low = round(100 * float(values.mean()), 1), float(values.mean())
    high = low
    if len(set(hits)) > 1:
        found = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
        low, high = found.confidence_interval
    return {"percent": percent, "interval_95": [round(100 * float(low), 1), round(100 * float(high), 1)], "of": len(hits)}


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of repeated measurements."""
    low, middle, high = (round(float(np.percentile(values, q)), 3) for q in (0, 50, 100))
    return {"median": middle, "min": low, "max": high, "repeats": len(values)}
