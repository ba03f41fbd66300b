"""The commands that look instead of drawing: evaluate what was learned, check an instance, plan a job's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from ..errors import InputError
from ..io.console import Bar, Job, say, waiting
from ..io.files import check_writable, write_file
from ..io.outputs import PLACE, check_apart, check_file, check_output, numbered_file, numbered_folder
from .app import app
from .job import job_command
from .options import (
    Attention,
    BundleName,
    DeviceOptions,
    EditToMeasure,
    EvaluateInput,
    EvaluatorOptions,
    FolderPath,
    MaskOrientation,
    MasksDrawn,
    ModelPath,
    OutputOptions,
    OverwriteFile,
    PlannedJob,
    PlannedMemory,
    PlannedWork,
    Resolution,
    instance_names,
    path,
    path_argument,
)
from .parts import (
    check_sampling,
    choose_device,
    choose_dtype,
    end_job,
    family_of,
    import_libraries,
    instance_folders,
    instance_of,
    load_base_of,
    measured_by,
    not_to_write_into,
    own_base,
    say_weights,
    sheet_facts,
)


@job_command(app, "mifo evaluate toy_car --samples 8")
def evaluate(
    job: Job,
    model_id: BundleName,
    source: EvaluateInput,
    edit: EditToMeasure,
    evaluators: EvaluatorOptions,
    output: OutputOptions,
    compute: DeviceOptions,
) -> None:
    """Measure a bundle: identity, leakage, layout, prompt fit and drift, with intervals. The same seed, the same JSON."""
    import_libraries()
    from ..api import NothingDrawnError
    from ..api import evaluate as run_evaluate
    from ..bundle.store import find_bundle, load_bundle
    from ..evaluation.cases import mask_aspects, read_cases, read_images
    from ..evaluation.report import KIND
    from ..evaluation.run import measure_edit
    from ..synthesis.resumable import open_job

    check_writable(output.output_path or PLACE)
    preservation = measure_edit(edit.original, edit.edited, edit.edit_mask, source.mask_orientation.value)
    bundle = load_bundle(find_bundle(model_id, source.output_dir))
    place = PLACE / bundle.name
    read = {"--prompts": source.prompts, "--boxes": source.boxes, "--images": source.images, "--original": edit.original,
            "--edited": edit.edited, "--edit-mask": edit.edit_mask, "--dino": evaluators.dino,
            "--clip": evaluators.clip, "--detector": evaluators.detector}  # fmt: skip
    closed = {**not_to_write_into(bundle, source.model_path), "--instance": source.instance}
    check_apart(output.output_path, place, read, closed)
    check_output(output.output_path, place, KIND, output.overwrite)
    learned_from = instance_of(bundle, source.instance, source.mask_orientation.value)
    cases = read_cases(source.prompts, source.boxes, learned_from.tokens, mask_aspects(learned_from))
    say_weights([case.prompt for case in cases])
    images = read_images(source.images, source.prompts, source.boxes, bundle.tokens) if source.images else None
    chosen = choose_device(compute.device)
    from ..config import to_dict, with_steps
    from ..presets import synthesis_preset

    wanted = source.model_path or own_base(bundle)
    config = with_steps(synthesis_preset(family_of(wanted)), source.steps)
    check_sampling(wanted, config)
    base = load_base_of(bundle, source.model_path, chosen, choose_dtype(compute.mixed_precision, chosen))
    judge = measured_by(bundle, base, source.instance, evaluators, source.mask_orientation.value)
    recipe = [to_dict(config), [case.to_json() for case in cases], compute.seed, source.samples]
    with open_job(output.output_path, place, "evaluate", recipe, base, bundle) as drawing:
        job.hint = drawing.hint
        try:
            with Bar() as bar:
                result = run_evaluate(base, bundle, instance=learned_from, prompts=cases, images=images, config=config,
                                      samples=source.samples, seed=compute.seed, backend=judge, on_progress=bar.drawing,
                                      keep=drawing.images)  # fmt: skip
        except NothingDrawnError:
            end_job(drawing)
            raise
        if preservation:
            result.record["edit_preservation"] = preservation
        if drawing.failures:
            result.record["failed"] = drawing.failed()
        with numbered_folder(output.output_path, place) as folder, waiting("writing the pictures"):
            paths = result.save(folder, output.overwrite)
        drawing.clear()
    if "plots" not in paths:
        say("note: there are no charts, because matplotlib is not installed; pip install 'mifo[plots]' adds it")
    job.text(*str(result).split("\n"), *(f"{kind.replace('_', ' ')}: {path}" for kind, path in paths.items()))
    shown = {k: v for k, v in result.record.items() if k not in ("pictures", "definitions", "synthesis")}
    job.json({**paths, **sheet_facts(Path(paths["json"]).parent), **shown})
    end_job(drawing)


@job_command(app, "mifo check toy_car")
def check(
    job: Job,
    instance: Annotated[str, path_argument("Folder name under --folder-path, or a folder.", autocompletion=instance_names)],
    folder_path: FolderPath = Path("example"),
    model_path: ModelPath = "toybox",
    resolution: Resolution = None,
    mask_orientation: MaskOrientation = MasksDrawn.auto,
    output_path: Annotated[
        Path | None, path("PNG to write: what the model will really see; output/check-0001.png and so on by default.")
    ] = None,
    overwrite: OverwriteFile = False,
) -> None:
    """Look for what is wrong with an instance's masks before learning it; no model is loaded."""
    from ..data.instance import load_instance
    from ..data.mask_check import check_lines, check_masks, check_sheet
    from ..learning.supervision import sizes_by_name

    (folder,) = instance_folders(instance, folder_path)
    check_file(output_path, "output/check.png", overwrite)
    check_apart(output_path, PLACE, {}, {"the instance": folder, **not_to_write_into(None, model_path)})
    with waiting("looking at the masks"):
        report = check_masks(load_instance(folder, mask_orientation.value), sizes_by_name(model_path, resolution))
        sheet = check_sheet(report)
    with (numbered_file(output_path, PLACE, "check", ".png", overwrite) as (target, replaced),
          write_file(target, replaced) as temporary):  # fmt: skip
        sheet.save(temporary, "PNG")
    job.text(*check_lines(report, report.warnings), f"look at {target}")
    job.json({**report.facts, "sheet": str(target)})


