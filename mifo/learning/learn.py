"""Learning: one image and its masks -> N token embeddings and one LoRA (MIFO, arXiv 2511.00542, section 3).

`learn` prepares, trains in two phases, reports and saves, once each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from PIL import Image

from ..bundle.instance_copy import keep_instance
from ..bundle.store import Bundle, load_bundle, save_bundle
from ..bundle.target import check_target, photo_digest
from ..config import LearnConfig, LoraPhase, to_dict
from ..data.instance import FittedInstance, Instance, fit_instance
from ..errors import InputError
from ..io.threads import one_thread_an_operation
from ..model.base import BaseModel
from ..model.embedding import AssetEmbedding, initial_vectors, use_assets
from ..model.half_precision import follow_input_dtype
from ..model.lora import add_adapters, filled_adapter, remove_adapter
from ..model.peak_memory import PeakMemory
from ..prompts import BACKGROUND_TOKEN, add_asset_tokens, join_assets, tokenize_prompt
from .callbacks import AverageWeights, CheckpointJudge, EarlyStopping, SaveCheckpoints, Snapshots
from .checkpoints import Checkpointing, Checkpoints, open_checkpoints, read_checkpoints
from .composites import Composites
from .dataset import InstanceData
from .prior import PriorData, make_prior
from .processes import Processes
from .relearn import HoldOthers, Start, check_start, prior_of_the_others, relearned, starting_vectors
from .report import attention_shares, draw_attention_sheet, draw_preview, environment, save_attention_film
from .state import TrainerState, identity_of
from .supervision import learned_size
from .trainer import Callback, Progress, Report, Trainer


def learn(instance: Instance, base: BaseModel, config: LearnConfig, folder: Path, report: Report = lambda _: None,
          initializer_words: Sequence[str | None] | None = None, checkpointing: Checkpointing | None = None,
          judge: CheckpointJudge | None = None, overwrite: bool = False, keep_base_path: bool = False,
          callbacks: Sequence[Callback] = (), start: Start | None = None) -> Bundle:  # fmt: skip
    """Learns `instance` on `base` and writes the bundle to `folder`. The base model is handed back as it was.

    A bundle that stands there is replaced, in the end and whole, if it was learned from the same photo and masks on the same base
    model, or with `overwrite`; and only if all that is in it is as it was written.

    Where a launcher started several processes for this, all call it alike: a step's draws are shared among them, at least one
    each, and the main process alone writes.

    State is kept beside `folder` as `checkpointing` says, until the bundle is written. Ctrl-C and SIGTERM take effect after
    the step that runs, and the state is kept then too. `judge` scores checkpoints where `config.keep` is enabled.
    `start`: the bundle to go on from, and which tokens are learned into it (`relearn`).
    `keep_base_path` writes into the bundle where a local base model lies.
    Raises InputError for input that cannot be learned from (too many assets for a prompt, masks that vanish), when another
    process learns to `folder`, when a checkpoint that should be resumed is another run's, and when `folder` holds anything that
    may not be replaced.
    """
    processes = Processes.here(base.device)
    config = processes.rounded(config) if processes else config
    check_target(folder, instance, base.fingerprint, overwrite)
    if start is not None:
        check_start(start, base, config)
    identity = identity_of(instance, base, config, initializer_words, (start.bundle.digest, start.only) if start else None)
    state = TrainerState.start(config.seed)
    opened = open_checkpoints if processes is None or processes.is_main else read_checkpoints
    with (opened(folder, identity, checkpointing or Checkpointing()) as checkpoints, PeakMemory(base.device) as peak,
          one_thread_an_operation(base.is_small)):  # fmt: skip
        resumed = checkpoints.load()
        state.last_saved = checkpoints.last_saved
        with processes.main_first() if processes else nullcontext():  # it draws the prior, the others read what it kept
            parts = prepare(instance, base, config, folder.parent / ".prior", report, start.only if start else ())
        words = initializer_words or [None] * instance.count
        rows = initial_vectors(base.text_encoders, base.tokenizer, words)
        rows = starting_vectors(start, instance.tokens, rows) if start else rows
        with ExitStack() as lent:
            embedding = lent.enter_context(use_assets(base.text_encoders, parts.token_ids, rows))
            lent.enter_context(gradient_checkpointing(base, config.gradient_checkpointing))
            is_main = processes is None or processes.is_main
            beside = _callbacks(config, checkpoints, judge, callbacks, is_main)
            prior, adapters = parts.prior, {}
            if start is not None:  # phase 1 sees the bundle's LoRA too
                adapters = lent.enter_context(lend_again(base, start.bundle, embedding))
                beside.insert(0, HoldOthers(embedding, start, instance.tokens))
                if parts.data.composites is None:  # which show the others
                    prior = prior_of_the_others(base, start, config, prior, parts.fitted.image.size[::-1],
                                                lambda k, n: report(Progress("prior", k, n)))  # fmt: skip
            trainer = Trainer(base, parts.data, config, embedding, prior, beside, state, report, checkpoint=resumed,
                              processes=processes)  # fmt: skip
            trainer.train_embedding()
            if start is None:
                adapters = lent.enter_context(lend_adapters(base, config.lora, config.seed))
            trainer.train_lora(adapters)
            if is_main:
                _save(folder, trainer, instance, parts.fitted, adapters, start, _report(trainer, instance, peak, report),
                      keep_base_path)  # fmt: skip
                checkpoints.clear()
    if processes:
        processes.wait()
    return load_bundle(folder)


def _save(folder: Path, trainer: Trainer, instance: Instance, fitted: FittedInstance, adapters: dict[str, PeftModel],
          start: Start | None, found: _Report, keep_base_path: bool) -> None:  # fmt: skip
    """Writes the bundle, whole or not at all. One that was learned into keeps the configuration that it was first learned by."""
    base, config, state = trainer.base, trainer.config, trainer.state

    def write_images(target: Path) -> None:
        found.preview.save(target / "preview.png")
        found.attention.save(target / "attention.png")
        if state.snapshots:
            save_attention_film(target / "attention.webp", state.snapshots, instance, instance.tokens)
        keep_instance(target, instance, fitted)

    if start is not None:
        found.metadata["relearned"] = relearned(start, config, found.metadata["seconds"])
        keep_base_path = keep_base_path or os.path.isabs(start.bundle.base_source)
    save_bundle(folder, base, instance.tokens, instance.words, trainer.embedding.vectors, adapters,
                start.bundle.config if start else config, found.metadata, write_images, overwrite=True,
                keep_base_path=keep_base_path)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What training needs, made before its first step."""

    fitted: FittedInstance
    data: InstanceData
    prior: PriorData | None
    token_ids: list[int]


