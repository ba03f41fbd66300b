"""Stable Diffusion XL through every job, on random weights in its layout, and against diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_bases_that_people_have as people
import torch
from _tiny import FAST, mifo, tiny_base_folder, tiny_xl_folder, write_instance
from PIL import Image
from safetensors.torch import load_file

from mifo.bundle.export import LORA_FILE, export_for_diffusers, export_for_kohya
from mifo.bundle.store import attach, load_bundle
from mifo.config import SynthesisConfig
from mifo.data.instance import fit_instance, load_instance
from mifo.errors import InputError
from mifo.model.base import BaseModel
from mifo.model.base_weights import STEMS
from mifo.model.load_base import family_of, load_base_model
from mifo.model.prompt_embeds import ImageSize
from mifo.model.shapes import SHAPES
from mifo.model.single_file import configs_of_file
from mifo.planning.planner import read_model
from mifo.prompts import tokenize_prompt
from mifo.sampling.denoise import initial_latents
from mifo.synthesis.synthesize import synthesize

PROMPT = "a photo of a red car"


@pytest.fixture(scope="module")
def xl() -> BaseModel:
    return load_base_model(str(tiny_xl_folder()))


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two assets, learned by the command in few steps."""
    place = tmp_path_factory.mktemp("xl")
    instance = write_instance(place / "two_cups")
    mifo("learn", instance, "--model-path", tiny_xl_folder(), "--output-dir", place / "models", *FAST)
    return place / "models" / "two_cups"


