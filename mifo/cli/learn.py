"""The `learn` command."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import InputError, NotFinite
from ..io.console import Bar, Job, say, waiting
from ..io.files import check_writable
from ..io.outputs import PLACE, check_apart
from ..io.processes import is_main_process, process_count
from .app import app
from .job import job_command
from .options import (
    AttentionLoss,
    ComputeOptions,
    EvaluatorOptions,
    InstanceName,
    Keep,
    LearnInput,
    LearnOutput,
    LogWith,
    Recipe,
    TrainingOptions,
)
from .parts import (
    bundle_name,
    choose_attention,
    choose_device,
    choose_dtype,
    family_of,
    import_libraries,
    instance_folders,
    load_base,
    not_to_write_into,
    override,
    plan_within,
    say_weights,
)

if TYPE_CHECKING:
    from ..bundle.store import Bundle
    from ..config import LearnConfig, MemoryConfig
    from ..data.instance import Instance
    from ..learning.relearn import Start
    from ..learning.trainer import Callback
    from ..model.base import BaseModel


@job_command(app, "mifo learn toy_car --folder-path example --seed 1", several_processes=True)
def learn(
    job: Job,
    source: LearnInput,
    training: TrainingOptions,
    evaluators: EvaluatorOptions,
    output: LearnOutput,
    compute: ComputeOptions,
    instance: InstanceName = None,
) -> None:
    """Learn the things in INSTANCE (img.jpg and mask0.png, mask1.png, ...), each as its own token."""
    # all input is checked before anything long starts
    tasks, start = _read_input(instance, source, training, output)
    into_itself = start is not None and output.name is None  # --into asks for just that
    overwrite = output.overwrite or into_itself
    import_libraries()
    from ..bundle.target import check_target

    for task in tasks:
        check_target(task.target, task.instance, None, overwrite)
    learner = _Learner(job, source, training, evaluators, output, compute, start, overwrite)
    results: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for task in tasks:
        try:
            results.append(_learn_summary(learner.learn(task)))
        except (InputError, NotFinite) as error:
            if len(tasks) == 1 or process_count() > 1:  # which would no longer be at the same place
                raise
            failed[task.instance.name] = str(error)  # the others may well succeed
            say(f"{task.instance.name} failed: {error}")
        else:
            job.text(*_learned_text(results[-1]))
    job.json(results[0] if instance is not None else {"bundles": results, **({"failed": failed} if failed else {})})
    if failed:
        say(f"error: {len(failed)} of {len(tasks)} were not learned: {', '.join(failed)}")
        raise typer.Exit(2)


# --- input --------------------------------------------------------------------------------------


@dataclass
class _Task:
    """One photo to learn."""

    instance: Instance
    words: list[str | None] | None
    """What each asset starts from; None where nothing was said."""
    target: Path
    """The bundle's folder."""


def _read_input(instance: str | None, source: LearnInput, training: TrainingOptions,
                output: LearnOutput) -> tuple[list[_Task], Start | None]:  # fmt: skip
    """-> what is to be learned, and from which bundle it goes on. Raises InputError for what does not fit together."""
    from ..data.instance import load_instance, with_background
    from ..prompts import check_class_prompt

    if output.only and output.into is None:
        raise InputError(f"--only {output.only[0]} would be learned, but into which bundle? Add --into NAME")
    if training.class_prompt is not None and training.prior_preservation:
        say_weights(check_class_prompt(training.class_prompt), "class prompt")
    folders = instance_folders(instance, source.folder_path)
    if output.name and len(folders) > 1:
        raise InputError(f"--name {output.name} fits one instance, but {len(folders)} would be learned; name the INSTANCE too")
    with waiting("reading the photo"):
        instances = [load_instance(folder, source.mask_orientation.value) for folder in folders]
    words = [_initializers(source.initializer_tokens, each.count) for each in instances]
    if source.background_asset:
        words = [[*(initial or [None] * each.count), "background"] for initial, each in zip(words, instances, strict=True)]
        instances = [with_background(each) for each in instances]
    start = _start(output, instances)
    targets = [output.output_dir / bundle_name(output.name or each.name) for each in instances]
    if start is not None and output.name is None:
        targets = [start.bundle.folder]
    for target in targets:
        _check_target(target, folders, source.model_path)
    return [_Task(*each) for each in zip(instances, words, targets, strict=True)], start


def _start(output: LearnOutput, instances: list[Instance]) -> Start | None:
    """What --into and --only say; None without them."""
    if output.into is None:
        return None
    if len(instances) > 1:
        raise InputError(f"--into {output.into} takes one instance, but {len(instances)} would be learned; name the INSTANCE too")
    import_libraries()
    from ..bundle.store import find_bundle, load_bundle
    from ..learning.relearn import start_from

    return start_from(load_bundle(find_bundle(output.into, output.output_dir)), output.only or [], instances[0])


# --- learning -----------------------------------------------------------------------------------


