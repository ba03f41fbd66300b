"""What the commands have in common: choosing a device, loading the base model of a bundle, fitting a budget."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import InputError
from ..io.console import say, waiting
from .options import Attention, EvaluatorOptions, Precision

if TYPE_CHECKING:
    import torch

    from ..attention.backend import Backend
    from ..boxes import Layout
    from ..bundle.several import Several
    from ..bundle.store import Bundle
    from ..config import EditConfig, LearnConfig, MemoryConfig, SynthesisConfig
    from ..data.instance import Instance
    from ..evaluation.backend import Backend as MeasuredBy
    from ..model.base import BaseModel
    from ..planning.planner import Plan
    from ..synthesis.resumable import ImageJob


def import_libraries() -> None:
    """PyTorch, diffusers and all that a model needs, before a command's own imports.

    A second faster than by themselves: Python does not look for garbage among their half a million objects, which all stay.
    """
    gc.disable()
    try:
        with waiting("loading the libraries"):
            from ..bundle import store as bundle  # noqa: F401
    finally:
        gc.enable()


def not_to_write_into(bundle: Bundle | None, model_path: str | None) -> dict[str, str | Path | None]:
    """The folders that a job reads as a whole, by their names for people; see `outputs.check_apart`."""
    base = model_path or (bundle.base_source if bundle else "")
    embedded = Path(__file__).parent.parent / "toybox"
    return {"the bundle": bundle.folder if bundle else None, "the base model": embedded if base == "toybox" else base}


def family_of(model_path: str) -> str:
    """As BaseModel.family, before the model is there."""
    from ..model.load_base import family_of

    return family_of(model_path)


def choose_device(name: str) -> str:
    from ..model.device import choose_device

    return choose_device(name)


def choose_dtype(precision: Precision, device: str) -> torch.dtype:
    from ..model.device import choose_dtype

    return choose_dtype(precision.value, device)


def choose_attention(wanted: Attention, device: str, dtype: torch.dtype) -> Backend:
    """Chosen once a job, and said with its reason."""
    from ..attention.backend import choose_backend

    backend = choose_backend(wanted.value, device, dtype)
    say(f"attention: {backend.name} ({backend.reason})")
    return backend


def plan_within(job: str, model_path: str, device: str, dtype: torch.dtype, resolution: int | None, vram_gib: float | None,
          backend: str, learn: LearnConfig, synthesis: SynthesisConfig | None = None, assets: int = 3,
          batch: int = 1, edit: EditConfig | None = None) -> Plan | None:  # fmt: skip
    """What fits into --vram-gib, said, and made binding on a GPU; None without a budget."""
    if vram_gib is None:
        return None
    from ..config import EditConfig, SynthesisConfig
    from ..model.load_base import resolve
    from ..model.shapes import SHAPES
    from ..planning.planner import Settings, make_plan, read_model
    from ..planning.report import limit_gpu, plan_text

    model = read_model(model_path if model_path in SHAPES else str(resolve(model_path)[0]))
    side = model.check_side(resolution)
    settings = Settings(job, side, dtype, learn, synthesis or SynthesisConfig(), assets, batch, backend=backend,
                        edit=edit or EditConfig())  # fmt: skip
    with waiting("counting the memory"):
        plan = make_plan(model, settings, vram_gib)
    plan.check()
    say(*plan_text(plan).split("\n"))
    limit_gpu(plan, device)
    return plan


def own_base(bundle: Bundle) -> str:
    from ..bundle.store import base_of_bundle

    try:
        return base_of_bundle(bundle)
    except InputError as error:
        raise InputError(f"the bundle '{bundle.name}' needs its own base model: {error}") from None


def load_base(model_path: str, device: str, dtype: torch.dtype, memory: MemoryConfig) -> BaseModel:
    """`load_base_model`, with the seconds that it takes."""
    from ..model.load_base import load_base_model

    with waiting("loading the base model"):
        return load_base_model(model_path, device, dtype, memory)


def load_base_of(bundle: Bundle, model_path: str | None, device: str, dtype: torch.dtype,
                  memory: MemoryConfig | None = None) -> BaseModel:  # fmt: skip
    """The base model asked for (refused later when it is another than the bundle's), or the bundle's own."""
    from ..config import MemoryConfig

    memory = memory or MemoryConfig()
    if model_path:
        return load_base(model_path, device, dtype, memory)
    try:
        return load_base(own_base(bundle), device, dtype, memory)
    except InputError as error:
        text = str(error)
        own = f"the bundle '{bundle.name}' needs its own base model: "
        raise InputError(text if text.startswith(own) else own + text) from None


def note_compiled(compiled: bool, vram_gib: float | None) -> None:
    """Compiled blocks are bounded by masks, where the plan counts groups."""
    if compiled and vram_gib is not None:
        say("note: --compile takes more memory in boxes than --vram-gib counts; leave it out where memory is short")


def check_sampling(model_path: str, config: SynthesisConfig | EditConfig) -> None:
    """Refuses a number of steps that the sampler cannot take, by the model's scheduler folder alone, before anything loads."""
    from ..model.load_base import resolve
    from ..model.samplers import check_steps, read_scheduler

    folder = resolve(model_path)[0]
    if (folder / "scheduler").is_dir():  # else loading says what is missing
        sampler, spacing = getattr(config, "scheduler", "ddim"), getattr(config, "timestep_spacing", "own")  # editing needs DDIM
        check_steps(sampler, read_scheduler(folder), config.steps, spacing)


def instance_of(bundle: Bundle, folder: Path | None, mask_orientation: str = "auto") -> Instance:
    """The things that the bundle was learned from, without `<background>`: the folder given, or the bundle's own copy."""
    from ..bundle.instance_copy import check_count, kept_instance
    from ..data.instance import load_instance, without_background
    from ..prompts import things_among

    if folder is None:
        return without_background(kept_instance(bundle.folder, bundle.tokens, bundle.instance))
    instance = load_instance(folder, mask_orientation)
    check_count(instance, things_among(bundle.tokens))
    return instance


def measured_by(bundle: Bundle, base: BaseModel, folder: Path | None, evaluators: EvaluatorOptions,
                mask_orientation: str = "auto") -> MeasuredBy:  # fmt: skip
    """The back end that --backend, --dino, --clip and --detector ask for."""
    from ..bundle.instance_copy import check_kept
    from ..evaluation.choose import make_backend

    with waiting("loading the models that measure"):
        source = instance_of(bundle, folder, mask_orientation)
        found = make_backend(evaluators.backend.value, base.family, source, str(base.device), evaluators.dino, evaluators.clip,
                             evaluators.detector)  # fmt: skip
    if folder is None and bundle.instance is not None:
        check_kept(bundle.folder, bundle.instance)  # the toybox's back end has read truth.json beside it
    return found


def bundles_together(bundles: Sequence[Bundle], words: Sequence[str] | None) -> Several:
    """The bundles of one picture. `words`: such as cat=shelf.asset1."""
    from ..bundle.several import Several

    aliases = {}
    for each in words or ():
        word, equals, name = each.partition("=")
        if not equals:
            raise InputError(f"--as is '{each[:80]}'; expected a word, '=' and an asset, such as cat=shelf.asset1")
        aliases[word.strip().strip("<>")] = name.strip().strip("<>")
    return Several(tuple(bundles), aliases)


def layout_together(several: Several, boxes: str | Layout | None, prompt: str, by_place: bool) -> Layout | None:
    """The layout under the names that people give, and notes where one box hides another; `prompt` has the picture's own."""
    from ..bundle.several import hidden_boxes

    layout = several.layout(boxes, prompt, by_place)
    for token, other in hidden_boxes(layout) if by_place and layout else ():
        say(f"note: the box of {several.outside(token)} lies within that of {several.outside(other)}, which comes later: there "
            "the later one's LoRA acts")  # fmt: skip
    return several.layout_outside(layout)


def bundle_name(name: str) -> str:
    from ..bundle.shelf import check_name

    return check_name(name)


def instance_folders(instance: str | None, folder_path: Path) -> list[Path]:
    if instance is not None:
        inside = folder_path / instance
        return [Path(instance) if os.path.isdir(instance) and not os.path.isdir(inside) else inside]
    if not os.path.isdir(folder_path):
        raise InputError(f"There is no folder {folder_path}; give the folder that holds the instances with --folder-path")
    from ..data.instance import is_system_name

    found = sorted(p for p in folder_path.iterdir() if p.is_dir() and not is_system_name(p.name))
    if not found:
        raise InputError(f"{folder_path} holds no instance folders; put img.jpg and mask0.png, ... into one each")
    return found


def say_weights(prompts: Sequence[str], what: str = "prompt") -> None:
    """Notes of prompts that weight their words as other programs do, three at most."""
    from ..prompts import weight_notes

    for note in [note for prompt in prompts for note in weight_notes(prompt, what)][:3]:
        say(f"note: {note}")


def sheet_facts(folder: Path) -> dict[str, Any]:
    """The first page of a folder's contact sheet, and all of them."""
    from ..io.sheets import sheets_in

    sheets = sheets_in(folder)
    return {"contact_sheet": sheets[0], "contact_sheets": sheets}


def sheet_line(folder: Path) -> str:
    """The same for people."""
    first, *others = sheet_facts(folder)["contact_sheets"]
    return f"contact sheet: {first}" + (f", and on to {Path(others[-1]).name}" if others else "")


def count_images(paths: Sequence[Path]) -> str:
    return f"{len(paths)} picture{'s' if len(paths) > 1 else ''}"


def end_job(drawing: ImageJob) -> None:
    """Says what is missing and why, and ends the command with that status; returns when nothing is missing."""
    if drawing.failures:
        say(*drawing.summary())
        raise typer.Exit(drawing.status)


def override(config: Any, **values: Any) -> Any:
    """The configuration with the options that were given; a choice stands for its word."""
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}
    return replace(config, **{k: v for k, v in plain.items() if v is not None})
