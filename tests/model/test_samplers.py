"""Samplers: our pictures are diffusers' own, whatever the base model's folder names, and what guidance moves arrives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from _tiny import copy_bundle, load_base, mifo, tiny_base_folder, tiny_bundle_folder
from PIL import Image

from mifo.boxes import Box, Layout
from mifo.bundle.store import attach, load_bundle
from mifo.config import PriorConfig, SynthesisConfig
from mifo.errors import InputError
from mifo.learning.prior import make_prior
from mifo.model.base import BaseModel
from mifo.model.prompt_embeds import PromptEmbeds
from mifo.model.samplers import OWN_CLASSES, SCHEDULERS, check_steps, make_scheduler, read_scheduler, training_schedule
from mifo.presets import synthesis_preset
from mifo.sampling.denoise import denoise, initial_latents, seeded_noise
from mifo.synthesis.synthesize import synthesize

#: every scheduler class that public Stable Diffusion folders name
CLASSES = ("PNDM", "DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LMSDiscrete",
           "HeunDiscrete", "DEISMultistep")  # fmt: skip
#: what such folders say of the noise; nothing of clipping, offset or spacing, as most community models
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_folder(folder: Path, kind: str, **settings: Any) -> Path:
    """A model's folder with nothing but its scheduler, as diffusers itself saves it, or as somebody wrote it by hand."""
    name = f"{kind}Scheduler"
    more = {"skip_prk_steps": True} if kind == "PNDM" else {}
    (folder / "scheduler").mkdir(parents=True)
    config = {"_class_name": name, "num_train_timesteps": 1000, **BETAS, **more, **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def own_of(folder: Path) -> Any:
    """The scheduler as diffusers' `from_pretrained` reads it."""
    record = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, record["_class_name"]).from_pretrained(folder / "scheduler")


def with_folder(base: BaseModel, folder: Path) -> BaseModel:
    own = read_scheduler(folder)
    return replace(base, own_scheduler=own, scheduler=training_schedule(own))


def our_picture(base: BaseModel, sampler: str, steps: int) -> np.ndarray:
    config = SynthesisConfig(steps=steps, guidance_scale=4.0, scheduler=sampler, width=128, height=128)
    return np.asarray(synthesize(base, "a photo of a red car", None, (), config, seed=3).images[0]).astype(int)


def their_picture(base: BaseModel, scheduler: Any, steps: int) -> np.ndarray:
    pipeline = diffusers.StableDiffusionPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    image: Image.Image = pipeline("a photo of a red car", num_inference_steps=steps, guidance_scale=4.0, width=128, height=128,
                                  generator=torch.Generator().manual_seed(3)).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", CLASSES)
def test_our_picture_is_the_pipelines_with_the_sampler_that_the_folder_names(
    tiny_sd_base: BaseModel, tmp_path: Path, kind: str
) -> None:
    folder = write_folder(tmp_path, kind)
    base = with_folder(tiny_sd_base, folder)
    theirs = their_picture(base, own_of(folder), 6)
    difference = np.abs(our_picture(base, "own", 6) - theirs).max()
    assert difference <= 1, f"{kind}: off by {difference} of 255"
    assert theirs.std() > 3, "a picture that is flat shows nothing"


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
@pytest.mark.parametrize("kind", CLASSES)
def test_our_samplers_are_the_pipelines_on_every_folders_schedule(
    tiny_sd_base: BaseModel, tmp_path: Path, kind: str, sampler: str
) -> None:
    folder = write_folder(tmp_path, kind)
    base, theirs = with_folder(tiny_sd_base, folder), SCHEDULERS[sampler].from_config(own_of(folder).config)
    their_picture(base, theirs, 1)  # the pipeline sets what it sets
    ours = make_scheduler(sampler, base.own_scheduler)
    steps = [s.set_timesteps(20) or s.timesteps.tolist() for s in (ours, theirs)]
    assert steps[0] == steps[1]
    for name in ("clip_sample", "steps_offset", "timestep_spacing", "prediction_type", "set_alpha_to_one"):
        assert ours.config.get(name) == theirs.config.get(name), name


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_a_folder_that_names_euler_draws_with_our_samplers_what_the_pipeline_draws(
    tiny_sd_base: BaseModel, tmp_path: Path, sampler: str
) -> None:
    folder = write_folder(tmp_path, "EulerDiscrete")
    base, theirs = with_folder(tiny_sd_base, folder), SCHEDULERS[sampler].from_config(own_of(folder).config)
    difference = np.abs(our_picture(base, sampler, 4) - their_picture(base, theirs, 4)).max()
    assert difference <= 1, f"off by {difference} of 255"


