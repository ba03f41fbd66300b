"""Samplers, built as diffusers' own pipelines build them from a base model's `scheduler` folder.

A folder may name any of diffusers' schedulers. Its settings are read by the class that it names, so that each class's own
defaults hold; everything else (the training schedule, and the samplers on offer) is then made from those settings.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

from ..errors import InputError
from ..io.json_text import json_text, named_infinities
from ..io.read_files import read_regular

SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}
OWN = "own"
"""The sampler that the base model's folder names."""
OWN_CLASSES = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
               "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler",
               "DEISMultistepScheduler", "DDPMScheduler")  # fmt: skip
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def read_scheduler(model_folder: Path) -> Any:
    """The scheduler that a base model's folder names, with the folder's settings; a DDIMScheduler with them where the class
    is none of OWN_CLASSES. Raises InputError for settings that are not Stable Diffusion's."""
    folder = model_folder / "scheduler"
    name = _named_class(model_folder)
    kind = getattr(diffusers, name) if name in OWN_CLASSES else DDIMScheduler
    try:
        scheduler = kind.from_pretrained(folder, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # diffusers raises whatever a wrong setting leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the scheduler in {folder} does not load ({reason}); fetch or copy the base model again") from None
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if "FlowMatch" in name or scheduler.config.get("use_flow_sigmas") or prediction not in PREDICTIONS:
        raise InputError(
            f"the scheduler in {folder} is {name} and predicts {prediction}; Stable Diffusion 1.x and 2.x predict one of "
            f"{', '.join(PREDICTIONS)} on a diffusion schedule: give another --model-path"
        )
    schedule = scheduler.alphas_cumprod
    if not (torch.isfinite(schedule).all() and (schedule >= 0).all() and (schedule <= 1).all()):
        raise InputError(f"the noise schedule in {folder} is not within 0 and 1 (its betas); fetch or copy the base model again")
    return as_in_pipelines(scheduler)


def _named_class(model_folder: Path) -> str:
    """The class that a pipeline would load: model_index.json's, else the scheduler's own file's; empty if neither tells."""
    for path, key in ((model_folder / "model_index.json", "scheduler"),
                      (model_folder / "scheduler" / "scheduler_config.json", "_class_name")):  # fmt: skip
        try:
            named = json.loads(read_regular(path, 1 << 20))[key]
            name = named[-1] if isinstance(named, list) else named
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            continue
        if isinstance(name, str):
            return name
    return ""


def as_in_pipelines(scheduler: Any) -> Any:
    """Sets what StableDiffusionPipeline sets in every scheduler it is given: latents are not clipped to pixels' range, and
    the 'leading' timesteps are shifted by one. Schedulers without these settings stay as they are."""
    if scheduler.config.get("clip_sample") is True:
        scheduler.register_to_config(clip_sample=False)
    if scheduler.config.get("steps_offset", 1) != 1:
        scheduler.register_to_config(steps_offset=1)
    return scheduler


def training_schedule(own: Any) -> DDIMScheduler:
    """The same noise schedule and prediction type for learning, where noise is added at any of the training timesteps."""
    return as_in_pipelines(DDIMScheduler.from_config(own.config))


def make_scheduler(name: str, source: Any, spacing: str = OWN) -> Any:
    """A fresh sampler on the noise schedule and prediction type of `source`, the base model's own scheduler; its timesteps lie
    as `spacing` says ('leading', 'linspace', 'trailing'), or as the source's own settings say.

    Raises InputError for a name that does not exist, and for 'own' where the base's class is not among OWN_CLASSES.
    """
    settings = {**source.config} | ({} if spacing == OWN else {"timestep_spacing": spacing})
    if name == OWN:
        return as_in_pipelines(type(source).from_config(settings))
    if name not in SCHEDULERS:
        raise InputError(f"scheduler '{name}' is not known; choose one of {', '.join([*SCHEDULERS, OWN])}")
    return as_in_pipelines(SCHEDULERS[name].from_config(settings))


# --- how many steps -----------------------------------------------------------------------------


def check_steps(name: str, source: Any, steps: int, spacing: str = OWN) -> None:
    """Raises InputError for a number of steps that this sampler cannot take on this schedule, with a number that it can."""
    known = {k: v for k, v in source.config.items() if k != "_use_default_values"}
    settings = json_text(named_infinities(known), sort_keys=True, default=str)
    refusal = _refusal(name, _Source(source, settings), steps, spacing)
    if refusal:
        raise InputError(refusal)


class _Source:
    """A scheduler as a key: equal where class and settings are."""

    def __init__(self, scheduler: Any, settings: str):
        self.scheduler, self.key = scheduler, (type(scheduler), settings)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and self.key == other.key


@lru_cache(maxsize=64)
def _refusal(name: str, source: _Source, steps: int, spacing: str) -> str:
    """Why not, or nothing."""
    make_scheduler(name, source.scheduler)  # an unknown name is told at once
    if _runs(name, source.scheduler, steps, spacing):
        return ""
    top = int(source.scheduler.config["num_train_timesteps"])
    fewer = [n for n in range(min(steps - 1, top), max(0, min(steps - 1, top) - 10), -1)]
    for bound, candidates in (("at most", fewer), ("at least", range(steps + 1, steps + 10))):
        for candidate in candidates:
            if _runs(name, source.scheduler, candidate, spacing):
                good = min(candidate, 50) if bound == "at most" else candidate
                return (f"--steps is {steps}, but the sampler '{name}' on this base model's schedule of {top} timesteps takes "
                        f"{bound} {candidate}; give --steps {good}")  # fmt: skip
    return f"the sampler '{name}' cannot take {steps} steps on this base model's schedule of {top} timesteps; give --steps 50"


def _runs(name: str, source: Any, steps: int, spacing: str) -> bool:
    """A rehearsal with four numbers for latents: what would be out of range, divide by zero or fail in the run, does so here."""
    generator = torch.Generator().manual_seed(0)
    try:
        scheduler = make_scheduler(name, source, spacing)
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 1, 2, 2, generator=generator) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scheduler.scale_model_input(latents, timestep)
            predicted = torch.randn(1, 1, 2, 2, generator=generator)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
    except (ValueError, IndexError, AssertionError, RuntimeError, ZeroDivisionError, KeyError, TypeError):
        return False
    return bool(latents.isfinite().all())