def pipeline():
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_xl_folder(), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("width", "negative"), [(128, ""), (192, "a blue star")])
def test_it_draws_what_diffusers_own_pipeline_draws(xl: BaseModel, width: int, negative: str) -> None:
    config = SynthesisConfig(steps=3, guidance_scale=3.0, width=width, negative_prompt=negative)
    ours = synthesize(xl, PROMPT, None, (), config, seed=5).images[0]
    latents = initial_latents((4, 16, width // 8), 5, 1, "cpu")
    theirs = pipeline()(PROMPT, negative_prompt=negative or None, num_inference_steps=3, guidance_scale=3.0, latents=latents,
                        height=128, width=width).images[0]  # fmt: skip
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1, "one level of rounding"


@pytest.mark.parametrize(("kind", "scale"), [("EulerAncestralDiscreteScheduler", 0.0), ("EulerDiscreteScheduler", 1.0)])
def test_few_steps_without_guidance_as_turbo_and_lightning_are_used(xl: BaseModel, kind: str, scale: float) -> None:
    """Turbo: ancestral Euler from its folder, guidance scale 0. Lightning: Euler with trailing timesteps, set by hand."""
    import diffusers

    own = getattr(diffusers, kind).from_config(xl.scheduler.config, timestep_spacing="trailing")
    base = replace(xl, own_scheduler=own)
    config = SynthesisConfig(steps=3, guidance_scale=scale, scheduler="own")
    if scale:
        base, config = xl, replace(config, scheduler="euler", timestep_spacing="trailing")
    ours = synthesize(base, PROMPT, None, (), config, seed=5).images[0]
    pipe = pipeline()
    pipe.scheduler = own
    theirs = pipe(PROMPT, num_inference_steps=3, guidance_scale=scale, height=128, width=128,
                  generator=torch.Generator().manual_seed(5)).images[0]  # fmt: skip
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1, "one level of rounding"
    spaced = synthesize(xl, PROMPT, None, (), replace(config, timestep_spacing="leading"), seed=5).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(spaced, int)).max() > 1, "the spacing shows"


def test_a_photo_is_learned_at_its_own_shape(xl: BaseModel, learned: Path, tmp_path: Path) -> None:
    """96 x 64 pixels on a model of 128: at 160 x 96, prior included, and measured at the same size."""
    from mifo.evaluation.run import learned_size
    from mifo.learning.learn import prepare
    from mifo.presets import learn_preset

    config = learn_preset("sdxl")
    config = replace(config, placements=2, prior=replace(config.prior, num_class_images=1, sampling_steps=1))
    instance = load_instance(write_instance(tmp_path / "cups"))
    parts = prepare(instance, xl, config, None)
    assert parts.fitted.image.size == learned_size(xl, config, instance.image.size) == (160, 96)
    assert parts.prior is not None and parts.prior.latents.shape[-2:] == parts.data.moments[False][0].shape[-2:] == (12, 20)
    squares = prepare(instance, xl, replace(config, aspect="square"), None)
    assert squares.fitted.image.size == (128, 128)
    assert load_bundle(learned).config.aspect == "photo"
    assert Image.open(learned / "instance" / "img.png").size == (160, 96)


def test_a_shifted_copy_says_how_far_it_was_cropped(xl: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mifo.learning import dataset
    from mifo.learning.dataset import InstanceData
    from mifo.learning.objective import Objective
    from mifo.presets import learn_preset

    config = replace(learn_preset("sdxl"), placements=3)
    instance = load_instance(write_instance(tmp_path / "cups"))
    shifts = [(-10, -6), (10, 6)]  # right and down, in pixels: what leaves on the left leaves on the right in the flipped copy
    monkeypatch.setattr(dataset, "random_shifts", lambda *_: shifts)
    data = InstanceData(fit_instance(instance, (128, 96)), xl, 3, 0, instance.image.size)
    assert [view.size.crop for view in data.photos[0].views[False]] == [(0, 0), (6, 10), (0, 0)]
    assert [view.size.crop for view in data.photos[0].views[True]] == [(0, 0), (6, 0), (0, 10)]
    shown = data.photos[0].views[False][1].masks
    assert torch.equal(shown[..., :-6, :-10], data.masks[False][..., 6:, 10:])
    objective = Objective(xl, data, config, np.random.default_rng(0), torch.Generator().manual_seed(0))
    drawn = (data.sample(objective.rng, objective.generator, 1, True, 0.5) for _ in range(99))
    batch = next(b for b in drawn if b.size and any(b.size.crop))
    assert objective.size_of(batch).numbers == (64, 96, *batch.size.crop, 96, 128)
    objective.config = replace(config, crop_conditioning=False)
    assert objective.size_of(batch).numbers == (64, 96, 0, 0, 96, 128)


def test_the_text_is_pooled_at_its_end_and_not_at_an_asset(learned: Path) -> None:
    # an asset's id is the highest of all, which is where configurations from before transformers 4.31 would pool
    base, bundle = load_base_model(str(tiny_xl_folder())), load_bundle(learned)
    with attach(base, bundle), torch.no_grad():
        ids = torch.tensor([tokenize_prompt(base.tokenizer, "a photo of <asset0> at night", ["<asset0>"]).input_ids])
        end, encoder = ids[0].tolist().index(base.tokenizer.eos_token_id), base.text_encoder_2
        fill = base.tokenizer.convert_tokens_to_ids("!")
        padded = torch.cat([ids[:, : end + 1], torch.full((1, ids.shape[1] - end - 1), fill)], 1)
        states = encoder.text_model(padded).last_hidden_state
        torch.testing.assert_close(base.encode_prompt(ids).pooled, encoder.text_projection(states[:, end]))


def test_the_picture_size_reaches_the_unet(xl: BaseModel) -> None:
    ids = torch.tensor([tokenize_prompt(xl.tokenizer, PROMPT, []).input_ids] * 2)
    native, photo = ImageSize((128, 128), (128, 128)), ImageSize((64, 96), (128, 128))
    assert xl.encode_prompt(ids).time_ids.tolist() == [[128, 128, 0, 0, 128, 128]] * 2
    assert xl.encode_prompt(ids, native, photo).time_ids.tolist() == [[128, 128, 0, 0, 128, 128], [64, 96, 0, 0, 128, 128]]
    prompt, latents = xl.encode_prompt(ids[:1], native), torch.ones(1, 4, 16, 16)
    other = xl.encode_prompt(ids[:1], photo)
    predictions = [xl.unet(latents, 500, e.states, added_cond_kwargs=e.conditions).sample for e in (prompt, other)]
    assert (predictions[0] - predictions[1]).abs().max() > 1e-4


@pytest.mark.slow
def test_learn_place_edit_and_evaluate(learned: Path, tmp_path: Path) -> None:
    record = json.loads((learned / "bundle.json").read_text())
    assert record["adapters"] == ["text_lora", "text_lora_2", "unet_lora"] and record["embedding_widths"] == [32, 48]
    assert load_file(learned / "assets.safetensors")["<asset0>"].shape == (80,)
    boxes = "[[0.0, 0.2, 0.45, 0.9], [0.55, 0.2, 1.0, 0.9]]"
    common = ["--output-dir", learned.parent]
    result = mifo("synthesize", "two_cups", *common, "--prompt", "a photo of <asset0> and <asset1>", "--boxes", boxes,
                  "--steps", 3, "--output-path", tmp_path / "drawn", "--json")  # fmt: skip
    assert len(json.loads(result.stdout)["images"]) == 1
    photo, mask = (learned / "instance" / name for name in ("img.png", "mask0.png"))
    mifo("edit", "two_cups", *common, "--init-image", photo, "--mask", mask, "--prompt", "a photo of <asset1>", "--steps", 3,
         "--output-path", tmp_path / "edit")  # fmt: skip
    assert (tmp_path / "edit" / "edit00.png").is_file()
    mifo("decompose", "two_cups", *common, "--steps", 2, "--output-path", tmp_path / "parts")


def test_what_is_learned_in_each_text_encoder_matters(learned: Path) -> None:
    base, bundle = load_base_model(str(tiny_xl_folder())), load_bundle(learned)
    assert set(bundle.adapters) == {"unet_lora", "text_lora", "text_lora_2"} and bundle.widths == (32, 48)
    with attach(base, bundle):
        ids = torch.tensor([tokenize_prompt(base.tokenizer, "a photo of <asset0>", ["<asset0>"]).input_ids])
        first, second = (encoder.get_input_embeddings().own for encoder in base.text_encoders)
        assert (first, second) == (slice(0, 32), slice(32, 80))
        with torch.no_grad():
            seen = base.encode_prompt(ids)
            position = int((ids[0] == ids.max()).nonzero()[0])
            base.text_encoder_2.get_input_embeddings().vectors[0, 32:] += 1
            moved = base.encode_prompt(ids)
        assert torch.equal(moved.states[..., :32], seen.states[..., :32])
        assert (moved.states[0, position, 32:] - seen.states[0, position, 32:]).abs().max() > 1e-3
        assert not torch.equal(moved.pooled, seen.pooled)
    assert isinstance(base.text_encoder_2.get_input_embeddings(), torch.nn.Embedding)


@pytest.mark.parametrize("export", [export_for_diffusers, export_for_kohya])
def test_diffusers_draws_the_same_from_the_export(learned: Path, tmp_path: Path, export: Any) -> None:
    bundle = load_bundle(learned)
    export(bundle, tmp_path / "export")
    if export is export_for_kohya:
        names = list(load_file(tmp_path / "export" / "lora.safetensors"))
        for start in ("lora_unet_down_blocks_1_attentions_0_", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.",
                      "lora_te2_text_model_encoder_layers_2_self_attn_out_proj."):  # fmt: skip
            assert any(name.startswith(start) for name in names), start
        assert {name.rsplit(".", 1)[-1] for name in names} == {"alpha", "weight"}
    row = load_file(tmp_path / "export" / "asset0.safetensors")
    assert {name: tuple(value.shape) for name, value in row.items()} == {"clip_l": (32,), "clip_g": (48,)}
    pipe = pipeline()
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer.eos_token_id  # docs/learn.md says why
    for index in range(2):
        row = load_file(tmp_path / "export" / f"asset{index}.safetensors")
        encoders = (("clip_l", pipe.text_encoder, pipe.tokenizer), ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2))
        for key, encoder, tokenizer in encoders:
            pipe.load_textual_inversion(row[key][None], token=f"<asset{index}>", text_encoder=encoder, tokenizer=tokenizer)
    pipe.load_lora_weights(tmp_path / "export" / ("lora.safetensors" if export is export_for_kohya else LORA_FILE))
    prompt, latents = "a photo of <asset0> and <asset1>", initial_latents((4, 16, 16), 3, 1, "cpu")
    theirs = pipe(prompt, num_inference_steps=3, guidance_scale=3.0, latents=latents, height=128, width=128).images[0]
    base = load_base_model(str(tiny_xl_folder()))
    with attach(base, bundle):
        ours = synthesize(base, prompt, None, bundle.tokens, SynthesisConfig(steps=3, guidance_scale=3.0), seed=3).images[0]
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_bundles_of_another_family_are_refused(learned: Path) -> None:
    other = load_base_model(str(tiny_base_folder()))
    with pytest.raises(InputError, match="was learned on"), attach(other, load_bundle(learned)):
        pass


def test_a_second_text_encoder_is_part_of_the_fingerprint(xl: BaseModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(tiny_xl_folder(), tmp_path / "copy"))
    assert load_base_model(str(folder)).fingerprint == xl.fingerprint
    path = folder / "text_encoder_2" / "model.safetensors"
    weights = load_file(path)
    weights[min(weights)] = weights[min(weights)] + 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    assert load_base_model(str(folder)).fingerprint != xl.fingerprint


@pytest.mark.parametrize(("missing", "message"), [("tokenizer_2", "has no tokenizer_2"), ("text_encoder", "has no text_encoder")])
def test_a_folder_without_a_part_is_refused(tmp_path: Path, missing: str, message: str) -> None:
    folder = Path(shutil.copytree(tiny_xl_folder(), tmp_path / "copy"))
    shutil.rmtree(folder / missing)
    with pytest.raises(InputError, match=message):
        load_base_model(str(folder))


def test_tokenizers_that_read_differently_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_xl_folder(), tmp_path / "copy"))
    for path in (folder / "tokenizer_2").glob("*.json"):
        path.write_text(path.read_text().replace('"cars', '"cors').replace('"beach</w>"', '"peach</w>"'))
    with pytest.raises(InputError, match=r"two tokenizers|does not load"):
        load_base_model(str(folder))


