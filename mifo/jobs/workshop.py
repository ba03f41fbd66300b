"""Doing jobs one after the other in one process: the base model stays loaded, bundles are read once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .. import api
from ..boxes import layout_of
from ..bundle.catalogue import RECORD
from ..bundle.instance_copy import kept_instance
from ..bundle.several import Several
from ..bundle.shelf import check_name
from ..bundle.store import Bundle, attach, base_of_bundle, find_bundle, is_bundle, load_bundle
from ..bundle.target import photo_digest
from ..config import Drawing, LearnConfig, MemoryConfig, SynthesisConfig, to_dict, with_steps
from ..data.instance import Instance, load_instance, with_background, without_background
from ..editing.output import KIND as EDIT
from ..errors import InputError
from ..evaluation.best_of import draw_best
from ..evaluation.choose import make_backend
from ..evaluation.report import KIND as EVALUATION
from ..io.files import write_file
from ..io.json_text import json_text
from ..io.outputs import PLACE, check_apart, check_output, numbered_folder
from ..io.sheets import sheets_in
from ..learning.report import draw_attention_sheet
from ..learning.state import PhaseRun
from ..learning.trainer import Callback, Trainer
from ..model.base import BaseModel
from ..model.device import choose_device, choose_dtype, precision_name
from ..model.load_base import family_of, identify, resolve
from ..planning.report import limit_gpu
from ..presets import edit_preset, learn_preset, scale_steps, synthesis_preset
from ..prompts import assets_in
from ..synthesis.synthesize import KIND as SYNTHESIS
from .job import EditJob, EvaluateJob, Job, LearnJob, SynthesizeJob

#: (what is done, steps done, steps in all, values such as losses)
Report = Callable[[str, int, int, Mapping[str, float]], None]
PHASES = {"prior": "drawing the prior", "embedding": "phase 1, tokens", "lora": "phase 2, LoRA", "previews": "previews"}
KEPT_BUNDLES = 64


def report_nothing(what: str, done: int, total: int, values: Mapping[str, float]) -> None:
    """For who does not look."""


@dataclass
class Workshop:
    """Does jobs, and holds what the next one may need: one base model, and the bundles that were read."""

    bundles: Path = Path("Model_ours")
    """Where bundles are found and written."""
    output: Path = PLACE
    device: str = ""
    precision: str = "auto"
    _base: tuple[tuple[str, MemoryConfig], BaseModel] | None = None
    _read: dict[Path, tuple[float, Bundle]] = field(default_factory=dict)

    def do(self, job: Job, report: Report = report_nothing, preview: Path | None = None) -> dict[str, Any]:
        """Does it and returns what the command would print with --json. `preview`: a PNG of where the assets look, written while
        learning goes on. Raises InputError and NotFinite as the API does."""
        if isinstance(job, SynthesizeJob):
            return self._synthesize(job, report)
        if isinstance(job, EditJob):
            return self._edit(job, report)
        if isinstance(job, LearnJob):
            return self._learn(job, report, preview)
        if isinstance(job, EvaluateJob):
            return self._evaluate(job, report)
        raise TypeError(f"no such job: {type(job).__name__}")

    # --- each kind ------------------------------------------------------------------------------

    def _synthesize(self, job: SynthesizeJob, report: Report) -> dict[str, Any]:
        bundles = [self.bundle(name) for name in job.bundles]
        bundle = bundles[0] if bundles else None
        output, place = _path(job.output), self._place(bundles)
        check_apart(output, place, {}, {f"the bundle {each.name}": each.folder for each in bundles})
        check_output(output, place, SYNTHESIS, overwrite=False)
        base = self.base_of(bundle, job.model)
        config = _synthesis_config(base.family, job)
        done = _steps(report, "denoising")
        if job.best_of:
            if bundle is None or len(bundles) > 1 or job.num_images > 1:
                raise InputError("best_of chooses one picture of one bundle's things; leave it out, or num_images")
            learned_from = without_background(kept_instance(bundle.folder, bundle.tokens, bundle.instance))
            judge = make_backend("auto", base.family, learned_from, str(base.device))
            layout = layout_of(job.boxes, assets_in(job.prompt))
            with attach(base, bundle, config.lora_scale):
                found = draw_best(base, job.prompt, layout, bundle.tokens, config, job.seed, job.best_of, judge,
                                  _steps(report, "pictures"))  # fmt: skip
            if found is None:
                raise InputError(f"none of the {job.best_of} pictures could be drawn")
            result = api.synthesis_result(found[0], base, bundle, best_of=found[1])
        else:
            result = api.synthesize(base, bundles or None, job.prompt, job.boxes, num_images=job.num_images, seed=job.seed,
                                    config=config, on_progress=done)  # fmt: skip
        with numbered_folder(output, place) as folder:
            paths = result.save(folder)
        return {"folder": str(folder), "images": [str(p) for p in paths], "contact_sheets": sheets_in(folder),
                "json": str(folder / "synthesis.json"), "seconds": round(result.synthesis.seconds, 2),
                "peak_gib": round(result.synthesis.peak_gib, 3),
                **({"best_of": result.facts["best_of"]} if "best_of" in result.facts else {})}  # fmt: skip

    def _edit(self, job: EditJob, report: Report) -> dict[str, Any]:
        bundles = [self.bundle(name) for name in job.bundles]
        output, place = _path(job.output), self._place(bundles)
        check_apart(output, place, {"the image": job.image, "the mask": job.mask},
                    {f"the bundle {each.name}": each.folder for each in bundles})  # fmt: skip
        check_output(output, place, EDIT, overwrite=False)
        base = self.base_of(bundles[0] if bundles else None, job.model)
        config = _drawing(edit_preset(base.family), job)
        result = api.edit(base, bundles or None, job.image, job.mask, job.prompt, job.boxes, num_images=job.num_images,
                          seed=job.seed, config=config, on_progress=_steps(report, "denoising"))  # fmt: skip
        with numbered_folder(output, place) as folder:
            paths = result.save(folder)
        return {"folder": str(folder), "images": [str(p) for p in paths], "contact_sheets": sheets_in(folder),
                "json": str(folder / "edit.json"), "scores": result.scores, "notes": list(result.notes),
                "seconds": round(result.edit.seconds, 2), "peak_gib": round(result.edit.peak_gib, 3)}  # fmt: skip

    def _learn(self, job: LearnJob, report: Report, preview: Path | None) -> dict[str, Any]:
        instance = self._instance(job)
        config, memory = self._learn_config(job, instance.count)
        base = self.base(job.model, memory)
        callbacks = [SavePreview(preview, instance)] if preview else []
        bundle = api.learn(instance, base, self.bundles / _bundle_name(job), config, resume=True, overwrite=job.overwrite,
                           callbacks=callbacks,
                           on_progress=lambda p: report(PHASES[p.phase], p.step, p.total, p.losses))  # fmt: skip
        return _learned(bundle)

    def _instance(self, job: LearnJob) -> Instance:
        instance = load_instance(Path(job.instance))
        return with_background(instance) if job.background else instance

    def _learn_config(self, job: LearnJob, assets: int) -> tuple[LearnConfig, MemoryConfig]:
        config = scale_steps(learn_preset(family_of(job.model), assets=assets), job.step_factor or 1)
        device = choose_device(self.device)
        dtype = choose_dtype(self.precision, device)
        steps = {"embedding": job.phase1_train_steps, "lora": job.phase2_train_steps}
        for phase, count in steps.items():
            if count is not None:
                config = replace(config, **{phase: replace(getattr(config, phase), train_steps=count)})
        config = replace(config, seed=job.seed)
        if job.vram_gib is None:
            return config, MemoryConfig()
        plan = api.plan(job.model, "learn", job.vram_gib, assets=assets, precision=precision_name(dtype), config=config)
        plan.check()
        limit_gpu(plan, device)
        return plan.settings.learn, plan.settings.memory

    def _evaluate(self, job: EvaluateJob, report: Report) -> dict[str, Any]:
        bundle = self.bundle(job.bundle)
        output, place = _path(job.output), self._place([bundle])
        check_apart(output, place, {}, {"the bundle": bundle.folder})
        check_output(output, place, EVALUATION, overwrite=False)
        base = self.base_of(bundle, job.model)
        config = with_steps(synthesis_preset(base.family), job.steps)
        result = api.evaluate(base, bundle, samples=job.samples, seed=job.seed, config=config,
                              on_progress=_steps(report, "pictures"))  # fmt: skip
        with numbered_folder(output, place) as folder:
            paths = result.save(folder)
        return {"folder": str(folder), "images": [paths["contact_sheet"]], "json": paths["json"], "table": str(result)}

    # --- what is there already ------------------------------------------------------------------

    def learned_already(self, job: LearnJob) -> dict[str, Any] | None:
        """The bundle that stands there, if it was learned from this very photo, on this base model, with these very settings."""
        folder = self.bundles / _bundle_name(job)
        if not is_bundle(folder):
            return None
        bundle, instance = load_bundle(folder), self._instance(job)
        config, _ = self._learn_config(job, instance.count)
        wanted = replace(config, mixed_precision=bundle.config.mixed_precision)
        same = (bundle.metadata.get("photo_digest") == photo_digest(instance) and bundle.config == wanted
                and identify(resolve(job.model)[0])(bundle.base_fingerprint))  # fmt: skip
        return _learned(bundle) if same else None

    def would_write(self, job: SynthesizeJob, record: Mapping[str, Any], written: float) -> bool:
        """Whether a record, of that time, is what the job would write; and no bundle has been learned again since."""
        if job.best_of:
            return False  # its seed is found by drawing
        several = Several.of([self.bundle(name) for name in job.bundles])
        name = self._base_name(several.first, job.model)
        config = _synthesis_config(family_of(name), job)
        within = several.within(job.prompt)
        by_place = several.acts_by_place(config.lora, job.boxes is not None, None)
        layout = several.layout_outside(several.layout(job.boxes, within, by_place))
        mine = {"prompt": several.outside(within), "boxes": layout.to_json() if layout else None, "seed": job.seed,
                "batch_size": job.num_images, "config": to_dict(config)}  # fmt: skip
        names = record.get("bundles") or [n for n in [record.get("bundle")] if n]
        learned = [os.stat(bundle.folder / RECORD).st_mtime for bundle in several.bundles]
        same = json.loads(json_text(mine)) == {key: record.get(key) for key in mine}
        return same and names == [b.name for b in several.bundles] and all(time <= written for time in learned)

    # --- what is held ---------------------------------------------------------------------------

    def bundle(self, name: str) -> Bundle:
        """Read again when its record has been written again."""
        folder = find_bundle(name, self.bundles)
        written = os.stat(folder / RECORD).st_mtime
        if folder in self._read and self._read[folder][0] == written:
            return self._read[folder][1]
        bundle = load_bundle(folder)
        while len(self._read) >= KEPT_BUNDLES:
            self._read.pop(next(iter(self._read)))
        self._read[folder] = written, bundle
        return bundle

    def base_of(self, bundle: Bundle | None, model: str | None) -> BaseModel:
        """The base model that was asked for, or the bundle's own, or the one that comes with mifo."""
        return self.base(self._base_name(bundle, model), MemoryConfig())

    def _base_name(self, bundle: Bundle | None, model: str | None) -> str:
        return model or (base_of_bundle(bundle) if bundle else "toybox")

    def base(self, name: str, memory: MemoryConfig) -> BaseModel:
        """Loaded when it is another than the last job's; the last one is let go first, for there may be room for one alone."""
        if self._base is None or self._base[0] != (name, memory):
            self._base = None
            self._base = (name, memory), api.load_base_model(name, self.device, self.precision, memory)
        return self._base[1]

    def _place(self, bundles: list[Bundle]) -> Path:
        return self.output / Several.of(bundles).name