def test_latents_beyond_pixels_range_are_not_clipped_on_an_euler_folder(tmp_path: Path) -> None:
    # DDIM's default clips the predicted latents to [-1, 1]; Stable Diffusion's reach 4
    own = read_scheduler(write_folder(tmp_path, "EulerDiscrete"))
    for scheduler in (make_scheduler("ddim", own), training_schedule(own)):
        scheduler.set_timesteps(10)
        latents = torch.full((1, 4, 2, 2), 3.0)
        for timestep in scheduler.timesteps:
            signal = scheduler.alphas_cumprod[timestep]
            noise = (latents - signal.sqrt() * 3.0) / (1 - signal).sqrt()
            latents = scheduler.step(noise, timestep, latents).prev_sample
        torch.testing.assert_close(latents, torch.full_like(latents, 3.0), rtol=0, atol=1e-3)


def test_a_prior_drawn_with_other_settings_of_the_sampler_is_drawn_again(tiny_sd_base: BaseModel, tmp_path: Path) -> None:
    config = PriorConfig(num_class_images=1, sampling_steps=2)
    clipped = diffusers.DDIMScheduler(**BETAS)  # what a folder that names Euler was read as
    clipping = replace(tiny_sd_base, own_scheduler=None, scheduler=clipped)
    clipping.sampler = lambda name: diffusers.DDIMScheduler(**BETAS)  # type: ignore[method-assign]
    poisoned = make_prior(clipping, config, 128, 0, tmp_path).latents
    base = with_folder(tiny_sd_base, write_folder(tmp_path / "base", "EulerDiscrete"))
    found = [make_prior(base, config, 128, 0, folder).latents for folder in (tmp_path, None)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], poisoned)


def test_the_pipelines_index_decides_which_class_it_is(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, "PNDM")
    (folder / "model_index.json").write_text(json.dumps({"scheduler": ["diffusers", "EulerDiscreteScheduler"]}))
    assert type(read_scheduler(folder)).__name__ == "EulerDiscreteScheduler"


def test_a_class_of_which_nothing_is_known_keeps_its_schedule(tmp_path: Path) -> None:
    own = read_scheduler(write_folder(tmp_path, "KDPM2Discrete", prediction_type="v_prediction"))
    assert training_schedule(own).config["prediction_type"] == "v_prediction"
    assert training_schedule(own).config["beta_end"] == 0.012


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("FlowMatchEulerDiscrete", {}, "predicts"),
        ("EulerDiscrete", {"prediction_type": "flow_prediction"}, "flow_prediction"),
        ("DDIM", {"beta_start": float("nan")}, "noise schedule"),
        ("DDIM", {"beta_schedule": "nonsense"}, "does not load"),
    ],
)
def test_a_schedule_that_is_not_stable_diffusions_is_refused(tmp_path: Path, kind: str, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_scheduler(write_folder(tmp_path, kind, **settings))


# --- what guidance moves ------------------------------------------------------------------------


class SteadyNoise:
    """A model that always sees the same noise: what is moved in the latents then stays moved, at the signal's scale."""

    conv_in = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, noise: torch.Tensor, scheduler: Any):
        self.noise, self.kind = noise, scheduler.config["prediction_type"]
        self.signal = scheduler.alphas_cumprod.clone()

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, _: torch.Tensor, **conditions: Any) -> SimpleNamespace:
        noise = self.noise.expand_as(latents)
        if self.kind == "epsilon":
            return SimpleNamespace(sample=noise)
        signal = self.signal[int(timestep)].clamp(min=1e-6)
        return SimpleNamespace(sample=(noise - (1 - signal).sqrt() * latents) / signal.sqrt())  # the velocity