def test_the_vae_works_in_fp32_where_it_says_so(xl: BaseModel) -> None:
    xl.vae.register_to_config(force_upcast=True)
    xl.vae.half()
    try:
        with xl.lend_vae() as vae:
            assert vae.dtype == torch.float32
        assert xl.vae.dtype == torch.float16
    finally:
        xl.vae.float()
        xl.vae.register_to_config(force_upcast=False)


def test_its_shape_has_the_published_numbers_of_weights() -> None:
    assert family_of("sdxl") == "sdxl" and family_of("sd2.1") == "stable-diffusion"
    sizes = read_model("sdxl").sizes
    assert sizes["unet"] == 2_567_463_684  # 2.567 billion
    assert sizes["text_encoder"] == 123_060_480 + 694_659_840  # 0.123 and 0.695 billion
    assert set(SHAPES["sdxl"]) == {"unet", "vae", "text_encoder", "text_encoder_2", "scheduler"}


# --- a checkpoint in one file -------------------------------------------------------------------


def original_unet_name(name: str) -> str:
    """SDXL's name in the original code: as Stable Diffusion 1.x's, with attention before each upsampling and a size embedding."""
    if name.startswith("add_embedding."):
        return name.replace("add_embedding.linear_1", "label_emb.0.0").replace("add_embedding.linear_2", "label_emb.0.2")
    if ".upsamplers." in name:
        block, last = int(name.split(".")[1]), name.split(".")[-1]
        return f"output_blocks.{3 * block + 2}.2.conv.{last}"
    return people.original_unet_name(name)


