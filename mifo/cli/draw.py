"""The commands that draw new pictures of what was learned: synthesize, decompose, variations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..io.console import Bar, Job, say, waiting
from ..io.files import check_writable
from ..io.outputs import PLACE, check_apart, check_output, numbered_folder
from .app import app
from .batch import draw_batch
from .job import job_command
from .options import (
    Boxes,
    BundleName,
    BundleNames,
    BundleOptions,
    DeviceOptions,
    DrawingOptions,
    EvaluatorOptions,
    LayoutOptions,
    LoraPlace,
    OutputOptions,
    SamplingOptions,
    SeveralOptions,
    SynthesisOptions,
    path,
)
from .parts import (
    bundles_together,
    check_sampling,
    choose_attention,
    choose_device,
    choose_dtype,
    count_images,
    end_job,
    family_of,
    import_libraries,
    layout_together,
    load_base_of,
    measured_by,
    not_to_write_into,
    note_compiled,
    override,
    own_base,
    plan_within,
    say_weights,
    sheet_facts,
    sheet_line,
)

if TYPE_CHECKING:
    from ..boxes import Layout
    from ..bundle.store import Bundle
    from ..config import SynthesisConfig
    from ..evaluation.backend import Backend as MeasuredBy
    from ..model.base import BaseModel
    from ..synthesis.recipe import Recipe
    from ..synthesis.resumable import ImageJob
    from ..synthesis.synthesize import Synthesis
    from ..synthesis.variations import Shot


@job_command(app, 'mifo synthesize toy_car --prompt "a photo of <asset0> and <asset1> in the snow" \\\n'
                  '    --boxes "[[0.05, 0.3, 0.45, 0.7], [0.55, 0.3, 0.95, 0.7]]"')  # fmt: skip
def synthesize(
    job: Job,
    source: BundleOptions,
    layout_options: LayoutOptions,
    sampling: SynthesisOptions,
    evaluators: EvaluatorOptions,
    output: OutputOptions,
    compute: DrawingOptions,
    together: SeveralOptions,
    model_id: BundleNames = None,
    prompt: Annotated[str | None, typer.Option(help='Such as "a photo of <asset0> and <asset1> at the beach".')] = None,
    boxes: Boxes = None,
    again: Annotated[Path | None, path("Draw this picture again, from what it says of its making: the same bytes.")] = None,
    batch_file: Annotated[
        Path | None, path("Many jobs in one process: a JSON object a line, with bundles, prompt, boxes, seed, output, ...")
    ] = None,
) -> None:
    """Draw the learned assets, each in its box."""
    if batch_file is not None:
        machine = DrawingOptions(device=compute.device, mixed_precision=compute.mixed_precision)
        alone = (sampling, layout_options, together, evaluators, compute, source.model_path, output.overwrite) == (
            SynthesisOptions(), LayoutOptions(), SeveralOptions(), EvaluatorOptions(), machine, None, False)  # fmt: skip
        if model_id or prompt is not None or boxes is not None or again is not None or not alone:
            raise InputError("--batch-file has each job's bundles, prompt, boxes, seed and settings in its lines; leave other "
                             "options out, but for --output-path, --output-dir, --device, --mixed-precision and --json")
        draw_batch(job, batch_file, output.output_path, source.output_dir, compute.device, compute.mixed_precision.value)
        return
    from ..prompts import NEGATIVE, check_prompt

    recipe = _recipe(again, prompt, boxes, (sampling, layout_options, together, compute.seed))
    asked = _asked_again(recipe, model_id) if recipe else _asked(model_id, prompt, boxes, compute.seed, sampling, layout_options,
                                                                 together)  # fmt: skip
    prompt, seed, best_of = asked.prompt, asked.seed, sampling.best_of
    check_writable(output.output_path or PLACE)
    if sampling.subject_token_indices:
        say("note: --subject-token-indices is not needed; the assets' positions are found in the prompt")

    import_libraries()
    from ..api import synthesis_result
    from ..api import synthesize as run_synthesize
    from ..attention.backend import use_backend
    from ..attention.compiled import compile_blocks
    from ..bundle.store import attach, find_bundle, load_bundle
    from ..config import to_dict
    from ..presets import synthesis_preset
    from ..sampling.contrast import check_contrast
    from ..synthesis.resumable import open_job
    from ..synthesis.synthesize import KIND

    several = bundles_together([load_bundle(find_bundle(name, source.output_dir)) for name in asked.bundles], together.word)
    bundle = several.bundles[0]
    place = PLACE / several.name
    for each in several.bundles:
        check_apart(output.output_path, place, {"--boxes": boxes, "--again": again}, not_to_write_into(each, source.model_path))
    check_output(output.output_path, place, KIND, output.overwrite)
    within = several.within(prompt)
    check_prompt(within, several.tokens)
    check_prompt(asked.negative_prompt, several.tokens, NEGATIVE)
    say_weights([prompt])
    say_weights([asked.negative_prompt], NEGATIVE)
    by_place = several.acts_by_place(asked.lora, asked.boxes is not None, asked.background_lora)
    layout = layout_together(several, asked.boxes, within, by_place)
    chosen = choose_device(compute.device)
    dtype, wanted = choose_dtype(compute.mixed_precision, chosen), source.model_path or own_base(bundle)
    attention = choose_attention(compute.attention_backend, chosen, dtype)
    note_compiled(compute.compile, compute.vram_gib)
    config = recipe.config if recipe else _synthesis_config(synthesis_preset(family_of(wanted)), sampling, layout_options)
    check_sampling(wanted, config)
    if recipe is None:
        check_contrast(config, layout, by_place)
    side = max(config.width or 0, config.height or 0) or None
    plan = plan_within("synthesize", wanted, chosen, dtype, side, compute.vram_gib,
                       attention.name, bundle.config, config, len(several.tokens), sampling.batch_size)  # fmt: skip
    base = load_base_of(bundle, source.model_path, chosen, dtype, plan.settings.memory if plan else None)
    judge = measured_by(bundle, base, None, evaluators) if best_of else None
    if recipe and recipe.base_fingerprint not in ("", base.fingerprint):
        say(f"note: {again} was drawn on another base model, or on its files in another state; this picture will differ")
    said = [prompt, layout.to_json() if layout else None, to_dict(config), seed, best_of, attention.name,
            *(["compiled"] if compute.compile else [])]  # fmt: skip
    opened = open_job(output.output_path, place, "best-of", said, base, bundle) if best_of else nullcontext()
    with use_backend(base.unet, attention), compile_blocks(base.unet, compute.compile), opened as kept:
        if best_of and judge and kept:
            job.hint = kept.hint
            with attach(base, bundle, config.lora_scale):
                drawn, facts = _draw_best(base, prompt, layout, bundle.tokens, config, seed, best_of, judge, kept)
            result = synthesis_result(drawn, base, bundle, **facts)
        else:
            with Bar() as bar:
                result = run_synthesize(base, several, prompt, layout, num_images=sampling.batch_size, seed=seed, config=config,
                                        background_lora=asked.background_lora, on_progress=bar.denoising)  # fmt: skip
            if recipe:
                result = synthesis_result(result.synthesis, base, several, **recipe.facts)
        with numbered_folder(output.output_path, place) as folder, waiting("writing the pictures"):
            paths = result.save(folder, output.overwrite)
        if kept:
            kept.clear()
    seconds, peak = round(result.synthesis.seconds, 2), round(result.synthesis.peak_gib, 3)
    if best_of:
        ranking = result.facts["best_of"]
        best, worst = ranking[0], ranking[-1]["score"]
        job.text(f"the best of {len(ranking)} is seed {best['seed']}, score {best['score']} (the worst has {worst})")
    job.text(f"{count_images(paths)} in {folder} ({seconds} s, peak {peak} GiB)", sheet_line(folder))
    job.json({"images": [str(p) for p in paths], **sheet_facts(folder), "json": str(folder / "synthesis.json"),
              "seconds": seconds, "peak_gib": peak,
              **{name: result.facts[name] for name in ("best_of", "failed") if name in result.facts}})  # fmt: skip
    if kept:
        end_job(kept)


@job_command(app, "mifo decompose toy_car --output-path parts")
def decompose(
    job: Job,
    model_id: BundleName,
    source: BundleOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    compute: DeviceOptions,
) -> None:
    """Draw what a scene consists of: each asset alone, all in their places, and the background if it was learned."""
    check_writable(output.output_path or PLACE)

    from ..synthesis.variations import decomposition

    def shots(bundle: Bundle, base: BaseModel, config: SynthesisConfig) -> list[Shot]:
        if "<background>" not in bundle.tokens:
            say("note: the background was not learned; 'learn --background-asset --overwrite' adds it")
        return decomposition(bundle.tokens, compute.seed, _places(bundle, base, config))

    _run_shots(job, model_id, "decompose", source, sampling, output, compute, {}, shots)


@job_command(app, "mifo variations toy_car --asset 0 --count 12")
def variations(
    job: Job,
    model_id: BundleName,
    source: BundleOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
    compute: DeviceOptions,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures; the prompts take turns.")] = 8,
    asset: Annotated[str | None, typer.Option(help="One asset, such as 0 or <asset0>; the whole scene by default.")] = None,
    prompts_file: Annotated[Path | None, path("One prompt a line; {} is the scene or the asset.")] = None,
    keep_places: Annotated[
        bool, typer.Option("--keep-places/--free-places", help="Several assets keep to where they stood in the photo.")
    ] = True,
) -> None:
    """Draw the whole scene, or one asset, in many places and styles."""
    check_writable(output.output_path or PLACE)

    from ..synthesis.variations import VARIATIONS, choose_asset, read_prompts
    from ..synthesis.variations import variations as list_variations

    def shots(bundle: Bundle, base: BaseModel, config: SynthesisConfig) -> list[Shot]:
        chosen = choose_asset(asset, bundle.tokens)
        templates = read_prompts(prompts_file, bundle.tokens) if prompts_file else VARIATIONS[base.family]
        say_weights(templates)
        return list_variations(chosen, templates, count, compute.seed, _places(bundle, base, config) if keep_places else None)

    _run_shots(job, model_id, "variations", source, sampling, output, compute, {"--prompts-file": prompts_file}, shots)


# --- parts --------------------------------------------------------------------------------------


def _recipe(again: Path | None, prompt: str | None, boxes: str | None, options: tuple[Any, ...]) -> Recipe | None:
    """Of the picture that is to be drawn again; nothing else may say how then."""
    if again is None:
        return None
    from ..synthesis.recipe import read_recipe

    if prompt is not None or boxes is not None or options != (SynthesisOptions(), LayoutOptions(), SeveralOptions(), 0):
        raise InputError("--again takes prompt, boxes, seed and settings from the picture, but some were given too; leave them "
                         "out, or leave out --again")  # fmt: skip
    recipe = read_recipe(again)
    for name in recipe.bundles:
        if set("/\\") & set(name) or name.startswith("."):
            raise InputError(f"{again} names a bundle '{name[:100]}', which is no plain name; give MODEL_ID")
    return recipe


@dataclass(frozen=True)
class _Asked:
    """What is to be drawn, by the command's options or by a picture that is to be drawn again."""

    bundles: Sequence[str]
    prompt: str
    boxes: str | Layout | None
    seed: int
    negative_prompt: str
    lora: str
    """'everywhere' or 'boxes'"""
    background_lora: str | None