def prepare(instance: Instance, base: BaseModel, config: LearnConfig, prior_cache: Path | None,
            report: Report = lambda _: None, about: Sequence[str] = ()) -> Prepared:  # fmt: skip
    """Makes the tokens known, fits and encodes the instance, and draws the class prior's images. `about`: tokens of
    which each step has one at least.

    Raises InputError for a resolution that cannot be, and for more assets than a prompt can hold.
    """
    if config.resolution is not None:
        base.check_side("the resolution", config.resolution)
    tokens, known = instance.tokens, base.tokenizer.get_added_vocab()
    add_asset_tokens(base.tokenizer, [t for t in tokens if t not in known])
    ids = [base.tokenizer.get_added_vocab()[t] for t in tokens]
    _check_longest_prompt(base, tokens)
    width, height = size = learned_size(base, config, instance.image.size)
    fitted = fit_instance(instance, size)
    composites, share = None, config.composites.share
    if share and list(about) != [BACKGROUND_TOKEN]:  # which is nothing to cut out
        composites = Composites(fitted, base, config.composites, config.seed, prior_cache,
                                lambda k, n: report(Progress("prior", k, n)))  # fmt: skip
    data = InstanceData(fitted, base, config.placements, config.seed, instance.image.size,
                        [photo.image.size for photo in instance.others], about, composites, share)  # fmt: skip
    prior = None
    if config.prior.enabled and config.lora.train_steps:
        prior = make_prior(base, config.prior, (height, width), config.seed, prior_cache,
                           lambda k, n: report(Progress("prior", k, n)))  # fmt: skip
    return Prepared(fitted, data, prior, ids)