class _Learner:
    """Learns one photo after the other with the same options, on the same base model while its memory settings stay the same."""

    def __init__(self, job: Job, source: LearnInput, training: TrainingOptions, evaluators: EvaluatorOptions,
                 output: LearnOutput, compute: ComputeOptions, start: Start | None, overwrite: bool) -> None:  # fmt: skip
        self.job, self.source, self.training, self.evaluators = job, source, training, evaluators
        self.output, self.compute, self.start, self.overwrite = output, compute, start, overwrite
        self.device = choose_device(compute.device)
        self.dtype = choose_dtype(compute.mixed_precision, self.device)
        self.attention = choose_attention(compute.attention_backend, self.device, self.dtype)
        self.base: BaseModel | None = None

    def learn(self, task: _Task) -> Bundle:
        """Raises InputError for what cannot be learned, NotFinite where learning broke down."""
        from ..api import learn as run_learn
        from ..attention.backend import use_backend
        from ..bundle.target import check_target

        output, start, target = self.output, self.start, task.target
        base, config = self._prepare(task.instance)
        judge = _checkpoint_judge(config, task.instance, base, self.evaluators)
        self.job.hint = partial(_resume_hint, target)
        if note := check_target(target, task.instance, base.fingerprint, self.overwrite):
            say(f"note: {note}")
        _say_what_is_resumed(target, self.training.resume)
        earlier = target if os.path.lexists(target) else None
        with _tracking(output.log_with, target.name, task.instance) as callbacks, use_backend(base.unet, self.attention), \
                Bar() as bar, self.job.keeping(earlier):  # fmt: skip
            bundle = run_learn(task.instance, base, target, config, words=task.words, overwrite=self.overwrite,
                               resume=self.training.resume, checkpoint_every=self.training.checkpoint_every, judge=judge,
                               keep_base_path=output.keep_base_path, on_progress=bar.learning, callbacks=callbacks,
                               into=start.bundle if start else None, only=start.only if start else ())  # fmt: skip
        self.job.kept.append(target)
        if not bundle.base_source:
            say(f"note: the bundle has the base model's name, {bundle.base_name}, and fingerprint, but not where it lies: "
                "give the commands that draw --model-path, or learn with --keep-base-path")  # fmt: skip
        return bundle

    def _prepare(self, instance: Instance) -> tuple[BaseModel, LearnConfig]:
        """The base model, loaded, and the settings, both as planned for the memory there is; and a look at the masks."""
        from ..data.mask_check import check_masks
        from ..learning.relearn import check_start
        from ..learning.supervision import learned_size, sizes_of

        config, memory = self._plan(instance)
        base = self._load(memory)
        if self.start is not None:
            check_start(self.start, base, config)
        if config.resolution is not None:
            base.check_side("the resolution", config.resolution)
        if config.aspect == "photo":
            say("note: learned at {}x{} pixels, the photo's own shape".format(*learned_size(base, config, instance.image.size)))
        with waiting("looking at the masks"):
            report = check_masks(instance, sizes_of(base, config))
        for line in (*report.notes, *report.warnings):
            say(f"note: {line}")
        return base, config

    def _plan(self, instance: Instance) -> tuple[LearnConfig, MemoryConfig]:
        from ..config import MemoryConfig
        from ..learning.relearn import relearn_config
        from ..model.device import precision_name

        model, training = self.source.model_path, self.training
        preset = _preset(family_of(model), training, instance.count)
        preset = relearn_config(preset, self.start.bundle) if self.start else preset
        config = _learn_config(preset, training, self.compute.seed, precision_name(self.dtype))
        plan = plan_within("learn", model, self.device, self.dtype, training.resolution, self.compute.vram_gib,
                           self.attention.name, config, assets=instance.count)  # fmt: skip
        return (plan.settings.learn, plan.settings.memory) if plan else (config, MemoryConfig())

    def _load(self, memory: MemoryConfig) -> BaseModel:
        if self.base is None or self.base.memory != memory:
            self.base = None  # let go first: there may be room for one alone
            self.base = load_base(self.source.model_path, self.device, self.dtype, memory)
        return self.base


# --- parts --------------------------------------------------------------------------------------


def _preset(family: str, training: TrainingOptions, assets: int) -> LearnConfig:
    """The family's, with the attention loss that was asked for. Raises InputError for options that contradict each other."""
    from ..presets import learn_preset, with_attention_loss

    preset = learn_preset(family, training.recipe.value, assets)
    if (loss := training.attention_loss) is None:
        return preset
    if training.recipe is not Recipe.mifo:
        raise InputError(f"--recipe {training.recipe.value} has an attention loss of its own; leave --attention-loss out")
    if loss is AttentionLoss.none and (training.penalty_weight is not None or training.relative_penalty_weight is not None):
        raise InputError("--attention-loss none has no weight; leave --penalty-weight and --relative-penalty-weight out")
    return with_attention_loss(preset, family, loss.value)


