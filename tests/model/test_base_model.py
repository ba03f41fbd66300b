"""Loading base models: the embedded one as anyone would load it, and clear words for what cannot be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from mifo.errors import InputError
from mifo.model.base_weights import STEMS
from mifo.model.load_base import DTYPE, HUB_MODELS, TOYBOX_FOLDER, load_base_model, resolve
from mifo.toybox.judge import judge_images, load_judge


def test_the_embedded_model_is_small_enough_to_ship():
    weights = [p for p in TOYBOX_FOLDER.parent.rglob("*.safetensors")]
    assert len(weights) >= 4
    assert sum(p.stat().st_size for p in weights) <= 20 * 2**20


def test_stable_diffusions_own_pipeline_loads_it_and_draws_the_background_asked_for():
    pipe = StableDiffusionPipeline.from_pretrained(TOYBOX_FOLDER, **{DTYPE: torch.float32})
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a red car at the beach", "a photo of a blue house on the grass", "a photo of a yellow star at night"]
    images = pipe(prompts, num_inference_steps=12, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
    backgrounds = [v.background for v in judge_images(load_judge(), images)]
    assert backgrounds == ["beach", "grass", "night"], backgrounds


def test_a_loaded_model_is_frozen_and_tells_its_shape():
    base = load_base_model("toybox")
    assert not any(p.requires_grad for part in (base.unet, base.vae, base.text_encoder) for p in part.parameters())
    assert (base.resolution, base.vae_factor, base.family) == (128, 8, "toybox")
    assert base.scheduler.config["prediction_type"] == "v_prediction"


def test_decoding_what_was_encoded_gives_the_picture_back():
    from PIL import Image

    from mifo.io.sheets import pixels_to_tensor

    image = Image.open(Path(__file__).parents[2] / "example" / "shelf" / "img.png").convert("RGB").resize((128, 128))
    base = load_base_model("toybox")
    pixels = pixels_to_tensor(image)
    with torch.no_grad():
        decoded = base.decode(base.encode(pixels)[0])
    error = (decoded - (pixels / 2 + 0.5)).pow(2).mean()
    assert -10 * torch.log10(error) > 22  # dB; the mean of held-out scenes is above 28


def test_names_stand_for_pinned_revisions_with_mirrors():
    for name in ("sd1.5", "sd2.1"):
        assert len(HUB_MODELS[name]) >= 2
        first = HUB_MODELS[name][0][1]
        assert len(first) == 40 and int(first, 16) >= 0


def test_mirrors_are_tried_in_order_and_the_first_that_answers_is_used(monkeypatch, tmp_path: Path):
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append(repo)
        assert not any(p.endswith((".bin", ".ckpt", ".pt")) for p in allow_patterns)
        if len(asked) == 1:
            raise OSError("404 Client Error")
        for part, stem in ((p, s) for p, s in STEMS.items() if p != "text_encoder_2"):
            (tmp_path / "abc" / part).mkdir(parents=True)
            (tmp_path / "abc" / part / f"{stem}.safetensors").touch()
        return str(tmp_path / "abc")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder, source, revision = resolve("sd2.1")
    assert asked == [repo for repo, _ in HUB_MODELS["sd2.1"]]
    assert (folder, source, revision) == (tmp_path / "abc", asked[1], "abc")


@pytest.mark.parametrize("name", ["sd3", "./nowhere", "/nowhere/at/all", "", "a/b/c"])
def test_a_name_that_means_nothing_is_refused(name):
    with pytest.raises(InputError, match="expected toybox"):
        resolve(name)


def test_a_damaged_or_foreign_folder_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no tokenizer"):
        load_base_model(str(tmp_path))
    copy = tmp_path / "model"
    shutil.copytree(TOYBOX_FOLDER, copy)
    weights = next((copy / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not load"):
        load_base_model(str(copy))


@pytest.mark.parametrize("part", ["text_encoder", "vae", "unet"])
def test_a_model_that_lacks_a_weight_is_refused_not_started_at_random(part: str, tmp_path: Path):
    copy = tmp_path / "model"
    shutil.copytree(TOYBOX_FOLDER, copy)
    path = next((copy / part).glob("*.safetensors"))
    weights = load_file(path)
    weights.pop(next(name for name in weights if name.endswith("norm1.weight")))
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 weights of the model are not in .*{part}, such as .*norm1.weight"):
        load_base_model(str(copy))


def test_every_version_of_transformers_knows_the_text_encoders_weights():
    """Version 4 takes `encoder.` for other weights than those of `text_model.encoder.`, and starts at random."""
    assert all(name.startswith("text_model.") for name in load_file(TOYBOX_FOLDER / "text_encoder" / "model.safetensors"))