def arrived(scheduler: Any, at: int, steps: int = 20) -> float:
    """The share of a push before step `at`, as the UNet sees it, that is in the final latents."""
    start, generators = seeded_noise((4, 4, 4), 0, 1, "cpu")
    push = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(9))
    states, model, signal = PromptEmbeds(torch.zeros(1, 1, 1)), SteadyNoise(start, scheduler), []

    def run(pushed: bool) -> torch.Tensor:
        def before(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
            if step != at:
                return latents
            signal.append(np.interp(float(timestep), np.arange(1000), scheduler.alphas_cumprod.sqrt().numpy()))
            return latents + push if pushed else latents

        again = [torch.Generator().manual_seed(5) for _ in generators]
        return denoise(model, make_scheduler("own", scheduler), start, states, states, steps, 1.0, before,  # type: ignore[arg-type]
                       generators=again)  # fmt: skip

    change = run(True) - run(False)
    assert len(signal) == 2, "the hook runs once at each step"
    return float((change * push).sum() / (push * push).sum()) * signal[0]


@pytest.mark.parametrize("at", [0, 1, 2, 7])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_push_in_a_hook_arrives_with_every_sampler(tmp_path: Path, kind: str, at: int) -> None:
    share = arrived(read_scheduler(write_folder(tmp_path, kind, timestep_spacing="leading", steps_offset=1)), at)
    # multistep samplers take some of a push for a trend, and go on with it
    assert 0.95 < share < 2, f"{100 * share:.0f} % of the push arrives"


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_push_arrives_with_the_samplers_on_offer_on_the_toyboxs_schedule(toybox_random_base: BaseModel, name: str) -> None:
    assert 0.95 < arrived(make_scheduler(name, toybox_random_base.scheduler), 5) < 2


def test_unipc_is_what_it_was_where_nothing_moves(toybox_random_base: BaseModel) -> None:
    base = toybox_random_base
    noise, states = initial_latents((base.unet.config["in_channels"], 16, 16), 0, 1, "cpu"), torch.zeros(1, 5, 1)
    states = PromptEmbeds(states.expand(1, 5, base.unet.config["cross_attention_dim"]))
    runs = [denoise(base.unet, base.sampler("unipc"), noise, states, states, 5, 1.0, hook)
            for hook in (None, lambda step, timestep, latents: latents.clone())]  # fmt: skip
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", ["HeunDiscrete", "PNDM", "EulerAncestralDiscrete"])
def test_hooks_run_once_a_step_and_see_what_the_unet_sees(tmp_path: Path, kind: str) -> None:
    scheduler, inputs, seen, done = read_scheduler(write_folder(tmp_path, kind)), [], [], []
    start, generators = seeded_noise((4, 8, 8), 0, 1, "cpu")
    model, states = SteadyNoise(start, scheduler), PromptEmbeds(torch.zeros(1, 1, 1))

    class Watched:
        conv_in = SimpleNamespace(weight=torch.zeros(1))

        def __call__(self, latents: torch.Tensor, *rest: Any, **conditions: Any) -> SimpleNamespace:
            inputs.append(latents)
            return model(latents, *rest)

    def before(step: int, _: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        seen.append((step, len(inputs), latents))
        return latents

    denoise(Watched(), scheduler, start, states, states, 6, 1.0, before, lambda k, _, x: done.append(k) or x,  # type: ignore[arg-type]
            generators=generators)  # fmt: skip
    assert [step for step, _, _ in seen] == done == list(range(6))
    assert len(inputs) == {"HeunDiscrete": 11, "PNDM": 7, "EulerAncestralDiscrete": 6}[kind]
    for _, call, latents in seen:
        torch.testing.assert_close(latents, inputs[call])


def test_noise_that_a_sampler_adds_depends_on_the_pictures_seed_alone(tmp_path: Path) -> None:
    own, states, found = read_scheduler(write_folder(tmp_path, "EulerAncestralDiscrete")), PromptEmbeds(torch.zeros(1, 1, 1)), []
    for seed, count in ((4, 2), (5, 1)):
        start, generators = seeded_noise((4, 4, 4), seed, count, "cpu")
        found.append(denoise(SteadyNoise(torch.zeros(1, 4, 4, 4), own), make_scheduler("own", own), start, states, states, 4, 1.0,  # type: ignore[arg-type]
                             generators=generators))  # fmt: skip
    torch.testing.assert_close(found[0][1:], found[1])


@pytest.mark.parametrize("kind", ["EulerDiscrete", "HeunDiscrete", "PNDM", "LMSDiscrete"])
def test_box_guidance_and_refinement_run_with_the_folders_own_sampler(tmp_path: Path, kind: str) -> None:
    base, bundle, pictures = with_folder(load_base(), write_folder(tmp_path, kind)), load_bundle(tiny_bundle_folder()), []
    layout = Layout(("<asset0>", "<asset1>"), (Box(0, 0, 0.5, 0.5), Box(0.5, 0, 1, 0.5)))
    with attach(base, bundle):
        for enabled in (True, False):
            config = synthesis_preset("toybox")
            guidance = replace(
                config.guidance,
                enabled=enabled,
                steps=2,
                max_iterations=1,
                loss_threshold=0.0,
                step_size_start=1e3,
                step_size_end=1e3,
            )  # a random model's maps are flat: small gradients
            config = replace(config, steps=5, scheduler="own", guidance=guidance)
            result = synthesize(base, "a photo of <asset0> and <asset1>", layout, bundle.tokens, config)
            assert [step for step, _, _ in result.guidance_history] == ([0, 1] if enabled else [])
            pictures.append(np.asarray(result.images[0]).astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() > 0.1, "guidance changes the picture"


# --- how many steps -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "limit"), [("ddim", 999), ("dpm", 999), ("unipc", 999)])
def test_more_steps_than_a_sampler_takes_are_refused_with_the_limit(tmp_path: Path, name: str, limit: int) -> None:
    own = read_scheduler(write_folder(tmp_path, "PNDM", steps_offset=1, clip_sample=False, set_alpha_to_one=False))
    check_steps(name, own, limit)
    for steps in (1000, 1001) if name == "ddim" else (1000,):
        with pytest.raises(InputError, match=f"--steps is {steps}.*at most {limit}"):
            check_steps(name, own, steps)


def test_the_first_number_of_steps_that_a_sampler_takes_is_said_too(toybox_random_base: BaseModel) -> None:
    pndm = diffusers.PNDMScheduler.from_config(toybox_random_base.scheduler.config)  # 'trailing' needs four steps
    with pytest.raises(InputError, match=r"--steps is 2.*at least 4"):
        check_steps("own", pndm, 2)


@pytest.mark.parametrize("command", ["synthesize", "variations", "evaluate", "edit"])
def test_commands_refuse_too_many_steps_before_anything_loads(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = copy_bundle(tmp_path)
    settings = tmp_path / "base"
    settings.mkdir()
    for part in tiny_base_folder().iterdir():
        if part.name != "scheduler":
            (settings / part.name).symlink_to(part)
    write_folder(settings, "PNDM")
    unet = "mifo.model.load_base.UNet2DConditionModel"
    monkeypatch.setattr(f"{unet}.from_pretrained", lambda *_, **__: pytest.fail("the UNet loads"))
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "photo.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    more = {
        "synthesize": ["--prompt", "a photo of <asset0>"],
        "variations": ["--asset", "0"],
        "evaluate": [],
        "edit": ["--prompt", "a photo of <asset0>", "--init-image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png"],
    }
    found = mifo(command, bundle, "--model-path", settings, "--steps", 1000, "--output-path", tmp_path / "out", *more[command],
                 exit_code=2)  # fmt: skip
    assert "at most 999" in " ".join(found.output.split())


def test_the_classes_that_are_tested_are_those_on_offer() -> None:
    assert {f"{kind}Scheduler" for kind in CLASSES} <= set(OWN_CLASSES)
