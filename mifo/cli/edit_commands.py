"""The commands that use what was learned on pictures: edit, decompose, variations.

Each parses, builds a configuration, calls one function and prints, as those in `cli` do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..io.console import Bar, Job, running, say, waiting
from ..io.files import check_writable
from ..io.outputs import PLACE, check_apart, check_output, numbered_folder
from .command_parts import (
    check_sampling,
    choose_attention,
    choose_device,
    choose_dtype,
    end_job,
    family_of,
    import_libraries,
    load_base,
    load_base_of,
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
    Background,
    BlendingStart,
    BundleName,
    Device,
    LoraScale,
    MaskOrientation,
    MasksDrawn,
    Metadata,
    Optimize,
    OutputDir,
    OutputPath,
    Overwrite,
    OwnBase,
    OwnText,
    Precision,
    Scale,
    Seed,
    Start,
    Steps,
    VramGib,
    path,
    path_argument,
)

if TYPE_CHECKING:
    from ..boxes import Layout
    from ..bundle.store import Bundle
    from ..config import EditConfig, SynthesisConfig
    from ..model.base import BaseModel
    from ..synthesis.variations import Shot


OptionalName = Annotated[
    str | None, path_argument("A bundle's name under --output-dir, or its folder.", metavar="[MODEL_ID]")
]


def edit(
    model: OptionalName = None,
    init_image: Annotated[Path, path("The picture to edit.")] = ...,  # type: ignore[assignment]
    mask: Annotated[Path, path("White where the picture may change.")] = ...,  # type: ignore[assignment]
    prompt: Annotated[str, typer.Option(help='Such as "a photo of <asset2>".')] = ...,  # type: ignore[assignment]
    model_id: Annotated[str | None, path("Instead of MODEL_ID; 'none' edits with the plain base model.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="Candidates; all are kept, the best first.")] = 1,
    blending_start_percentage: BlendingStart = None,
    background: Annotated[Background, typer.Option(help="How the rest comes back; pixel: its bytes.")] = Background.pixel,
    optimize: Annotated[Optimize, typer.Option(help="What --background optimization tunes.")] = Optimize.weights,
    reconstruction_steps: Annotated[int, typer.Option(min=1, max=10_000, help="Of --background optimization.")] = 75,
    start: Annotated[Start, typer.Option(help="image: keep something of what is there, for scribbles.")] = Start.noise,
    mask_dilation: Annotated[int, typer.Option(min=0, max=64, help="Latent pixels; thin masks start larger and shrink.")] = 0,
    invert_mask: Annotated[bool, typer.Option(help="Edit all but the white part.")] = False,
    resize_mask: Annotated[bool, typer.Option(help="Accept a mask of another size.")] = False,
    mask_orientation: MaskOrientation = MasksDrawn.auto,
    metadata: Annotated[
        Metadata, typer.Option(help="Of the picture's file; safe: date and camera, no position, owner, serial number.")
    ] = Metadata.safe,
    boxes: Annotated[str | None, path("A box per asset; one asset alone takes the mask's box.")] = None,
    model_path: OwnBase = None,
    output_dir: OutputDir = Path("Model_ours"),
    output_path: OutputPath = None,
    overwrite: Overwrite = False,
    steps: Steps = None,
    guidance_scale: Scale = None,
    negative_prompt: str = "",
    lora_scale: LoraScale = None,
    guidance: Annotated[bool | None, typer.Option(help="Move the latents until the asset lies in its box.")] = None,
    bounded: Annotated[bool, typer.Option(help="Keep an asset to its box, and plain words to the mask.")] = True,
    own_text: OwnText = True,
    mixed_precision: Precision = Precision.auto,
    vram_gib: VramGib = None,
    attention_backend: AttentionBackend = Attention.auto,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Put a learned asset, or plain words, into the masked part of a picture; leave the rest alone."""
    given = dict(locals())
    with running(as_json) as job:
        name = _model_name(model, model_id)
        check_writable(output_path or PLACE)
        _run_edit(job, given, name)