@job_command(app, "mifo plan --model-path sd2.1 --job learn --vram-gib 12")
def plan(job: Job, work: PlannedWork, memory: PlannedMemory, model_path: ModelPath = "sd2.1") -> None:
    """Count a job's GPU memory before it runs, without loading any weights, and what to give up to fit a budget."""
    import_libraries()
    from ..api import plan as make_plan
    from ..planning.planner import read_model
    from ..planning.report import plan_facts, plan_text
    from ..presets import edit_preset, learn_preset

    model = read_model(model_path)
    if work.job is PlannedJob.edit and work.resolution not in (None, model.native_resolution):
        raise InputError(
            f"--resolution is {work.resolution}, but edit draws at the model's own {model.native_resolution} pixels, whatever "
            "the picture's size; leave it out"
        )
    config = learn_preset(model.family)
    config = replace(config, lora=replace(config.lora, rank=work.lora_rank),
                     gradient_checkpointing=work.gradient_checkpointing,
                     prior=replace(config.prior, enabled=work.prior_preservation))  # fmt: skip
    backend = "materialized" if memory.attention_backend is Attention.materialized else "sdpa"
    precision = memory.mixed_precision.value
    with waiting("counting the memory"):
        found = make_plan(model_path, work.job.value, memory.vram_gib, resolution=work.resolution, assets=work.assets,
                          num_images=work.batch_size, precision="bf16" if precision == "auto" else precision, config=config,
                          attention_backend=backend,
                          edit=replace(edit_preset(model.family), background=work.background.value))  # fmt: skip
    job.text(*plan_text(found).split("\n"))
    job.json(plan_facts(found))
    found.check()
