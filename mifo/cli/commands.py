"""The command line: parses, builds a configuration, calls one function, prints.

Results go to standard output (one JSON object with --json), progress and messages to standard error.
Exit status: 0 done, 2 the input is wrong, 1 our fault, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__
from ..errors import InputError
from ..io.console import Bar, leave, running, say, waiting
from ..io.files import check_writable
from ..io.interrupts import heard, listen
from ..io.outputs import PLACE, check_apart, check_file, check_output, numbered_file, numbered_folder
from ..io.terminal import guard_streams, quiet_libraries
from . import edit_commands, measure_commands
from .command_parts import (
    check_sampling,
    choose_attention,
    choose_device,
    choose_dtype,
    end_job,
    family_of,
    import_libraries,
    instance_folders,
    load_base,
    load_base_of,
    measured_by,
    not_to_write_into,
    override,
    own_base,
    plan_within,
    say_weights,
    sheet_facts,
    sheet_line,
)
from .options import (
    AsJson,
    Attention,
    AttentionBackend,
    BundleName,
    Clip,
    Detector,
    Device,
    Dino,
    Judge,
    JudgedBy,
    Keep,
    LoraScale,
    MaskOrientation,
    MasksDrawn,
    ModelPath,
    OutputDir,
    OutputPath,
    Overwrite,
    OwnBase,
    OwnText,
    Precision,
    Recipe,
    Resolution,
    Sampler,
    Scale,
    Seed,
    Steps,
    VramGib,
    number,
    path,
    path_argument,
)

if TYPE_CHECKING:

    from ..boxes import Layout
    from ..bundle.store import Bundle
    from ..config import LearnConfig, SynthesisConfig
    from ..data.instance import Instance
    from ..evaluation.backend import Backend as MeasuredBy
    from ..model.base import BaseModel
    from ..synthesis.resumable import PictureJob
    from ..synthesis.synthesize import Synthesis

app = typer.Typer(
    name="mifo",
    help="Learn the things in one photo, each as its own word, and put each of them where you want in new pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # cuts option names at 80 columns, and reads [x0, y0, x1, y1] as a style
)


@app.command()
def learn(
    instance: Annotated[str | None, path_argument("Folder name under --folder-path; without it, each of them.")] = None,
    folder_path: Annotated[Path, path("Holds the instance folders.")] = Path("example"),
    model_path: ModelPath = "toybox",
    output_dir: OutputDir = Path("Model_ours"),
    name: Annotated[str | None, typer.Option(help="The bundle's name; the folder's name by default.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle learned from another photo, other masks or on another base.")
    ] = False,
    initializer_tokens: Annotated[str | None, typer.Option(help="Words per asset to start from, comma-separated.")] = None,
    recipe: Annotated[Recipe, typer.Option(help="break-a-scene: that paper's losses, for comparison.")] = Recipe.mifo,
    phase1_train_steps: Annotated[int | None, typer.Option(min=1)] = None,
    phase2_train_steps: Annotated[int | None, typer.Option(min=0, help="0 leaves LoRA out.")] = None,
    phase1_learning_rate: Annotated[float | None, number(0)] = None,
    phase2_learning_rate: Annotated[float | None, number(0)] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    train_text_encoder: Annotated[bool | None, typer.Option(help="LoRA in the text encoder too.")] = None,
    penalty_weight: Annotated[float | None, number(0, help="Weight of the penalty attention loss.")] = None,
    class_prompt: Annotated[str | None, typer.Option(help="For prior preservation; several, separated by '|'.")] = None,
    num_class_images: Annotated[int | None, typer.Option(min=1, max=10_000)] = None,
    prior_preservation: Annotated[bool, typer.Option(help="Keep the base model's knowledge with its own pictures.")] = True,
    mask_orientation: MaskOrientation = MasksDrawn.auto,
    background_asset: Annotated[bool, typer.Option("--background-asset", help="Learn <background>, outside all masks.")] = False,
    resolution: Resolution = None,
    gradient_checkpointing: bool = False,
    resume: Annotated[bool | None, typer.Option(help="Go on from the last checkpoint of an interrupted run.")] = None,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints, at most 2 minutes; 0: none.")] = 50,
    keep: Annotated[Keep, typer.Option(help="best: the checkpoint with the least leakage and the best samples.")] = Keep.last,
    backend: JudgedBy = Judge.auto,
    dino: Dino = None,
    clip: Clip = None,
    detector: Detector = None,
    mixed_precision: Precision = Precision.auto,
    vram_gib: VramGib = None,
    attention_backend: AttentionBackend = Attention.auto,
    keep_base_path: Annotated[bool, typer.Option("--keep-base-path", help="Write into the bundle where the base lies.")] = False,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Learn the things in INSTANCE (img.jpg and mask0.png, mask1.png, ...), each as its own token."""
    given = dict(locals())
    with running(as_json) as job:
        from ..data.instance import load_instance, with_background
        from ..prompts import check_class_prompt

        if class_prompt is not None and prior_preservation:
            say_weights(check_class_prompt(class_prompt), "class prompt")
        folders = instance_folders(instance, folder_path)
        if name and len(folders) > 1:
            raise InputError(f"--name {name} fits one instance, but {len(folders)} would be learned; name the INSTANCE too")
        # all input is checked before anything long starts
        with waiting("reading the photo"):
            instances = [load_instance(folder, mask_orientation.value) for folder in folders]
        words = [_initializers(initializer_tokens, each.count) for each in instances]
        if background_asset:
            words = [[*(initial or [None] * each.count), "background"] for initial, each in zip(words, instances, strict=True)]
            instances = [with_background(each) for each in instances]
        targets = [output_dir / _bundle_name(name or each.name) for each in instances]
        for target in targets:
            _check_target(target, folders, model_path)

        import_libraries()
        from ..attention.backend import use_backend
        from ..bundle.target import check_target
        from ..config import MemoryConfig, learn_preset
        from ..data.mask_check import check_masks
        from ..learning.checkpoints import Checkpointing
        from ..learning.learn import learn as run_learn
        from ..learning.supervision import sizes_of
        from ..model.device import precision_name

        checkpointing = Checkpointing(checkpoint_every, resume=resume)
        for each, target in zip(instances, targets, strict=True):
            check_target(target, each, None, overwrite)
        chosen = choose_device(device)
        dtype = choose_dtype(mixed_precision, chosen)
        attention = choose_attention(attention_backend, chosen, dtype)
        results = []
        for each, target, initial in zip(instances, targets, words, strict=True):
            config = _learn_overrides(learn_preset(family_of(model_path), recipe.value), given, precision_name(dtype))
            plan = plan_within("learn", model_path, chosen, dtype, resolution, vram_gib, attention.name, config,
                               assets=each.count)  # fmt: skip
            base = load_base(model_path, chosen, dtype, plan.settings.memory if plan else MemoryConfig())
            config = plan.settings.learn if plan else config
            if config.resolution is not None:
                base.check_side("the resolution", config.resolution)
            with waiting("looking at the masks"):
                report = check_masks(each, sizes_of(base, config))
            for line in (*report.notes, *report.warnings):
                say(f"note: {line}")
            judge = _checkpoint_judge(config, each, base, given)
            job.hint = partial(_resume_hint, target)
            if note := check_target(target, each, base.fingerprint, overwrite):
                say(f"note: {note}")
            _say_what_is_resumed(target, resume)
            with use_backend(base.unet, attention), Bar() as bar, job.keeping(target if os.path.lexists(target) else None):
                bundle = run_learn(each, base, config, target, bar.learning, initial, checkpointing, judge,
                                   overwrite, keep_base_path)  # fmt: skip
            job.kept.append(target)
            if not bundle.base_source:
                say(f"note: the bundle has the base model's name, {bundle.base_name}, and fingerprint, but not where it lies: "
                    "give the commands that draw --model-path, or learn with --keep-base-path")  # fmt: skip
            results.append(_learn_summary(bundle))
            job.text(*_learned_text(results[-1]))
        job.json(results[0] if instance is not None else {"bundles": results})