def decompose(
    model_id: BundleName,
    model_path: OwnBase = None,
    output_dir: OutputDir = Path("Model_ours"),
    output_path: OutputPath = None,
    overwrite: Overwrite = False,
    steps: Steps = None,
    guidance_scale: Scale = None,
    mixed_precision: Precision = Precision.auto,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Draw what a scene consists of: each asset alone, all in their places, and the background if it was learned."""
    given = dict(locals())
    with running(as_json) as job:
        check_writable(output_path or PLACE)

        from ..synthesis.variations import decomposition

        def shots(bundle: Bundle, base: BaseModel, config: SynthesisConfig) -> list[Shot]:
            if "<background>" not in bundle.tokens:
                say("note: the background was not learned; 'learn --background-asset' adds it")
            return decomposition(bundle.tokens, seed, _places(bundle, base, config))

        _run_shots(job, given, "decompose", shots)


def variations(
    model_id: BundleName,
    count: Annotated[int, typer.Option(min=1, max=10_000, help="Pictures; the prompts take turns.")] = 8,
    asset: Annotated[str | None, typer.Option(help="One asset, such as 0 or <asset0>; the whole scene by default.")] = None,
    prompts_file: Annotated[Path | None, path("One prompt a line; {} is the scene or the asset.")] = None,
    keep_places: Annotated[
        bool, typer.Option("--keep-places/--free-places", help="Several assets keep to where they stood in the photo.")
    ] = True,
    model_path: OwnBase = None,
    output_dir: OutputDir = Path("Model_ours"),
    output_path: OutputPath = None,
    overwrite: Overwrite = False,
    steps: Steps = None,
    guidance_scale: Scale = None,
    mixed_precision: Precision = Precision.auto,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Draw the whole scene, or one asset, in many places and styles."""
    given = dict(locals())
    with running(as_json) as job:
        check_writable(output_path or PLACE)

        from ..synthesis.variations import VARIATIONS, choose_asset, read_prompts
        from ..synthesis.variations import variations as list_variations

        def shots(bundle: Bundle, base: BaseModel, config: SynthesisConfig) -> list[Shot]:
            chosen = choose_asset(asset, bundle.tokens)
            templates = read_prompts(prompts_file, bundle.tokens) if prompts_file else VARIATIONS[base.family]
            say_weights(templates)
            return list_variations(chosen, templates, count, seed, _places(bundle, base, config) if keep_places else None)

        _run_shots(job, given, "variations", shots)


def _model_name(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None and argument != option:
        raise InputError(f"MODEL_ID is '{argument[:50]}' and --model-id is '{option[:50]}'; give one of them")
    name = argument if argument is not None else option
    if name is None:
        raise InputError("there is no MODEL_ID: give a learned bundle, or --model-id none to edit with the plain base model")
    return name


def _run_edit(job: Job, given: dict[str, Any], name: str) -> None:
    from ..boxes import parse_layout
    from ..editing.picture_file import load_edit_mask, load_picture
    from ..prompts import NEGATIVE, assets_in, check_prompt

    with waiting("reading the picture"):
        picture = load_picture(given["init_image"], given["metadata"].value)
        mask, reading = load_edit_mask(given["mask"], picture.image, given["init_image"].name, given["resize_mask"],
                                       given["invert_mask"], picture.orientation, given["mask_orientation"].value)  # fmt: skip
    for note in (*picture.notes, *reading):
        say(f"note: {note}")

    import_libraries()
    from ..attention.backend import use_backend
    from ..bundle.store import attach, find_bundle, load_bundle
    from ..config import LearnConfig, LoraPhase, MemoryConfig, edit_preset
    from ..editing.edit import edit
    from ..editing.output import KIND, save_edit

    bundle = None if name.lower() == "none" else load_bundle(find_bundle(name, given["output_dir"]))
    place = PLACE / (bundle.name if bundle else "none")
    check_apart(given["output_path"], place,
                {"--init-image": given["init_image"], "--mask": given["mask"], "--boxes": given["boxes"]},
                not_to_write_into(bundle, given["model_path"] or ("" if bundle else "toybox")))  # fmt: skip
    check_output(given["output_path"], place, KIND, given["overwrite"])
    tokens = bundle.tokens if bundle else ()
    check_prompt(given["prompt"], tokens)
    check_prompt(given["negative_prompt"], tokens, NEGATIVE)
    say_weights([given["prompt"]])
    say_weights([given["negative_prompt"]], NEGATIVE)
    assets = assets_in(given["prompt"])
    layout = parse_layout(given["boxes"], assets) if given["boxes"] is not None else None
    chosen = choose_device(given["device"])
    dtype = choose_dtype(given["mixed_precision"], chosen)
    wanted = given["model_path"] or (own_base(bundle) if bundle else "toybox")
    attention = choose_attention(given["attention_backend"], chosen, dtype)
    config = _edit_overrides(edit_preset(family_of(wanted)), given)
    check_sampling(wanted, "ddim", config.steps)
    learned = bundle.config if bundle else LearnConfig(lora=LoraPhase(train_steps=0))  # the plain model has no adapters
    plan = plan_within("edit", wanted, chosen, dtype, None, given["vram_gib"], attention.name, learned,
                       assets=len(assets), batch=given["batch_size"], edit=config)  # fmt: skip
    memory = plan.settings.memory if plan else MemoryConfig()
    if bundle:
        base = load_base_of(bundle, given["model_path"], chosen, dtype, memory)
    else:
        base = load_base(wanted, chosen, dtype, memory)
    with use_backend(base.unet, attention), _attached(attach, base, bundle, config), Bar() as bar:
        result = edit(base, picture.image, mask, given["prompt"], tokens, config, given["seed"], given["batch_size"], layout,
                      _crops(bundle), bar.denoising)  # fmt: skip
    for note in result.notes:
        say(f"note: {note}")
    facts = {"bundle": bundle.name if bundle else None, **base.record()}
    with numbered_folder(given["output_path"], place) as output, waiting("writing the pictures"):
        paths = save_edit(result, picture, output, facts, given["overwrite"])
    seconds, peak = round(result.seconds, 2), round(result.peak_gib, 3)
    job.text(f"{_count(paths)} in {output}, the best first ({seconds} s, peak {peak} GiB)", sheet_line(output))
    job.json({"images": [str(p) for p in paths], **sheet_facts(output), "json": str(output / "edit.json"),
              "scores": [c.scores for c in result.candidates], "seconds": seconds, "peak_gib": peak})  # fmt: skip


def _attached(attach: Any, base: BaseModel, bundle: Bundle | None, config: EditConfig) -> Any:
    from contextlib import nullcontext

    return attach(base, bundle, config.lora_scale) if bundle else nullcontext()


def _crops(bundle: Bundle | None) -> dict[str, Any]:
    from ..bundle.instance_copy import kept_crops

    return kept_crops(bundle.folder, bundle.tokens, bundle.instance) if bundle else {}


def _edit_overrides(config: EditConfig, given: dict[str, Any]) -> EditConfig:
    names = ("steps", "guidance_scale", "negative_prompt", "lora_scale", "blending_start_percentage", "start", "background",
             "optimize", "reconstruction_steps", "mask_dilation", "bounded", "own_text")  # fmt: skip
    config = override(config, **{n: given[n] for n in names})
    if given["guidance"] is None:
        return config
    return replace(config, guidance=replace(config.guidance, enabled=given["guidance"]))


def _run_shots(job: Job, given: dict[str, Any], command: str,
               make_shots: Callable[[Bundle, BaseModel, SynthesisConfig], list[Shot]]) -> None:  # fmt: skip
    """What `decompose` and `variations` share: load, draw a list of prompts, save."""
    import_libraries()
    from ..bundle.store import attach, find_bundle, load_bundle
    from ..config import synthesis_preset, to_dict
    from ..synthesis.resumable import open_job
    from ..synthesis.variations import draw_shots, save_shots

    bundle = load_bundle(find_bundle(given["model_id"], given["output_dir"]))
    place, explicit = PLACE / bundle.name, given["output_path"]
    check_apart(explicit, place, {"--prompts-file": given.get("prompts_file")},
                not_to_write_into(bundle, given["model_path"]))  # fmt: skip
    check_output(explicit, place, command, given["overwrite"])
    chosen = choose_device(given["device"])
    wanted = given["model_path"] or own_base(bundle)
    config = override(synthesis_preset(family_of(wanted)), steps=given["steps"], guidance_scale=given["guidance_scale"])
    check_sampling(wanted, config.scheduler, config.steps)
    base = load_base_of(bundle, given["model_path"], chosen, choose_dtype(given["mixed_precision"], chosen))
    shots = make_shots(bundle, base, config)
    facts = {"bundle": bundle.name, **base.record(), "steps": config.steps, "guidance_scale": config.guidance_scale}
    recipe = [to_dict(config), [shot.recipe() for shot in shots]]
    with open_job(explicit, place, command, recipe, base, bundle) as pictures:
        job.hint = pictures.hint
        with attach(base, bundle), Bar() as bar:
            drawn = draw_shots(base, shots, bundle.tokens, config, bar.denoising, pictures.pictures)
        if not drawn:
            end_job(pictures)
        with numbered_folder(explicit, place) as output, waiting("writing the pictures"):
            failed = {"failed": pictures.failed()} if pictures.failures else {}
            paths = save_shots(drawn, output, command, {**facts, **failed}, given["overwrite"])
        pictures.clear()
    earlier = f", {pictures.reused} of them drawn before the interruption" if pictures.reused else ""
    job.text(f"{_count(paths)} in {output}{earlier}", sheet_line(output))
    job.json({"images": [str(p) for p in paths], "prompts": [s.prompt for s in drawn], "failed": pictures.failures,
              **sheet_facts(output), "json": str(output / f"{command}.json")})  # fmt: skip
    end_job(pictures)


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


def _count(paths: list[Path]) -> str:
    return f"{len(paths)} picture{'s' if len(paths) > 1 else ''}"