def _learn_config(config: LearnConfig, training: TrainingOptions, seed: int, precision: Any) -> LearnConfig:
    """The preset with the options that were given."""
    from ..presets import scale_steps

    if training.step_factor is not None:
        config = scale_steps(config, training.step_factor)
    embedding = override(config.embedding, train_steps=training.phase1_train_steps, learning_rate=training.phase1_learning_rate,
                         draws=training.draws)  # fmt: skip
    lora = override(config.lora, train_steps=training.phase2_train_steps, learning_rate=training.phase2_learning_rate,
                    rank=training.lora_rank, text_encoder=training.train_text_encoder, draws=training.draws,
                    timesteps=training.phase2_timesteps)  # fmt: skip
    weights = {"penalty_weight": training.penalty_weight, "relative_penalty_weight": training.relative_penalty_weight}
    embedding = replace(embedding, attention=override(embedding.attention, **weights))
    lora = replace(lora, attention=override(lora.attention, **weights))
    prior = override(config.prior, class_prompt=training.class_prompt, num_class_images=training.num_class_images,
                     enabled=training.prior_preservation)  # fmt: skip
    keep = replace(config.keep, enabled=training.keep is Keep.best)
    if training.composites is not None:
        config = replace(config, composites=replace(config.composites, share=float(training.composites)))
    config = replace(config, embedding=embedding, lora=lora, prior=prior, keep=keep, seed=seed,
                     gradient_checkpointing=training.gradient_checkpointing, mixed_precision=precision)  # fmt: skip
    config = override(config, aspect=training.aspect, crop_conditioning=training.crop_conditioning,
                      resolution=training.resolution, pictures=training.pictures, alone_share=training.alone_share)  # fmt: skip
    return config


@contextmanager
def _tracking(kind: LogWith | None, name: str, instance: Instance) -> Iterator[list[Callback]]:
    """What reports the run elsewhere; every run has a folder of its own."""
    if kind is None or not is_main_process():
        yield []
        return
    from ..learning.tracking import Tracker

    place = PLACE / "logs"
    check_writable(place)
    tracker = Tracker(kind.value, f"{name}-{time.strftime('%Y%m%d-%H%M%S')}", place, instance)
    say(f"note: {kind.value} writes to {place / tracker.name if kind is LogWith.tensorboard else place}")
    try:
        yield [tracker]
    finally:
        tracker.finish()


def _checkpoint_judge(config: LearnConfig, instance: Instance, base: BaseModel, evaluators: EvaluatorOptions) -> Any:
    if not config.keep.enabled:
        return None
    from ..data.instance import without_background
    from ..evaluation.checkpoints import checkpoint_judge
    from ..evaluation.choose import make_backend

    models = (evaluators.dino, evaluators.clip, evaluators.detector)
    with waiting("loading the models that measure"):
        backend = make_backend(evaluators.backend.value, base.family, without_background(instance), str(base.device), *models)
    return checkpoint_judge(backend, config.keep.samples)


def _check_target(target: Path, folders: list[Path], model_path: str) -> None:
    """Raises InputError, before anything long starts, unless the bundle can be written, away from all that is read for it."""
    check_writable(target.parent)
    closed = {**{f"the instance {f.name}": f for f in folders}, **not_to_write_into(None, model_path)}
    check_apart(target, target, {}, closed, "the bundle's folder")


def _resume_hint(target: Path) -> str:
    from ..learning.checkpoints import latest

    saved = latest(target)
    return f"; the state at {saved.where} is kept: the same command with --resume goes on from there" if saved else ""


def _say_what_is_resumed(target: Path, resume: bool | None) -> None:
    from ..learning.checkpoints import latest

    saved = latest(target)
    if saved and resume:
        say(f"note: goes on from {saved.where}")
    elif saved:
        say(f"note: there is a checkpoint of an interrupted run, at {saved.where}")
    elif resume:
        say("note: there is no checkpoint, so it starts from the beginning")


def _initializers(text: str | None, count: int) -> list[str | None] | None:
    if text is None:
        return None
    from ..prompts import check_characters

    words = [w.strip() or None for w in text.split(",")]
    if len(words) != count:
        raise InputError(f"--initializer-tokens has {len(words)} entries for {count} assets; give one per asset, comma-separated")
    check_characters(text, "--initializer-tokens")
    return words


def _learn_summary(bundle: Bundle) -> dict[str, Any]:
    from ..bundle.catalogue import bytes_in

    facts = bundle.metadata
    size = bytes_in(bundle.folder)
    measured = {name: facts[name] for name in ("seconds", "peak_gib", "attention_inside_mask")}
    if facts["skipped_steps"]:
        measured["skipped_steps"] = facts["skipped_steps"]
    return {"bundle": str(bundle.folder), "tokens": list(bundle.tokens), **measured, "mib": round(size / 2**20, 2),
            "preview": str(bundle.folder / "preview.png"), "attention": str(bundle.folder / "attention.png")}  # fmt: skip


def _learned_text(facts: dict[str, Any]) -> list[str]:
    shares = facts["attention_inside_mask"].items()
    return [
        f"learned {', '.join(facts['tokens'])} in {facts['seconds']} s, peak {facts['peak_gib']} GiB",
        f"bundle: {facts['bundle']} ({facts['mib']} MiB)",
        *(f"  {token}: {100 * share:.0f} % of its attention is inside its mask" for token, share in shares),
        *([f"{facts['skipped_steps']} steps overflowed in fp16 and were skipped"] if "skipped_steps" in facts else []),
        f"look at {facts['preview']} and {facts['attention']}",
    ]
