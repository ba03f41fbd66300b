"""Options that the commands share: their choices, their types and their help."""

from __future__ import annotations

import math
import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Precision(str, Enum):
    auto = "auto"
    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


class Recipe(str, Enum):
    mifo = "mifo"
    break_a_scene = "break-a-scene"


class Sampler(str, Enum):
    ddim = "ddim"
    dpm = "dpm"
    unipc = "unipc"
    own = "own"


class Attention(str, Enum):
    auto = "auto"
    sdpa = "sdpa"
    xformers = "xformers"
    materialized = "materialized"


class PlannedJob(str, Enum):
    learn = "learn"
    synthesize = "synthesize"
    edit = "edit"


class Keep(str, Enum):
    last = "last"
    best = "best"


class Judge(str, Enum):
    auto = "auto"
    toybox = "toybox"
    photo = "photo"


class MasksDrawn(str, Enum):
    auto = "auto"
    upright = "upright"
    stored = "stored"


class Metadata(str, Enum):
    keep = "keep"
    strip = "strip"  # type: ignore[assignment]  # it hides str's own method, which nobody calls here
    safe = "safe"


class Background(str, Enum):
    pixel = "pixel"
    poisson = "poisson"
    optimization = "optimization"
    none = "none"


class Optimize(str, Enum):
    weights = "weights"
    latents = "latents"


class Start(str, Enum):
    noise = "noise"
    image = "image"


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _part(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and 0 <= value < 1):
        raise typer.BadParameter(f"{value} is not at least 0 and less than 1.")
    return value


def _at_home(value: Any) -> Any:
    """`~/x` -> `/home/me/x`: in `--output-path=~/x` the shell leaves it as it is. Of one path, a list of them, or none."""
    if isinstance(value, (list, tuple)):
        return [_at_home(each) for each in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) and str(value)[:1] == "~" else value


def path(help: str | None = None) -> Any:
    """An option that is a path, or may be one: a hub id, or boxes as text, passes unchanged."""
    return typer.Option(callback=_at_home, help=help)


def path_argument(help: str, **more: Any) -> Any:
    """As `path`, without a name."""
    return typer.Argument(callback=_at_home, help=help, **more)


def number(minimum: float, maximum: float | None = None, help: str | None = None) -> Any:
    """A finite number within bounds: typer's own bounds let NaN through."""
    return typer.Option(min=minimum, max=maximum, callback=_finite, help=help)


ModelPath = Annotated[str, path("toybox (embedded), sd1.5, sd2.1, a hub id, or a folder.")]
OwnText = Annotated[bool, typer.Option(help="In boxes, each asset reads the prompt as if it spoke of that asset alone.")]
OutputDir = Annotated[Path, path("Where learned bundles are kept.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same result.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; empty picks what is there.")]
VramGib = Annotated[float | None, number(0.5, 1024, "GPU memory to stay within; see 'plan'.")]
AttentionBackend = Annotated[Attention, typer.Option(help="auto: xformers where it works, else PyTorch's own.")]
JudgedBy = Annotated[Judge, typer.Option(help="What measures pictures; auto: toybox for the toybox, photo for all else.")]
Dino = Annotated[str | None, path("DINOv2 model of the photo back end: hub id or folder.")]
Clip = Annotated[str | None, path("CLIP model of the photo back end.")]
Detector = Annotated[str | None, path("OWL-ViT or OWLv2 detector of the photo back end.")]
MaskOrientation = Annotated[
    MasksDrawn, typer.Option(help="For photos that EXIF turns: masks drawn on the upright picture, or on the stored pixels.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
BundleName = Annotated[str, path_argument("A bundle's name under --output-dir, or its folder.")]
OwnBase = Annotated[str | None, path("The base model; the bundle's own by default.")]
OutputPath = Annotated[Path | None, path("Folder to write; by default the next number in output/<bundle>/.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there, all of it its own.")]
Resolution = Annotated[int | None, typer.Option(min=32, help="Pixels; the model's own by default.")]
Steps = Annotated[int | None, typer.Option(min=1, max=1000)]
Scale = Annotated[float | None, number(1)]
LoraScale = Annotated[float | None, number(0, 4)]
BlendingStart = Annotated[float | None, typer.Option(callback=_part, help="Part of the schedule left out, 0 to 1.")]