@app.command()
def synthesize(
    model_id: BundleName,
    prompt: Annotated[str, typer.Option(help='Such as "a photo of <asset0> and <asset1> at the beach".')],
    boxes: Annotated[str | None, path("JSON file or text: one [x0, y0, x1, y1] per asset, 0 to 1.")] = None,
    model_path: OwnBase = None,
    output_dir: OutputDir = Path("Model_ours"),
    output_path: OutputPath = None,
    overwrite: Overwrite = False,
    batch_size: Annotated[int, typer.Option(min=1, max=64)] = 1,
    steps: Steps = None,
    guidance_scale: Scale = None,
    negative_prompt: str = "",
    scheduler: Annotated[Sampler | None, typer.Option(help="own: the one that the base model's folder names.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; the model's own by default.")] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    lora_scale: LoraScale = None,
    guidance: Annotated[bool, typer.Option(help="Move the latents until the assets lie in their boxes.")] = True,
    refine: Annotated[bool, typer.Option(help="Tighten the boxes to the things' own shapes.")] = True,
    bounded: Annotated[bool, typer.Option(help="Mask attention to the boxes.")] = True,
    own_text: OwnText = True,
    best_of: Annotated[int | None, typer.Option(min=2, max=1000, help="Draw so many seeds, keep the best.")] = None,
    backend: JudgedBy = Judge.auto,
    dino: Dino = None,
    clip: Clip = None,
    detector: Detector = None,
    subject_token_indices: Annotated[str | None, typer.Option(help="Accepted for compatibility; never needed.")] = None,
    mixed_precision: Precision = Precision.auto,
    vram_gib: VramGib = None,
    attention_backend: AttentionBackend = Attention.auto,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Draw the learned assets, each in its box."""
    given = dict(locals())
    with running(as_json) as job:
        from ..boxes import parse_layout
        from ..prompts import NEGATIVE, assets_in, check_prompt

        check_writable(output_path or PLACE)
        if best_of and batch_size > 1:
            raise InputError(f"--best-of {best_of} keeps one picture, but --batch-size is {batch_size}; leave one of them out")
        if subject_token_indices:
            say("note: --subject-token-indices is not needed; the assets' positions are found in the prompt")

        import_libraries()
        from ..attention.backend import use_backend
        from ..bundle.store import attach, find_bundle, load_bundle
        from ..config import synthesis_preset, to_dict
        from ..synthesis.resumable import open_job
        from ..synthesis.synthesize import KIND, save_synthesis
        from ..synthesis.synthesize import synthesize as run_synthesize

        bundle = load_bundle(find_bundle(model_id, output_dir))
        place = PLACE / bundle.name
        check_apart(output_path, place, {"--boxes": boxes}, not_to_write_into(bundle, model_path))
        check_output(output_path, place, KIND, overwrite)
        check_prompt(prompt, bundle.tokens)
        check_prompt(negative_prompt, bundle.tokens, NEGATIVE)
        say_weights([prompt])
        say_weights([negative_prompt], NEGATIVE)
        layout = parse_layout(boxes, assets_in(prompt)) if boxes is not None else None
        chosen = choose_device(device)
        dtype, wanted = choose_dtype(mixed_precision, chosen), model_path or own_base(bundle)
        attention = choose_attention(attention_backend, chosen, dtype)
        config = _synthesis_overrides(synthesis_preset(family_of(wanted)), given)
        check_sampling(wanted, config.scheduler, config.steps)
        plan = plan_within("synthesize", wanted, chosen, dtype, max(width or 0, height or 0) or None, vram_gib, attention.name,
                     bundle.config, config, len(bundle.tokens), batch_size)  # fmt: skip
        base = load_base_of(bundle, model_path, chosen, dtype, plan.settings.memory if plan else None)
        judge = measured_by(bundle, base, None, given) if best_of else None
        facts: dict[str, Any] = {"bundle": bundle.name, **base.record()}
        recipe = [prompt, layout.to_json() if layout else None, to_dict(config), seed, best_of, attention.name]
        opened = open_job(output_path, place, "best-of", recipe, base, bundle) if best_of else nullcontext()
        with use_backend(base.unet, attention), attach(base, bundle, config.lora_scale), opened as kept:
            if best_of and judge and kept:
                job.hint = kept.hint
                result, more = _draw_best(base, prompt, layout, bundle.tokens, config, seed, best_of, judge, kept)
                facts.update(more)
            else:
                with Bar() as bar:
                    result = run_synthesize(base, prompt, layout, bundle.tokens, config, seed, batch_size, bar.denoising)
            with numbered_folder(output_path, place) as output, waiting("writing the pictures"):
                paths = save_synthesis(result, output, facts, overwrite)
            if kept:
                kept.clear()
        seconds, peak = round(result.seconds, 2), round(result.peak_gib, 3)
        pictures = f"{len(paths)} picture{'s' if len(paths) > 1 else ''}"
        if best_of:
            best = facts["best_of"][0]
            worst = facts["best_of"][-1]["score"]
            job.text(f"the best of {len(facts['best_of'])} is seed {best['seed']}, score {best['score']} (the worst has {worst})")
        job.text(f"{pictures} in {output} ({seconds} s, peak {peak} GiB)", sheet_line(output))
        job.json({"images": [str(p) for p in paths], **sheet_facts(output), "json": str(output / "synthesis.json"),
                  "seconds": seconds, "peak_gib": peak,
                  **{name: facts[name] for name in ("best_of", "failed") if name in facts}})  # fmt: skip
        if kept:
            end_job(kept)


@app.command()
def boxes(
    boxes: Annotated[str, path_argument("JSON file or text, as for synthesize.")],
    prompt: Annotated[str | None, typer.Option(help="Names the assets; without it they are numbered in order.")] = None,
    image: Annotated[Path | None, path("Draw over this picture instead of a blank one.")] = None,
    size: Annotated[int, typer.Option(min=64, max=4096, help="Pixels of the blank canvas.")] = 512,
    output_path: Annotated[Path | None, path("PNG to write; output/boxes-0001.png and so on by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw boxes over a blank canvas or a picture, before anything runs."""
    with running(as_json) as job:
        from PIL import Image

        from ..boxes import parse_boxes_alone, parse_layout
        from ..io.files import write_file
        from ..io.image_file import load_image
        from ..io.sheets import draw_boxes
        from ..prompts import assets_in, check_characters

        check_characters(prompt or "", "The prompt")
        check_file(output_path, "output/boxes.png", overwrite)
        check_apart(output_path, PLACE, {"BOXES": boxes, "--image": image}, {})
        layout = parse_layout(boxes, assets_in(prompt)) if prompt else parse_boxes_alone(boxes)
        canvas = load_image(image) if image else Image.new("RGB", (size, size), (240, 240, 240))
        drawn = draw_boxes(canvas, layout)
        with (numbered_file(output_path, PLACE, "boxes", ".png", overwrite) as (target, replaced),
              write_file(target, replaced) as temporary):  # fmt: skip
            drawn.save(temporary, "PNG")
        job.text(str(target))
        job.json({"image": str(target), "boxes": layout.to_json()})


@app.command()
def export(
    model_id: BundleName,
    output_path: Annotated[Path, path("Folder to write.")],
    output_dir: OutputDir = Path("Model_ours"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a bundle so that diffusers' load_lora_weights and load_textual_inversion read it."""
    with running(as_json) as job:
        check_output(output_path, output_path, "export", overwrite)

        import_libraries()
        from ..bundle.export import export_for_diffusers
        from ..bundle.store import find_bundle, load_bundle

        bundle = load_bundle(find_bundle(model_id, output_dir))
        check_apart(output_path, output_path, {}, not_to_write_into(bundle, None))
        with waiting("writing the files"):
            export_for_diffusers(bundle, output_path, overwrite)
        files = sorted(p.name for p in output_path.iterdir() if p.name != "manifest.json")
        job.text(f"{output_path}: {', '.join(files)}")
        job.json({"folder": str(output_path), "files": files})


@app.command()
def demo(
    output_path: Annotated[Path | None, path("Folder to write; by default the next number in output/demo/.")] = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Learn three look-alike cars from one picture, then put each in its box on two new backgrounds."""
    with running(as_json) as job:
        place = PLACE / "demo"
        check_output(output_path, place, "demo", overwrite)

        import_libraries()
        from ..demo import draw_demo, save_demo

        with Bar() as bar:
            drawn = draw_demo(output_path.parent if output_path else place, seed, choose_device(device), bar)
        with numbered_folder(output_path, place) as output:
            result = save_demo(drawn, output, overwrite)
        job.text(
            f"The three cars were learned in {result['learn_seconds']} s; each picture took {result['synthesize_seconds']} s.",
            f"Look at {result['picture']}",
        )
        job.json(result)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


# --- parts --------------------------------------------------------------------------------------


def _checkpoint_judge(config: LearnConfig, instance: Instance, base: BaseModel, given: dict[str, Any]) -> Any:
    if not config.keep.enabled:
        return None
    from ..data.instance import without_background
    from ..evaluation.checkpoints import checkpoint_judge
    from ..evaluation.choose import make_backend

    models = [given[name] for name in ("dino", "clip", "detector")]
    with waiting("loading the models that measure"):
        backend = make_backend(given["backend"].value, base.family, without_background(instance), str(base.device), *models)
    return checkpoint_judge(backend, config.keep.samples)


def _draw_best(base: BaseModel, prompt: str, layout: Layout | None, tokens: Sequence[str], config: SynthesisConfig, seed: int,
               count: int, judge: MeasuredBy, kept: PictureJob) -> tuple[Synthesis, dict[str, Any]]:  # fmt: skip
    """The best of `count` seeds, and what its record says of the others. Ends the command where none could be drawn."""
    from ..evaluation.best_of import draw_best

    with Bar() as bar:
        best = draw_best(base, prompt, layout, tokens, config, seed, count, judge, bar.drawing, kept.pictures)
    if best is None:
        end_job(kept)
        raise typer.Exit(1)
    result, ranking = best
    return result, {"best_of": ranking, **({"failed": kept.failed()} if kept.failures else {})}


def _bundle_name(name: str) -> str:
    if not name or name.startswith(".") or any(c in "/\\" or not c.isprintable() for c in name) or len(name.encode()) > 100:
        raise InputError(f"{name[:100]!r} cannot name a bundle; give a --name of letters, digits, '-' and '_'")
    return name


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


def _learn_overrides(config: LearnConfig, given: dict[str, Any], precision: Any) -> LearnConfig:
    """The preset with the options that were given on the command line."""
    embedding = override(config.embedding, train_steps=given["phase1_train_steps"], learning_rate=given["phase1_learning_rate"])
    lora = override(config.lora, train_steps=given["phase2_train_steps"], learning_rate=given["phase2_learning_rate"],
                     rank=given["lora_rank"], text_encoder=given["train_text_encoder"])  # fmt: skip
    weight = given["penalty_weight"]
    if weight is not None:
        embedding = replace(embedding, attention=replace(embedding.attention, penalty_weight=weight))
        lora = replace(lora, attention=replace(lora.attention, penalty_weight=weight))
    prior = override(config.prior, class_prompt=given["class_prompt"], num_class_images=given["num_class_images"])
    prior = replace(prior, enabled=given["prior_preservation"])
    config = replace(config, keep=replace(config.keep, enabled=given["keep"] is Keep.best))
    return replace(config, embedding=embedding, lora=lora, prior=prior, resolution=given["resolution"], seed=given["seed"],
                   gradient_checkpointing=given["gradient_checkpointing"], mixed_precision=precision)  # fmt: skip


def _synthesis_overrides(config: SynthesisConfig, given: dict[str, Any]) -> SynthesisConfig:
    names = ("steps", "guidance_scale", "negative_prompt", "scheduler", "width", "height", "lora_scale", "bounded", "own_text")
    config = override(config, **{n: given[n] for n in names})
    return replace(config, guidance=replace(config.guidance, enabled=given["guidance"]),
                   refinement=replace(config.refinement, enabled=given["refine"]))  # fmt: skip


def _learn_summary(bundle: Bundle) -> dict[str, Any]:
    facts = bundle.facts
    size = sum(p.stat().st_size for p in bundle.folder.rglob("*") if p.is_file())
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


for command in (edit_commands.edit, edit_commands.decompose, edit_commands.variations,
                measure_commands.evaluate, measure_commands.check, measure_commands.plan):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Runs the command line of this process."""
    status = 1  # of an error that nobody expected; Python has said which
    atexit.register(lambda: leave(status))  # the first to be registered is the last to run
    quiet_libraries()
    guard_streams()
    listen()
    try:
        app()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if heard.first is not None and status == 1:  # outside of a job click takes every interruption for Ctrl-C
            status = 128 + heard.first
        raise
