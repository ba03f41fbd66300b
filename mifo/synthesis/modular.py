"""Box control as a block of diffusers' modular pipelines for Stable Diffusion XL, for programs that build on those."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, ClassifierFreeGuidance, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.modular_pipelines import ModularPipelineBlocks, StableDiffusionXLAutoBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..boxes import Layout, layout_of
from ..errors import InputError
from ..model.base import BaseModel
from ..model.prompt_embeds import ImageSize
from ..presets import synthesis_preset
from ..prompts import NEGATIVE, assets_in, check_prompt, tokenize_prompt
from ..sampling.contrast import make_contrast
from ..sampling.denoise import denoise
from ..sampling.layout_control import LayoutHooks, check_boxes, controlled, layout_control, read_texts


def boxed_blocks() -> Any:
    """The blocks of Stable Diffusion XL with `BoxedDenoise` as their denoising step: they take `boxes` beside `prompt`."""
    blocks = StableDiffusionXLAutoBlocks()
    blocks.sub_blocks["denoise"].sub_blocks["denoise"] = BoxedDenoise()
    return blocks


def boxed_pipeline(pipe: Any) -> Any:
    """A modular pipeline with those blocks and the parts of `pipe`, a `StableDiffusionXLPipeline` such as `Bundle.to_pipeline`
    makes: `boxed(prompt=..., boxes=..., output="images")`."""
    made = boxed_blocks().init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name in made.components and part is not None}
    made.update_components(**parts, force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt)
    return made


class BoxedDenoise(ModularPipelineBlocks):  # type: ignore[misc]
    """Denoises with each asset kept to its box, as `mifo.synthesize` does, by the pipeline's own scheduler and guidance scale."""

    model_name = "stable-diffusion-xl"

    description = "Denoises latents with each asset of the prompt kept to its box (Bounded Attention, arXiv 2403.16990)."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "scheduler": EulerDiscreteScheduler,
                 "tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "text_encoder": CLIPTextModel,
                 "text_encoder_2": CLIPTextModelWithProjection}  # fmt: skip
        return [*(ComponentSpec(name, kind) for name, kind in kinds.items()),
                ComponentSpec("guider", ClassifierFreeGuidance, default_creation_method="from_config")]  # fmt: skip

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("prompt", required=True, description="One prompt, which names assets: <asset0>, ..."),
            InputParam("boxes", description="[x0, y0, x1, y1] from 0 to 1, one per asset in the prompt's order, or by token; "
                       "without any the prompt is drawn as it is"),
            InputParam("control", description="A mifo.config.SynthesisConfig; its steps and guidance scale are not used"),
            InputParam("negative_prompt"), InputParam("generator"),
            InputParam("latents", required=True, type_hint=torch.Tensor, description="(B, C, h, w) noise"),
            InputParam("num_inference_steps", required=True, type_hint=int),
        ]  # fmt: skip

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("latents", type_hint=torch.Tensor, description="The denoised latents")]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        asked, guider = self.get_block_state(state), components.guider
        if not isinstance(asked.prompt, str):
            raise InputError(f"boxes belong to one prompt, not to {type(asked.prompt).__name__}; give a string")
        if not isinstance(guider, ClassifierFreeGuidance):
            raise InputError(f"the guider is {type(guider).__name__}; boxes need diffusers' ClassifierFreeGuidance")
        base = BaseModel("pipeline", "pipeline", None, "", components.tokenizer, components.text_encoder, components.vae,
                         components.unet, components.scheduler, text_encoder_2=components.text_encoder_2,
                         padding_2=components.tokenizer_2.pad_token_id,
                         zero_negative=bool(components.config.force_zeros_for_empty_prompt))  # fmt: skip
        assets, latents = assets_in(asked.prompt), asked.latents
        check_prompt(asked.prompt, assets_in(" ".join(base.tokenizer.get_added_vocab())))
        config = replace(asked.control or synthesis_preset("sdxl"), guidance_scale=float(guider.guidance_scale))
        tokenized = tokenize_prompt(base.tokenizer, asked.prompt, assets)
        negative = tokenize_prompt(base.tokenizer, asked.negative_prompt or "", [], NEGATIVE)
        layout, size = layout_of(asked.boxes, assets), (latents.shape[-2], latents.shape[-1])
        check_boxes(base, layout or Layout((), ()), size)
        control = layout_control(base, config, tokenized, layout, size, len(latents))
        pixels = (size[0] * base.vae_factor, size[1] * base.vae_factor)
        texts = read_texts(base, control, tokenized.input_ids, negative.input_ids, ImageSize(pixels, pixels))
        hooks = LayoutHooks(base, config, control, texts.guiding)
        contrast = make_contrast(base, config, control, negative.input_ids, ImageSize(pixels, pixels))
        generators = [asked.generator] * len(latents) if isinstance(asked.generator, torch.Generator) else asked.generator
        scheduler = components.scheduler  # the block before has scaled its noise already
        with controlled(base, control):
            asked.latents = denoise(base.unet, scheduler, latents / scheduler.init_noise_sigma, texts.prompt, texts.negative,
                                    asked.num_inference_steps, config.guidance_scale, hooks.before_step,
                                    hooks.after_step, generators=generators or (),
                                    add_noise=contrast)  # fmt: skip
        self.set_block_state(state, asked)
        return components, state