class SavePreview(Callback):
    """Where the assets look, as a picture that is replaced as training goes on."""

    def __init__(self, path: Path, instance: Instance):
        self.path, self.instance, self._drawn = path, instance, 0

    def on_step_end(self, trainer: Trainer, phase: PhaseRun) -> bool:
        self._draw(trainer)
        return False

    def on_phase_end(self, trainer: Trainer, phase: PhaseRun) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        snapshots = trainer.state.snapshots
        if len(snapshots) == self._drawn:
            return
        self._drawn = len(snapshots)
        sheet: Image.Image = draw_attention_sheet(snapshots, self.instance, self.instance.tokens)
        with suppress(InputError), write_file(self.path, overwrite=True) as temporary:  # a picture less stops no training
            sheet.save(temporary, "PNG")


def _synthesis_config(family: str, job: SynthesizeJob) -> SynthesisConfig:
    return _drawing(synthesis_preset(family), job, width=job.width, height=job.height, contrast_scale=job.contrast_scale)


def _drawing(config: Drawing, job: SynthesizeJob | EditJob, **more: float | None) -> Drawing:
    """The preset with what the job says."""
    changed = with_steps(config, job.steps)
    given: dict[str, Any] = {"guidance_scale": job.guidance_scale, "negative_prompt": job.negative_prompt, **more}
    return replace(changed, **{k: v for k, v in given.items() if v is not None})


def _bundle_name(job: LearnJob) -> str:
    """Raises InputError for what can name none."""
    return check_name(job.name or Path(job.instance).name)


def _learned(bundle: Bundle) -> dict[str, Any]:
    measured = {name: bundle.metadata[name] for name in ("attention_inside_mask", "seconds", "peak_gib")}
    return {"bundle": bundle.name, "folder": str(bundle.folder), "tokens": list(bundle.tokens),
            "images": [str(bundle.folder / "preview.png"), str(bundle.folder / "attention.png")], **measured}  # fmt: skip


def _steps(report: Report, what: str) -> Callable[[int, int], None]:
    return lambda done, total: report(what, done, total, {})


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None
