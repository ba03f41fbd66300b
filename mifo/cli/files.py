"""The commands about files: boxes, export, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..io.console import Bar, Job, say, waiting
from ..io.files import check_writable
from ..io.outputs import PLACE, check_apart, check_file, check_output, numbered_file, numbered_folder
from .app import app
from .job import job_command
from .options import (
    BundleName,
    Device,
    ExportFormat,
    KeepBasePath,
    ModelPath,
    OutputDir,
    Overwrite,
    OverwriteFile,
    Precision,
    Seed,
    path,
    path_argument,
)
from .parts import bundle_name, choose_device, choose_dtype, import_libraries, load_base, load_base_of, not_to_write_into


@job_command(app, 'mifo boxes "[[0.05, 0.3, 0.45, 0.7], [0.55, 0.3, 0.95, 0.7]]"')
def boxes(
    job: Job,
    boxes: Annotated[str, path_argument("JSON file or text, as for synthesize.")],
    prompt: Annotated[str | None, typer.Option(help="Names the assets; without it they are numbered in order.")] = None,
    image: Annotated[Path | None, path("Draw over this picture instead of a blank one.")] = None,
    size: Annotated[int, typer.Option(min=64, max=4096, help="Pixels of the blank canvas.")] = 512,
    output_path: Annotated[Path | None, path("PNG to write; output/boxes-0001.png and so on by default.")] = None,
    overwrite: OverwriteFile = False,
) -> None:
    """Draw boxes over a blank canvas or a picture, before anything runs."""
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


@job_command(app, "mifo export toy_car --output-path toy_car_for_diffusers")
def export(
    job: Job,
    model_id: BundleName,
    output_path: Annotated[Path, path("Folder to write.")],
    output_dir: OutputDir = Path("Model_ours"),
    layout: Annotated[
        ExportFormat,
        typer.Option("--format", help="diffusers: for load_lora_weights and load_textual_inversion; kohya: for AUTOMATIC1111 and "
                     "others; comfyui: the same in ComfyUI's folders; pipeline: a whole model for from_pretrained."),
    ] = ExportFormat.diffusers,
    model_path: Annotated[str | None, path("For a pipeline: the base model; the bundle's own by default.")] = None,
    mixed_precision: Annotated[Precision, typer.Option(help="Of a pipeline's weights; fp16 is half of fp32.")] = Precision.auto,
    overwrite: Overwrite = False,
) -> None:
    """Write a bundle so that other programs read it: the LoRA in one file and a file for each asset's embedding, or a whole
    model that has them."""
    check_output(output_path, output_path, "export", overwrite)

    import_libraries()
    from ..bundle.export import export_for_comfyui, export_for_diffusers, export_for_kohya, export_pipeline
    from ..bundle.store import find_bundle, load_bundle

    whole = layout is ExportFormat.pipeline
    if model_path and not whole:
        raise InputError(f"--model-path is for --format pipeline alone; {layout.value} needs no base model, leave it out")
    bundle = load_bundle(find_bundle(model_id, output_dir))
    check_apart(output_path, output_path, {}, not_to_write_into(bundle, model_path))
    if whole:
        base = load_base_of(bundle, model_path, "cpu", choose_dtype(mixed_precision, "cpu"))
    with waiting("writing the files"):
        if whole:
            export_pipeline(bundle, base, output_path, overwrite)
        else:
            write = {ExportFormat.kohya: export_for_kohya, ExportFormat.comfyui: export_for_comfyui}
            write.get(layout, export_for_diffusers)(bundle, output_path, overwrite)
    found = (p.relative_to(output_path) for p in output_path.rglob("*") if p.is_file() and p.name != "manifest.json")
    files = sorted(p.as_posix() for p in found)
    job.text(f"{output_path}: {', '.join(files)}")
    job.json({"folder": str(output_path), "files": files})


@job_command(app, 'mifo import my_car_lora.safetensors --model-path sd1.5 --words "red toy car" --name my_car', name="import")
def import_files(
    job: Job,
    files: Annotated[list[Path], path_argument("A LoRA of diffusers or kohya, textual inversions, or both: .safetensors.")],
    model_path: ModelPath,
    name: Annotated[str | None, typer.Option(help="Of the bundle; by default the first file's.")] = None,
    words: Annotated[str | None, typer.Option(help='What they were trained with, an entry per asset: "a car,a bus".')] = None,
    output_dir: OutputDir = Path("Model_ours"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle of that name.")] = False,
    keep_base_path: KeepBasePath = False,
) -> None:
    """Make a bundle of files that other programs trained, for prompts with <asset0> and for boxes."""
    from ..prompts import check_characters

    check_characters(words or "", "--words")
    target = output_dir / bundle_name(name or files[0].stem)
    check_writable(output_dir)
    read: dict[str, str | Path | None] = {f"FILES[{k}]": file for k, file in enumerate(files)}
    check_apart(target, target, read, not_to_write_into(None, model_path), "the bundle's folder")

    import_libraries()
    from ..bundle.import_ import import_files as run_import
    from ..config import MemoryConfig

    base = load_base(model_path, "cpu", choose_dtype(Precision.auto, "cpu"), MemoryConfig())
    given = [word.strip() for word in words.split(",")] if words else []
    with waiting("reading the files"):
        bundle, notes = run_import(files, base, target, given, overwrite, keep_base_path)
    for note in notes:
        say(f"note: {note}")
    job.text(f"bundle: {bundle.folder}, {', '.join(bundle.tokens)}, {', '.join(bundle.adapters) or 'no LoRA'}")
    job.json({"bundle": str(bundle.folder), "tokens": list(bundle.tokens), "adapters": list(bundle.adapters), "notes": notes})


@job_command(app, "mifo demo")
def demo(
    job: Job,
    output_path: Annotated[Path | None, path("Folder to write; by default the next number in output/demo/.")] = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = "",
) -> None:
    """Learn three look-alike cars from one picture, then put each in its box on two new backgrounds."""
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