def _asked(bundles: Sequence[str] | None, prompt: str | None, boxes: str | None, seed: int, sampling: SynthesisOptions,
           layout: LayoutOptions, together: SeveralOptions) -> _Asked:  # fmt: skip
    """Raises InputError where something is missing, or does not go together."""
    if not bundles or prompt is None:
        missing = "MODEL_ID, a learned bundle" if not bundles else '--prompt, such as "a photo of <asset0>"'
        raise InputError(f"there is no {missing}; give it, or --again with a picture to be drawn again")
    if sampling.best_of and sampling.batch_size > 1:
        given = f"--best-of {sampling.best_of} keeps one picture, but --batch-size is {sampling.batch_size}"
        raise InputError(f"{given}; leave one of them out")
    if sampling.best_of and len(bundles) > 1:
        raise InputError("--best-of ranks by what one bundle has learned; leave it out with several bundles")
    return _Asked(bundles, prompt, boxes, seed, sampling.negative_prompt, (layout.lora_place or LoraPlace.everywhere).value,
                  together.background_lora)  # fmt: skip


def _asked_again(recipe: Recipe, bundles: Sequence[str] | None) -> _Asked:
    """`bundles`: in the place of the picture's own. Raises InputError where it names none."""
    names = bundles or recipe.bundles
    if not names:
        raise InputError("there is no MODEL_ID, a learned bundle; give it")
    return _Asked(names, recipe.prompt, recipe.layout, recipe.seed, recipe.config.negative_prompt, recipe.config.lora,
                  recipe.facts.get("background_lora"))  # fmt: skip


