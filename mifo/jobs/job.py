"""A job as plain data: what to do, so that a file, a page or a request can ask for it, and any process can do it."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from ..checked import Checked, Within
from ..config import AtLeastOne, Contrast, Count, NotNegative, Seed, Steps, from_dict
from ..errors import InputError, did_you_mean
from ..io.json_text import json_text
from ..io.read_files import read_regular

MAX_FILE_BYTES = 1 << 26
MAX_JOBS = 100_000
Pictures = Annotated[int, Within(1, 1000)]


@dataclass(frozen=True)
class Job(Checked):
    """Base of what can be asked for. Paths are the doing process's own."""

    kind: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """What `read_job` reads; defaults are left out."""
        defaults = {f.name: f.default for f in fields(self)}
        changed = {k: v for k, v in asdict(self).items() if v != defaults[k]}
        plain: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
        if "boxes" in plain:
            plain["boxes"] = json.loads(plain["boxes"])
        return {"kind": self.kind, **plain}


@dataclass(frozen=True)
class SynthesizeJob(Job):
    """As the command `synthesize`."""

    kind = "synthesize"
    prompt: str
    bundles: tuple[str, ...] = ()
    """Names below the folder of bundles, or folders; none draws with the plain base model."""
    boxes: str | None = None
    """JSON text, as `parse_layout` takes it."""
    seed: Seed = 0
    num_images: Pictures = 1
    best_of: Pictures | None = None
    steps: Steps | None = None
    guidance_scale: NotNegative | None = None
    negative_prompt: str | None = None
    width: AtLeastOne | None = None
    height: AtLeastOne | None = None
    model: str | None = None
    """The base model; by default the bundle's own."""
    output: str | None = None
    """The folder to write; the next number below output/<bundle> by default."""
    contrast_scale: Contrast | None = None


@dataclass(frozen=True)
class EditJob(Job):
    """As the command `edit`."""

    kind = "edit"
    prompt: str
    image: str
    mask: str
    bundles: tuple[str, ...] = ()
    boxes: str | None = None
    seed: Seed = 0
    num_images: Pictures = 1
    steps: Steps | None = None
    guidance_scale: NotNegative | None = None
    negative_prompt: str | None = None
    model: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class LearnJob(Job):
    """As the command `learn`; a run that was interrupted goes on."""

    kind = "learn"
    instance: str
    """Its folder."""
    name: str | None = None
    """The bundle's; by default the instance folder's."""
    model: str = "toybox"
    seed: Seed = 0
    background: bool = False
    phase1_train_steps: Count | None = None
    phase2_train_steps: Count | None = None
    vram_gib: Annotated[float, Within(0)] | None = None
    overwrite: bool = False
    step_factor: Annotated[float | None, Within(0.01, 100)] = None
    """So many times the preset's steps."""


@dataclass(frozen=True)
class EvaluateJob(Job):
    """As the command `evaluate`."""

    kind = "evaluate"
    bundle: str
    samples: Pictures = 4
    seed: Seed = 0
    steps: Steps | None = None
    model: str | None = None
    output: str | None = None


KINDS: dict[str, type[Job]] = {each.kind: each for each in (SynthesizeJob, EditJob, LearnJob, EvaluateJob)}


def read_job(data: Any, where: str = "the job", kind: str = "synthesize") -> Job:
    """A job from plain JSON. `kind`: of an object that does not say. Raises InputError that names what is wrong in it."""
    if not isinstance(data, dict):
        raise InputError(f'{where} is {repr(data)[:80]}; expected an object, such as {{"bundles": ["desk"], "prompt": "..."}}')
    values = dict(data)
    named = values.pop("kind", kind)
    if not isinstance(named, str) or named not in KINDS:
        guess = did_you_mean(named, KINDS) if isinstance(named, str) else ""
        raise InputError(f"{where} is of the kind {repr(named)[:60]}; expected one of {', '.join(KINDS)}{guess}")
    wanted = KINDS[named]
    if isinstance(values.get("bundles"), str):
        values["bundles"] = [values["bundles"]]
    if values.get("boxes") is not None and not isinstance(values["boxes"], str):
        values["boxes"] = json_text(values["boxes"])
    missing = [f.name for f in fields(wanted) if f.default is MISSING and f.name not in values]
    if missing:
        raise InputError(f"{where} has no {', no '.join(missing)}, which a job to {named} needs")
    return from_dict(wanted, values, where)


def read_jobs(path: Path, kind: str = "synthesize") -> list[Job]:
    """One JSON object a line; empty lines are passed over. Raises InputError, which names the line."""
    try:
        lines = read_regular(path, MAX_FILE_BYTES).decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise InputError(f"there is no file {path}; give one with a JSON object a line") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is no text in UTF-8; give a file with a JSON object a line") from None
    jobs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is no JSON ({str(error)[:80]}); expected one object a line") from None
        jobs.append(read_job(data, where, kind))
        if len(jobs) > MAX_JOBS:
            raise InputError(f"{path} has more than {MAX_JOBS} jobs; split it")
    if not jobs:
        raise InputError(f"{path} has no jobs; write one JSON object a line")
    return jobs
