"""The `edit` command."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import InputError
from ..io.console import Bar, Job, say, waiting
from ..io.files import check_writable
from ..io.outputs import PLACE, check_apart, check_output, numbered_folder
from .app import app
from .job import job_command
from .options import (
    BlendingOptions,
    BundleNames,
    DrawingOptions,
    EditInput,
    EditOutput,
    EditSampling,
    SeveralOptions,
)
from .parts import (
    bundles_together,
    check_sampling,
    choose_attention,
    choose_device,
    choose_dtype,
    count_images,
    family_of,
    import_libraries,
    layout_together,
    load_base,
    load_base_of,
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
    from ..config import EditConfig


@job_command(app, 'mifo edit toy_car --init-image street.jpg --mask mask.png --prompt "a photo of <asset0>"')
def edit(
    job: Job,
    source: EditInput,
    blending: BlendingOptions,
    sampling: EditSampling,
    output: EditOutput,
    compute: DrawingOptions,
    together: SeveralOptions,
    model: BundleNames = None,
) -> None:
    """Put a learned asset, or plain words, into the masked part of a picture; leave the rest alone."""
    names = _model_names(model, source.model_id)
    check_writable(output.output_path or PLACE)
    from ..editing.source_image import load_edit_mask, load_source_image
    from ..prompts import NEGATIVE, assets_in, check_prompt

    with waiting("reading the picture"):
        photo = load_source_image(source.init_image, output.metadata.value)
        mask, reading = load_edit_mask(source.mask, photo.image, source.init_image.name, source.resize_mask,
                                       source.invert_mask, photo.orientation, source.mask_orientation.value)  # fmt: skip
    for note in (*photo.notes, *reading):
        say(f"note: {note}")

    import_libraries()
    from ..api import edit as run_edit
    from ..attention.backend import use_backend
    from ..attention.compiled import compile_blocks
    from ..bundle.store import find_bundle, load_bundle
    from ..config import LearnConfig, LoraPhase, MemoryConfig
    from ..editing.output import KIND
    from ..presets import edit_preset

    plain = names[0].lower() == "none"
    bundles = [] if plain else [load_bundle(find_bundle(name, source.output_dir)) for name in names]
    several, bundle = bundles_together(bundles, together.word), bundles[0] if bundles else None
    place = PLACE / several.name
    for each in (*bundles, *((None,) if plain else ())):
        check_apart(output.output_path, place,
                    {"--init-image": source.init_image, "--mask": source.mask, "--boxes": source.boxes},
                    not_to_write_into(each, source.model_path or ("" if each else "toybox")))  # fmt: skip
    check_output(output.output_path, place, KIND, output.overwrite)
    tokens, within = several.tokens, several.within(source.prompt)
    check_prompt(within, tokens)
    check_prompt(sampling.negative_prompt, tokens, NEGATIVE)
    say_weights([source.prompt])
    say_weights([sampling.negative_prompt], NEGATIVE)
    assets = assets_in(within)
    by_place = several.acts_by_place("everywhere", source.boxes is not None, together.background_lora)
    layout = layout_together(several, source.boxes, within, by_place and source.boxes is not None)
    chosen = choose_device(compute.device)
    dtype = choose_dtype(compute.mixed_precision, chosen)
    wanted = source.model_path or (own_base(bundle) if bundle else "toybox")
    attention = choose_attention(compute.attention_backend, chosen, dtype)
    note_compiled(compute.compile, compute.vram_gib)
    config = _edit_config(edit_preset(family_of(wanted)), blending, sampling)
    check_sampling(wanted, config)
    learned = bundle.config if bundle else LearnConfig(lora=LoraPhase(train_steps=0))  # the plain model has no adapters
    plan = plan_within("edit", wanted, chosen, dtype, None, compute.vram_gib, attention.name, learned,
                       assets=len(assets), batch=sampling.batch_size, edit=config)  # fmt: skip
    memory = plan.settings.memory if plan else MemoryConfig()
    if bundle:
        base = load_base_of(bundle, source.model_path, chosen, dtype, memory)
    else:
        base = load_base(wanted, chosen, dtype, memory)
    with use_backend(base.unet, attention), compile_blocks(base.unet, compute.compile), Bar() as bar:
        result = run_edit(base, several, photo, mask, source.prompt, layout, num_images=sampling.batch_size, seed=compute.seed,
                          config=config, background_lora=together.background_lora, on_progress=bar.denoising)  # fmt: skip
    for note in result.edit.notes:
        say(f"note: {note}")
    with numbered_folder(output.output_path, place) as folder, waiting("writing the pictures"):
        paths = result.save(folder, output.overwrite)
    seconds, peak = round(result.edit.seconds, 2), round(result.edit.peak_gib, 3)
    job.text(f"{count_images(paths)} in {folder}, the best first ({seconds} s, peak {peak} GiB)", sheet_line(folder))
    job.json({"images": [str(p) for p in paths], **sheet_facts(folder), "json": str(folder / "edit.json"),
              "scores": result.scores, "seconds": seconds, "peak_gib": peak})  # fmt: skip


def _model_names(arguments: list[str] | None, option: str | None) -> list[str]:
    if arguments and option is not None and arguments != [option]:
        raise InputError(f"MODEL_ID is '{' '.join(arguments)[:50]}' and --model-id is '{option[:50]}'; give one of them")
    names = arguments or ([option] if option is not None else [])
    if not names:
        raise InputError("there is no MODEL_ID: give a learned bundle, or --model-id none to edit with the plain base model")
    return names


def _edit_config(config: EditConfig, blending: BlendingOptions, sampling: EditSampling) -> EditConfig:
    """The preset with the options that were given."""
    from ..config import with_steps

    config = override(with_steps(config, sampling.steps), guidance_scale=sampling.guidance_scale, lora_scale=sampling.lora_scale,
                      negative_prompt=sampling.negative_prompt, bounded=sampling.bounded, own_text=sampling.own_text,
                      box_inset=sampling.box_inset, background=blending.background, optimize=blending.optimize,
                      start=blending.start,
                      reconstruction_steps=blending.reconstruction_steps, mask_dilation=blending.mask_dilation,
                      blending_start_percentage=blending.blending_start_percentage)  # fmt: skip
    return config if sampling.guidance is None else replace(config, guidance=replace(config.guidance, enabled=sampling.guidance))