def open_clip_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second text encoder as OpenCLIP names it: one matrix for queries, keys and values, the projection transposed."""
    found = {"text_projection": weights["text_projection.weight"].T.contiguous()}
    for name, weight in weights.items():
        inner = name.removeprefix("text_model.")
        if ".self_attn.q_proj." in name:
            kind = name.split(".")[-1]
            joined = torch.cat([weights[name.replace("q_proj", f"{each}_proj")] for each in "qkv"])
            layer = inner.split(".")[2]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
        elif ".self_attn.k_proj." in name or ".self_attn.v_proj." in name or name == "text_projection.weight":
            continue
        else:
            for old, new in (("encoder.layers", "transformer.resblocks"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj"),
                             ("final_layer_norm", "ln_final"), ("embeddings.token_embedding", "token_embedding"),
                             ("embeddings.position_embedding.weight", "positional_embedding")):  # fmt: skip
                inner = inner.replace(old, new)
            found[inner] = weight
    return found


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SDXL's shape at an eighth of its width: its folder, and the same weights in one file."""
    from safetensors.torch import save_file

    from scripts.make_random_sd import write_random_sd

    place = tmp_path_factory.mktemp("narrow_xl")
    folder = place / "folder"
    write_random_sd("sdxl", folder, 8)
    parts = {part: load_file(folder / part / f"{stem}.safetensors") for part, stem in STEMS.items()}
    first = {f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}": weight
             for name, weight in parts["text_encoder"].items()}  # fmt: skip
    second = {f"conditioner.embedders.1.model.{n}": w for n, w in open_clip_names(parts["text_encoder_2"]).items()}
    unet = {f"model.diffusion_model.{original_unet_name(name)}": weight for name, weight in parts["unet"].items()}
    path = place / "narrow.safetensors"
    save_file({**first, **second, **unet, **people.original_names("vae", parts["vae"])}, path)
    shutil.copytree(folder / "tokenizer", place / "tokenizer")
    return folder, path


@pytest.mark.slow
def test_a_single_file_is_the_same_model_as_its_folder(narrow: tuple[Path, Path]) -> None:
    folder, path = narrow
    ours, theirs = load_base_model(str(folder)), load_base_model(str(path))
    for part, module in ours.parts.items():
        weights = theirs.parts[part].state_dict()
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, weights[name]), (part, name)
    assert theirs.fingerprint == ours.fingerprint
    ids = torch.tensor([tokenize_prompt(ours.tokenizer, PROMPT, []).input_ids])
    for found, expected in zip((theirs.encode_prompt(ids), theirs.encode_negative(ids)),
                               (ours.encode_prompt(ids), ours.encode_negative(ids)), strict=True):  # fmt: skip
        assert torch.equal(found.states, expected.states) and torch.equal(found.pooled, expected.pooled)


@pytest.mark.slow
def test_a_file_that_predicts_velocity_says_so(narrow: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    assert configs_of_file(narrow[1])["scheduler"]["prediction_type"] == "epsilon"
    path = tmp_path / "velocity.safetensors"
    save_file({**load_file(narrow[1]), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, path)
    scheduler = configs_of_file(path)["scheduler"]
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