def _callbacks(config: LearnConfig, checkpoints: Checkpoints, judge: CheckpointJudge | None, more: Sequence[Callback],
               is_main: bool) -> list[Callback]:  # fmt: skip
    """In a process that is not the main one, that alone which decides on weights."""
    decides: Callback = EarlyStopping(config.keep, judge) if config.keep.enabled and judge else AverageWeights()
    return [decides, SaveCheckpoints(checkpoints), Snapshots(), *more] if is_main else [decides]


@dataclass(frozen=True)
class _Report:
    """What a bundle says of its making."""

    preview: Image.Image
    attention: Image.Image
    metadata: dict[str, Any]


def _report(trainer: Trainer, instance: Instance, peak: PeakMemory, report: Report) -> _Report:
    base, config, state, tokens = trainer.base, trainer.config, trainer.state, instance.tokens
    shares = attention_shares(base, trainer.data, tokens, config.lora.attention)
    preview = draw_preview(instance, base, tokens, config.seed, config.resolution,
                           lambda k, n: report(Progress("previews", k, n)))  # fmt: skip
    attention = draw_attention_sheet(state.snapshots, instance, tokens)
    return _Report(preview, attention, {
        "peak_of": peak.of,
        "attention_inside_mask": {t: round(s, 4) for t, s in zip(tokens, shares, strict=True)},
        "losses": state.loss_history,
        "skipped_steps": state.skipped_steps,
        "memory": to_dict(base.memory),
        "photo_digest": photo_digest(instance),
        **({"kept": state.kept} if state.kept else {}),
        **environment(),
        "seconds": round(state.seconds, 1),  # the images included
        "peak_gib": round(peak.gib, 3),
    })  # fmt: skip


@contextmanager
def lend_adapters(base: BaseModel, phase: LoraPhase, seed: int) -> Iterator[dict[str, PeftModel]]:
    """LoRA in the base model's modules for as long as the block lasts; none when phase 2 is switched off."""
    adapters = add_adapters(base, phase.rank, phase.text_encoder, seed) if phase.train_steps else {}
    try:
        yield adapters
    finally:
        for adapter in adapters.values():
            remove_adapter(adapter)


@contextmanager
def lend_again(base: BaseModel, bundle: Bundle, embedding: AssetEmbedding) -> Iterator[dict[str, PeftModel]]:
    """A bundle's LoRA in the base model's modules, frozen until `Trainer.train_lora`, for as long as the block lasts."""
    adapters: dict[str, PeftModel] = {}
    try:
        for name in bundle.adapters:
            adapters[name] = filled_adapter(base.parts[base.layout.adapters[name]], bundle.lora[name], bundle.folder / name)
            follow_input_dtype(adapters[name])
        embedding.vectors.requires_grad_(True)  # freezing the base for LoRA froze them with it
        yield adapters
    finally:
        for adapter in adapters.values():
            remove_adapter(adapter)


@contextmanager
def gradient_checkpointing(base: BaseModel, enabled: bool) -> Iterator[None]:
    """Within the block the UNet keeps only its blocks' inputs for the backward pass, and runs each block again there."""
    if enabled:
        base.unet.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if enabled:
            base.unet.disable_gradient_checkpointing()


def _check_longest_prompt(base: BaseModel, tokens: Sequence[str]) -> None:
    try:
        tokenize_prompt(base.tokenizer, join_assets(list(tokens)), tokens)
    except InputError as error:
        length = str(error).split(". ")[0]
        raise InputError(f"{len(tokens)} assets are more than one prompt can hold; use fewer masks. {length}.") from None