def _synthesis_config(config: SynthesisConfig, sampling: SynthesisOptions, layout: LayoutOptions) -> SynthesisConfig:
    """The preset with the options that were given."""
    from ..config import with_steps

    config = override(with_steps(config, sampling.steps), guidance_scale=sampling.guidance_scale, scheduler=sampling.scheduler,
                      timestep_spacing=sampling.timestep_spacing,
                      negative_prompt=sampling.negative_prompt, width=sampling.width, height=sampling.height,
                      lora_scale=sampling.lora_scale, bounded=layout.bounded, own_text=layout.own_text,
                      contrast_scale=layout.contrast_scale)  # fmt: skip
    config = override(config, lora=layout.lora_place)
    return replace(config, guidance=replace(config.guidance, enabled=layout.guidance),
                   refinement=replace(config.refinement, enabled=layout.refine))  # fmt: skip


def _draw_best(base: BaseModel, prompt: str, layout: Layout | None, tokens: Sequence[str], config: SynthesisConfig, seed: int,
               count: int, judge: MeasuredBy, kept: ImageJob) -> tuple[Synthesis, dict[str, Any]]:  # fmt: skip
    """The best of `count` seeds, and what its record says of the others. Ends the command where none could be drawn."""
    from ..evaluation.best_of import draw_best

    with Bar() as bar:
        best = draw_best(base, prompt, layout, tokens, config, seed, count, judge, bar.drawing, kept.images)
    if best is None:
        end_job(kept)
        raise typer.Exit(1)
    result, ranking = best
    return result, {"best_of": ranking, **({"failed": kept.failed()} if kept.failures else {})}


