"""Synthesis: a prompt, and a box per asset -> pictures (method: MIFO section 3.3, Bounded Attention section 4)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..boxes import Layout
from ..config import SynthesisConfig, to_dict
from ..io.files import write_folder
from ..io.json_text import record_text
from ..io.sheets import caption_below, draw_boxes, save_sheets, thumbnail, to_images
from ..io.threads import one_thread_an_operation
from ..model.base import BaseModel
from ..model.peak_memory import PeakMemory
from ..model.prompt_embeds import ImageSize
from ..prompts import NEGATIVE, check_prompt, tokenize_prompt
from ..sampling.contrast import make_contrast
from ..sampling.denoise import denoise, seeded_noise
from ..sampling.layout_control import LayoutHooks, check_boxes, controlled, latent_shape, layout_control, read_texts


@dataclass(frozen=True)
class Synthesis:
    """Pictures and all that made them. Picture k has seed `seed + k`."""

    images: list[Image.Image]
    prompt: str
    layout: Layout | None
    config: SynthesisConfig
    seed: int
    seconds: float
    peak_gib: float
    """As `memory.PeakMemory` counts it while the pictures are drawn: on a GPU its own, on a CPU the process's."""
    guidance_history: list[tuple[int, int, float]] = field(default_factory=list)
    """(step, iteration, mean normalized loss)"""

    def recipe(self) -> dict[str, Any]:
        """Everything needed to make the pictures again."""
        return {
            "prompt": self.prompt,
            "boxes": self.layout.to_json() if self.layout else None,
            "seed": self.seed,
            "batch_size": len(self.images),
            "config": to_dict(self.config),
        }


def synthesize(base: BaseModel, prompt: str, layout: Layout | None, tokens: Sequence[str], config: SynthesisConfig,
               seed: int = 0, count: int = 1, on_progress: Callable[[int, int], None] | None = None) -> Synthesis:  # fmt: skip
    """Draws `count` pictures of `prompt`; assets of `layout` stay in their boxes. `tokens`: the assets that exist.

    Raises InputError for a prompt, a size or a number of steps that cannot be, or a box that vanishes at the smallest map.
    """
    started = time.monotonic()
    check_prompt(prompt, tokens)
    check_prompt(config.negative_prompt, tokens, NEGATIVE)
    latent_size = latent_shape(base, config)
    base.check_steps(config.scheduler, config.steps, config.timestep_spacing)
    assets = [t for t in tokens if t in prompt.lower()]
    tokenized = tokenize_prompt(base.tokenizer, prompt, assets)
    negative = tokenize_prompt(base.tokenizer, config.negative_prompt, [], NEGATIVE)
    if layout:
        check_boxes(base, layout, latent_size)
    control = layout_control(base, config, tokenized, layout, latent_size, count)
    pixels = (latent_size[0] * base.vae_factor, latent_size[1] * base.vae_factor)
    size = ImageSize(pixels, pixels)
    texts = read_texts(base, control, tokenized.input_ids, negative.input_ids, size)
    channels = int(base.unet.config["in_channels"])
    latents, generators = seeded_noise((channels, *latent_size), seed, count, base.device)
    run = LayoutHooks(base, config, control, texts.guiding)
    contrast = make_contrast(base, config, control, negative.input_ids, size)
    with PeakMemory(base.device) as peak, one_thread_an_operation(base.is_small):
        with controlled(base, control):
            sampler = base.sampler(config.scheduler, config.timestep_spacing)
            latents = denoise(base.unet, sampler, latents, texts.prompt, texts.negative, config.steps,
                              config.guidance_scale, run.before_step, run.after_step, on_progress,
                              generators=generators, add_noise=contrast)  # fmt: skip
        with torch.no_grad():
            images = to_images(base.decode(latents))
    history = run.guidance.history if run.guidance else []
    return Synthesis(images, prompt, layout, config, seed, time.monotonic() - started, peak.gib, history)


# --- files --------------------------------------------------------------------------------------


KIND = "synthesis"  # of its manifest


def save_synthesis(result: Synthesis, output: Path, facts: dict[str, Any] | None = None, overwrite: bool = False) -> list[Path]:
    """PNG per picture (the recipe in its metadata), contact sheets with the boxes drawn, `synthesis.json`.

    The folder appears whole, or not at all. Raises InputError when it cannot be written or has anything in it; with
    `overwrite` an earlier synthesis is replaced.
    """
    recipe = {**result.recipe(), **(facts or {})}
    names = [f"{result.seed + k:06d}.png" for k in range(len(result.images))]
    record = {**recipe, "images": names, "seconds": round(result.seconds, 2), "peak_gib": round(result.peak_gib, 3),
              "guidance_history": result.guidance_history}  # fmt: skip
    with write_folder(output, KIND, overwrite) as temporary:
        for k, (name, image) in enumerate(zip(names, result.images, strict=True)):
            info = PngInfo()
            info.add_text("mifo", record_text({**recipe, "seed": result.seed + k, "batch_size": 1}))
            image.save(temporary / name, "PNG", pnginfo=info)
        save_sheets(temporary, _cells(result), columns=4)
        (temporary / "synthesis.json").write_text(record_text(record, indent=2) + "\n")
    return [output / name for name in names]


def _cells(result: Synthesis) -> Iterator[Image.Image]:
    """All pictures with their seeds, the boxes drawn over them."""
    for k, image in enumerate(result.images):
        large = thumbnail(image)
        yield caption_below(draw_boxes(large, result.layout) if result.layout else large, f"seed {result.seed + k}")
