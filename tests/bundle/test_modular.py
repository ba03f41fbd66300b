"""Box control inside diffusers' modular pipelines draws what mifo draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from _tiny import tiny_xl_bundle_folder, tiny_xl_folder
from diffusers import ClassifierFreeGuidance, EulerAncestralDiscreteScheduler, PerturbedAttentionGuidance

from mifo import api
from mifo.bundle.store import load_bundle
from mifo.config import GuidanceConfig, RefinementConfig, SynthesisConfig
from mifo.errors import InputError
from mifo.model.load_base import load_base_model
from mifo.sampling.denoise import initial_latents
from mifo.synthesis.modular import boxed_pipeline

PROMPT = "a photo of <asset0> and <asset1> at night"
BOXES = [[0.0, 0.2, 0.5, 0.7], [0.5, 0.3, 1.0, 0.9]]
CONTROL = SynthesisConfig(steps=4, guidance_scale=3.0, contrast_scale=0.7, refinement=RefinementConfig(levels=(2,)),
                          guidance=GuidanceConfig(steps=2, max_iterations=1, levels=(1, 2)))  # fmt: skip


@pytest.fixture(scope="module")
def pipeline() -> Any:
    base, bundle = load_base_model(str(tiny_xl_folder())), load_bundle(tiny_xl_bundle_folder())
    pipe = boxed_pipeline(bundle.to_pipeline(base))
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    return base, bundle, pipe


def drawn(pipe: Any, boxes: Any = BOXES, prompt: Any = PROMPT, generator: Any = None) -> np.ndarray:
    latents = initial_latents((pipe.unet.config.in_channels, 16, 16), 3, 1, "cpu")
    found: np.ndarray = pipe(prompt=prompt, boxes=boxes, control=CONTROL, num_inference_steps=4, latents=latents,
                             height=128, width=128, output_type="np", output="images",
                             generator=generator)[0]  # fmt: skip
    return found


def test_a_modular_pipeline_draws_what_mifo_draws(pipeline: Any) -> None:
    base, bundle, pipe = pipeline
    mine = np.asarray(api.synthesize(base, bundle, PROMPT, BOXES, seed=3, config=CONTROL).images[0], float) / 255
    assert np.abs(drawn(pipe) - mine).max() <= 0.5 / 255 + 1e-4  # mifo's is rounded to bytes
    assert np.abs(drawn(pipe, BOXES[::-1]) - mine).max() > 0.01  # the boxes do something
    plain = np.asarray(api.synthesize(base, bundle, PROMPT, None, seed=3, config=CONTROL).images[0], float) / 255
    assert np.abs(drawn(pipe, None) - plain).max() <= 0.5 / 255 + 1e-4


def test_what_it_cannot_draw_is_told(pipeline: Any) -> None:
    _, _, pipe = pipeline
    with pytest.raises(InputError, match="give a string"):
        drawn(pipe, prompt=[PROMPT, PROMPT])
    with pytest.raises(InputError, match="box"):
        drawn(pipe, boxes=[[0, 0, 2, 1], [0, 0, 1, 1]])
    with pytest.raises(InputError, match="the assets that exist are <asset0>, <asset1>"):
        drawn(pipe, prompt="a photo of <asset7> and <asset1>")
    usual = pipe.guider
    pipe.update_components(guider=PerturbedAttentionGuidance(perturbed_guidance_layers=["mid_block"]))
    with pytest.raises(InputError, match="ClassifierFreeGuidance"):
        drawn(pipe)
    pipe.update_components(guider=usual)


def test_a_sampler_that_adds_noise_draws_the_same_by_the_same_generator(pipeline: Any) -> None:
    _, _, pipe = pipeline
    usual = pipe.scheduler
    pipe.update_components(scheduler=EulerAncestralDiscreteScheduler.from_config(usual.config))
    first, again, other = (drawn(pipe, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    pipe.update_components(scheduler=usual)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
