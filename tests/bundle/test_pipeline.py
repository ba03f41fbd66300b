"""What leaves mifo: pipelines and files that plain diffusers draws the same picture from, for each family."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import load_base, mifo, snapshot, tiny_base_folder, tiny_bundle_folder, tiny_xl_bundle_folder, tiny_xl_folder
from safetensors import safe_open
from safetensors.torch import load_file

from mifo.bundle.export import LORA_FILE, export_for_comfyui, export_for_diffusers, export_for_kohya
from mifo.bundle.store import Bundle, attach, load_bundle
from mifo.config import SynthesisConfig
from mifo.errors import InputError
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.sampling.denoise import initial_latents
from mifo.synthesis.synthesize import synthesize

PROMPT = "a photo of <asset0> and <asset1> at night"
Case = tuple[BaseModel, Bundle]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param == "sd":
        return load_base(), load_bundle(tiny_bundle_folder())
    return load_base_model(str(tiny_xl_folder())), load_bundle(tiny_xl_bundle_folder())


def drawn_by_mifo(base: BaseModel, bundle: Bundle, prompt: str = PROMPT) -> np.ndarray:
    with attach(base, bundle):
        image = synthesize(base, prompt, None, bundle.tokens, SynthesisConfig(steps=3, guidance_scale=3.0), seed=3).images[0]
    return np.asarray(image, float) / 255


def drawn_by(pipe: Any, prompt: str = PROMPT) -> np.ndarray:
    latents = initial_latents((pipe.unet.config.in_channels, 16, 16), 3, 1, "cpu")
    found: np.ndarray = pipe(prompt, num_inference_steps=3, guidance_scale=3.0, latents=latents, height=128, width=128,
                             output_type="np").images[0]  # fmt: skip
    return found


def close(first: np.ndarray, second: np.ndarray) -> bool:
    """mifo's pictures are rounded to bytes; beyond that they agree to 1e-4."""
    return bool(np.abs(first - second).max() <= 0.5 / 255 + 1e-4)


def test_a_pipeline_draws_what_mifo_draws_and_leaves_the_base_alone(case: Case) -> None:
    base, bundle = case
    before = {name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in base.parts.items()}
    words = dict(base.tokenizer.get_added_vocab())
    pipe = bundle.to_pipeline(base)
    assert type(pipe).__name__ == ("StableDiffusionXLPipeline" if base.text_encoder_2 else "StableDiffusionPipeline")
    assert close(drawn_by(pipe), drawn_by_mifo(base, bundle))
    assert not close(drawn_by(pipe), drawn_by(pipe, "a photo of a red car and a robot at night"))
    assert base.tokenizer.get_added_vocab().keys() >= words.keys()
    for name, part in base.parts.items():
        assert all(torch.equal(v, before[name][k]) for k, v in part.state_dict().items()), name


def test_a_saved_pipeline_is_a_whole_model(case: Case, tmp_path: Path) -> None:
    import diffusers

    base, bundle = case
    model = tiny_xl_folder() if base.text_encoder_2 else tiny_base_folder()
    result = mifo("export", bundle.folder, "--format", "pipeline", "--model-path", model, "--output-path", tmp_path / "whole",
                  "--json")  # fmt: skip
    assert "unet/diffusion_pytorch_model.safetensors" in json.loads(result.stdout)["files"]
    pipe = getattr(diffusers, base.layout.pipeline).from_pretrained(tmp_path / "whole")
    assert not any("lora" in name or "base_layer" in name for name in pipe.unet.state_dict())
    assert np.abs(drawn_by(pipe) - drawn_by(bundle.to_pipeline(base))).max() <= 1e-4


def with_alpha(bundle: Bundle, **alphas: int) -> Bundle:
    """A stranger's bundle: LoRA whose alpha is not its rank, another one in each part."""
    lora = {}
    for name, adapter in bundle.lora.items():
        config = type(adapter.config)(r=adapter.config.r, lora_alpha=alphas[name], target_modules=adapter.config.target_modules,
                                      inference_mode=True)  # fmt: skip
        lora[name] = replace(adapter, config=config)
    return replace(bundle, lora=lora)