def _run_shots(job: Job, model_id: str, command: str, source: BundleOptions, sampling: SamplingOptions, output: OutputOptions,
               compute: DeviceOptions, read: dict[str, str | Path | None],
               make_shots: Callable[[Bundle, BaseModel, SynthesisConfig], list[Shot]]) -> None:  # fmt: skip
    """What `decompose` and `variations` share: load, draw a list of prompts, save."""
    import_libraries()
    from ..bundle.store import attach, find_bundle, load_bundle
    from ..config import to_dict, with_steps
    from ..presets import synthesis_preset
    from ..synthesis.resumable import open_job
    from ..synthesis.variations import draw_shots, save_shots

    bundle = load_bundle(find_bundle(model_id, source.output_dir))
    place, explicit = PLACE / bundle.name, output.output_path
    check_apart(explicit, place, read, not_to_write_into(bundle, source.model_path))
    check_output(explicit, place, command, output.overwrite)
    chosen = choose_device(compute.device)
    wanted = source.model_path or own_base(bundle)
    config = override(with_steps(synthesis_preset(family_of(wanted)), sampling.steps), guidance_scale=sampling.guidance_scale)
    check_sampling(wanted, config)
    base = load_base_of(bundle, source.model_path, chosen, choose_dtype(compute.mixed_precision, chosen))
    shots = make_shots(bundle, base, config)
    facts = {"bundle": bundle.name, **base.record(), "steps": config.steps, "guidance_scale": config.guidance_scale}
    recipe = [to_dict(config), [shot.recipe() for shot in shots]]
    with open_job(explicit, place, command, recipe, base, bundle) as drawing:
        job.hint = drawing.hint
        with attach(base, bundle), Bar() as bar:
            drawn = draw_shots(base, shots, bundle.tokens, config, bar.denoising, drawing.images)
        if not drawn:
            end_job(drawing)
        with numbered_folder(explicit, place) as folder, waiting("writing the pictures"):
            failed = {"failed": drawing.failed()} if drawing.failures else {}
            paths = save_shots(drawn, folder, command, {**facts, **failed}, output.overwrite)
        drawing.clear()
    earlier = f", {drawing.reused} of them drawn before the interruption" if drawing.reused else ""
    job.text(f"{count_images(paths)} in {folder}{earlier}", sheet_line(folder))
    job.json({"images": [str(p) for p in paths], "prompts": [s.prompt for s in drawn], "failed": drawing.failures,
              **sheet_facts(folder), "json": str(folder / f"{command}.json")})  # fmt: skip
    end_job(drawing)


def _places(bundle: Bundle, base: BaseModel, config: SynthesisConfig) -> Layout | None:
    """Where the things stood in the photo; None for a bundle that does not hold it."""
    from ..bundle.instance_copy import check_kept, kept_instance
    from ..synthesis.variations import places_in_photo

    places = None
    try:
        places = places_in_photo(kept_instance(bundle.folder, bundle.tokens), base, config)
    except InputError as error:
        say(f"note: assets that share a picture get no boxes: {error}")
    if bundle.instance is not None:
        check_kept(bundle.folder, bundle.instance)
    return places