def load_all(pipe: Any, folder: Path, lora: str) -> Any:
    """As a script without mifo does it."""
    for index in range(2):
        row = load_file(folder / f"asset{index}.safetensors")
        if len(row) == 1:
            pipe.load_textual_inversion(folder / f"asset{index}.safetensors")
            continue
        pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer.eos_token_id
        for key, encoder, tokenizer in (("clip_l", pipe.text_encoder, pipe.tokenizer),
                                        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2)):  # fmt: skip
            pipe.load_textual_inversion(row[key][None], token=f"<asset{index}>", text_encoder=encoder, tokenizer=tokenizer)
    pipe.load_lora_weights(folder / lora)
    return pipe


@pytest.mark.parametrize(("export", "lora"), [(export_for_diffusers, LORA_FILE), (export_for_kohya, "lora.safetensors")])
def test_each_parts_alpha_reaches_diffusers(case: Case, tmp_path: Path, export: Callable[..., None], lora: str) -> None:
    import diffusers

    base, own = case
    rank = own.lora["unet_lora"].config.r
    other = with_alpha(own, unet_lora=3 * rank, text_lora=rank, text_lora_2=2 * rank)
    export(other, tmp_path / "export")
    model = tiny_xl_folder() if base.text_encoder_2 else tiny_base_folder()
    pipe = load_all(getattr(diffusers, base.layout.pipeline).from_pretrained(model), tmp_path / "export", lora)
    expected = drawn_by_mifo(base, other)
    assert close(drawn_by(pipe), expected)
    assert not close(drawn_by_mifo(base, own), expected), "alpha matters here"


def test_the_same_bundle_gives_the_same_bytes(case: Case, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_for_diffusers(case[1], tmp_path / name)
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert one[LORA_FILE] == two[LORA_FILE]
    with safe_open(tmp_path / "one" / LORA_FILE, "pt") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
    assert facts["unet.r"] == facts["unet.lora_alpha"] == case[1].lora["unet_lora"].config.r


def test_comfyuis_folders(tmp_path: Path) -> None:
    mifo("export", tiny_xl_bundle_folder(), "--format", "comfyui", "--output-path", tmp_path / "models")
    files = sorted(p.relative_to(tmp_path / "models").as_posix() for p in (tmp_path / "models").rglob("*.safetensors"))
    name = tiny_xl_bundle_folder().name
    names = (f"embeddings/{name}-asset0", f"embeddings/{name}-asset1", f"loras/{name}")
    assert files == [f"{each}.safetensors" for each in names]
    assert set(load_file(tmp_path / "models" / files[0])) == {"clip_l", "clip_g"}
    # ComfyUI's loader maps these starts to the UNet and to its two text encoders
    starts = ("lora_unet_", "lora_te1_text_model_encoder_layers_", "lora_te2_text_model_encoder_layers_")
    assert all(key.startswith(starts) for key in load_file(tmp_path / "models" / files[2]))

    # ComfyUI's tokenizer takes `embedding:` up to the next white space, and (a:1.2) for a weight
    export_for_comfyui(replace(load_bundle(tiny_xl_bundle_folder()), name="my (old) désk, v1.2"), tmp_path / "named")
    named = sorted(p.name for p in (tmp_path / "named").rglob("*.safetensors"))
    assert named == ["my_old_désk_v1.2-asset0.safetensors", "my_old_désk_v1.2-asset1.safetensors", "my_old_désk_v1.2.safetensors"]


def test_a_base_that_the_bundle_was_not_learned_on_is_refused(tmp_path: Path) -> None:
    bundle = load_bundle(tiny_bundle_folder())
    with pytest.raises(InputError, match="was learned on"):
        bundle.to_pipeline(load_base_model(str(tiny_xl_folder())))
    result = mifo("export", bundle.folder, "--model-path", "toybox", "--output-path", tmp_path / "x", exit_code=2)
    assert "leave it out" in result.output and not (tmp_path / "x").exists()
