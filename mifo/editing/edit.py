"""Editing by example: a learned asset, or plain words, into the masked part of a picture (Blended Latent Diffusion,
arXiv 2206.02779, with the learned assets of Break-A-Scene, arXiv 2305.16311, section 5).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ..attention.bounded import BoundedAttention, ForwardPass
from ..attention.sites import smallest_map
from ..boxes import Box, Layout, mask_box
from ..config import EditConfig, to_dict
from ..data.mask_file import Island, islands_in_words, without_islands
from ..errors import InputError
from ..io.sheets import pixels_to_tensor
from ..io.threads import one_thread_an_operation
from ..model.base import BaseModel
from ..model.finite import check_pixels
from ..model.peak_memory import PeakMemory
from ..prompts import NEGATIVE, TokenizedPrompt, assets_in, check_prompt, tokenize_prompt
from ..sampling.denoise import denoise, initial_latents, is_guided
from ..sampling.guidance import LatentGuidance
from ..sampling.layout_control import check_boxes, controlled, owners_of, read_texts
from .blending import Blending, clone, paste, paste_around, tune_to_source
from .frame import BoolArray, EditFrame, latent_mask, make_frame, shrinking_masks, thickness
from .hooks import EditHooks
from .ranking import asset_similarity, best_first, prompt_similarity

FloatPixels = npt.NDArray[np.float32]
WORDS = "words"  # stands for the content words of a prompt without assets, where attention asks for an asset's token


@dataclass(frozen=True)
class Candidate:
    """One edit, at the model's resolution."""

    canvas: FloatPixels
    """(R, R, 3), 0 .. 255"""
    seed: int
    scores: dict[str, float]
    """'asset' and 'prompt', as `ranking` measures them."""


@dataclass(frozen=True)
class Edit:
    """Candidates, best first, and all that made them."""

    image: Image.Image
    mask: BoolArray
    """(H, W), without its tiny islands."""
    frame: EditFrame
    canvas: npt.NDArray[np.uint8]
    """The picture's own part around the mask, (R, R, 3)."""
    candidates: list[Candidate]
    latent_pixel: float
    """Pixels of the picture along one latent pixel."""
    prompt: str
    layout: Layout | None
    """On the canvas."""
    config: EditConfig
    seed: int
    seconds: float
    peak_gib: float
    notes: tuple[str, ...]

    def edited_image(self, index: int) -> Image.Image:
        """Candidate `index` in the whole picture, at the picture's own size. Made when asked for: photos are large."""
        left, top, right, bottom = self.frame.crop
        whole = np.array(self.image)
        source, mask = whole[top:bottom, left:right], self.mask[top:bottom, left:right]
        drawn = self.frame.from_canvas(self.candidates[index].canvas)
        softness = self.latent_pixel / 2  # what one latent pixel decodes to reaches about this far beyond the mask
        if self.config.background == "pixel":
            part = paste(source, drawn, mask, softness)
        elif self.config.background == "poisson":
            part = clone(source, drawn, mask)
        elif self.config.background == "optimization":
            change = self.frame.from_canvas(self.candidates[index].canvas - self.canvas)
            part = paste_around(source, drawn, change, mask, softness)
        else:
            part = np.rint(drawn).clip(0, 255).astype(np.uint8)
        whole[top:bottom, left:right] = part
        return Image.fromarray(whole)

    def recipe(self) -> dict[str, Any]:
        """Everything needed to make the candidates again, besides the picture and the mask."""
        return {
            "prompt": self.prompt,
            "boxes_in_crop": self.layout.to_json() if self.layout else None,
            "crop": list(self.frame.crop),
            "seed": self.seed,
            "batch_size": len(self.candidates),
            "config": to_dict(self.config),
        }


@dataclass(frozen=True)
class EditRequest:
    """What to draw, and where."""

    image: Image.Image
    """RGB"""
    mask: BoolArray
    """(H, W), True where the picture may change"""
    prompt: str
    tokens: Sequence[str] = ()
    """The assets that exist."""
    layout: Layout | None = None
    """A box per asset of the prompt, in fractions of the whole picture; one asset alone takes the mask's box."""
    crops: Mapping[str, Image.Image] = field(default_factory=dict)
    """The assets' own pictures (RGBA), to rank by."""


def edit(base: BaseModel, request: EditRequest, config: EditConfig, seed: int = 0, count: int = 1,
         on_progress: Callable[[int, int], None] | None = None) -> Edit:  # fmt: skip
    """Draws `count` candidates of the request's prompt into its masked part, and ranks them; candidate k has seed `seed + k`.

    With `config.bounded` an asset keeps to its box, and the content words of a prompt without assets keep to the mask.
    A mask's tiny islands far from its body are left out, and noted.
    Raises InputError for a prompt that the model cannot take, assets without boxes, and a mask below one latent pixel.
    """
    started = time.monotonic()
    prompt, tokens = request.prompt, request.tokens
    check_prompt(prompt, tokens)
    check_prompt(config.negative_prompt, tokens, NEGATIVE)
    base.check_steps("ddim", config.steps)
    scene = _prepare(base, request, config)
    side = base.native_latents
    source = base.encode(pixels_to_tensor(Image.fromarray(scene.canvas)))[0]  # (1, C, h, w)
    noise = initial_latents((source.shape[1], side, side), seed, count, base.device)

    assets = [t for t in tokens if t in prompt.lower()]
    tokenized = tokenize_prompt(base.tokenizer, prompt, assets)
    negative = tokenize_prompt(base.tokenizer, config.negative_prompt, [], NEGATIVE)
    control = _control(base, scene, tokenized, config, count)
    texts = read_texts(base, control, tokenized.input_ids, negative.input_ids)
    of_prompt, of_nothing = (s.first_tokens(len(tokenized.input_ids)) for s in (texts.prompt, texts.negative))
    guidance = LatentGuidance(base.unet, control, config.guidance, texts.guiding) if control else None
    scheduler = base.sampler("ddim")
    scheduler.set_timesteps(config.steps, device=noise.device)
    masks = tuple(torch.from_numpy(m).to(noise.device) for m in scene.masks)
    blending = Blending(scheduler, scheduler.timesteps[scene.first_step :], source.expand_as(noise), noise, masks)
    hooks = EditHooks(blending, guidance, control if scene.layout is None else None)
    with PeakMemory(base.device) as peak, one_thread_an_operation(base.is_small):
        with controlled(base, control):
            start = hooks.start(from_image=config.start == "image")
            latents = denoise(base.unet, scheduler, start, texts.prompt, texts.negative, config.steps,
                              config.guidance_scale, hooks.before_step, hooks.after_step, on_progress,
                              scene.first_step)  # fmt: skip
        closeness = prompt_similarity(base.unet, scheduler, latents, masks[-1], of_prompt, of_nothing)
        coverage = scene.frame.coverage(scene.mask, base.resolution)
        drawn = _decode(base, latents, scene.canvas, coverage >= 0.5, config)
    regions = _asset_regions(scene.layout, coverage > 0)
    candidates = []
    for k, pixels in enumerate(drawn):
        scores = {"prompt": closeness[k]}
        own = [asset_similarity(np.rint(pixels).astype(np.uint8), region, request.crops[token])
               for token, region in regions.items() if token in request.crops]  # fmt: skip
        if own:
            scores["asset"] = float(np.mean(own))
        candidates.append(Candidate(pixels, seed + k, scores))
    ranked = [candidates[k] for k in best_first([c.scores for c in candidates])]
    return Edit(request.image, scene.mask, scene.frame, scene.canvas, ranked, scene.frame.side / side, prompt, scene.layout,
                config, seed, time.monotonic() - started, peak.gib, _notes(scene, config))  # fmt: skip


@dataclass(frozen=True)
class EditScene:
    """Where an edit happens, before anything is drawn."""

    mask: BoolArray
    """(H, W), without its tiny islands"""
    islands: tuple[Island, ...]
    frame: EditFrame
    canvas: npt.NDArray[np.uint8]
    """The image's own part around the mask, (R, R, 3)"""
    inside: BoolArray
    """The mask at the latents' size, (h, w)"""
    mask_at: Box
    """Around the mask where it is widest, on the canvas"""
    first_step: int
    """Of the schedule; the steps before it are left out."""
    masks: tuple[BoolArray, ...]
    """`inside`, widened at first: one a step, and one after the last"""
    layout: Layout | None
    """A box per asset of the prompt, on the canvas"""


def _prepare(base: BaseModel, request: EditRequest, config: EditConfig) -> EditScene:
    mask, islands = without_islands(request.mask)
    frame = make_frame(mask, base.resolution)
    inside = latent_mask(frame, mask, base.native_latents)
    first_step = min(int(config.steps * config.blending_start_percentage), config.steps - 1)
    masks = tuple(shrinking_masks(inside, config.mask_dilation, config.steps - first_step + 1))
    widest = _mask_on_canvas(frame, mask, config.mask_dilation / base.native_latents)
    alone = _made_visible(base, _inset(widest, config.box_inset))
    on_canvas = _layout_on_canvas(base, request.prompt, frame, request.image.size, alone, request.layout)
    mask_at = _made_visible(base, widest)
    return EditScene(mask, islands, frame, frame.to_canvas(request.image), inside, mask_at, first_step, masks, on_canvas)


def _control(base: BaseModel, scene: EditScene, prompt: TokenizedPrompt, config: EditConfig,
             count: int) -> BoundedAttention | None:  # fmt: skip
    """Assets keep to their boxes, and the content words of a prompt without assets to the mask; None where nothing is bound."""
    bound = scene.layout
    if config.bounded and bound is None and (words := _as_one_subject(prompt)):
        prompt, bound = words, Layout((WORDS,), (scene.mask_at,))
    if bound is None or not config.bounded:
        return None
    # words that are to fill a thin mask would fill it with its surroundings, if they looked at them
    apart = scene.layout is None and config.mask_dilation > 0
    owners = owners_of(base, bound) if scene.layout else None
    return BoundedAttention(prompt, bound, (base.native_latents, base.native_latents), base.device,
                            config.own_text or owners is not None, apart=apart, owners=owners,
                            sampling=ForwardPass(count, unconditional=is_guided(config.guidance_scale)))  # fmt: skip


def _layout_on_canvas(base: BaseModel, prompt: str, frame: EditFrame, size: tuple[int, int], alone: Box,
                      layout: Layout | None) -> Layout | None:  # fmt: skip
    """A box per asset of the prompt on the canvas; None without assets. `alone`: of one asset without `layout`."""
    assets = assets_in(prompt)
    if layout is None and len(assets) > 1:
        raise InputError(
            f"the prompt has {', '.join(assets)}: say with --boxes where in the picture each of them stands, or name only the "
            "one that goes into the mask"
        )
    if not assets:
        return None
    if layout is None:
        return Layout((assets[0],), (alone,))
    boxes = []
    for token, box in layout:
        placed = frame.box_on_canvas(box, *size)
        if placed is None:
            raise InputError(f"the box of {token} is too far from the mask to play a part; leave {token} out of the prompt")
        boxes.append(placed)
    result = Layout(layout.tokens, tuple(boxes))
    check_boxes(base, result, (base.native_latents, base.native_latents))
    return result


def _mask_on_canvas(frame: EditFrame, mask: BoolArray, grown: float) -> Box:
    """The box around the mask, and `grown` of the canvas more at each side."""
    height, width = mask.shape
    box = frame.box_on_canvas(mask_box(mask), width, height)
    assert box  # the crop is around the mask
    return Box(max(box.x0 - grown, 0), max(box.y0 - grown, 0), min(box.x1 + grown, 1), min(box.y1 + grown, 1))


def _inset(box: Box, share: float) -> Box:
    """Smaller at each side by that share of its longer side, and by no more than a quarter of the side that shrinks."""
    width, height = box.x1 - box.x0, box.y1 - box.y0
    across, down = (min(share * max(width, height), side / 4) for side in (width, height))
    return Box(box.x0 + across, box.y0 + down, box.x1 - across, box.y1 - down)


def _made_visible(base: BaseModel, box: Box) -> Box:
    """As large as the model's smallest attention map needs to show it; no larger: what is drawn beyond the mask is cut away."""
    side = base.native_latents
    return box.made_visible(*smallest_map(base.unet, side, side))


def _as_one_subject(prompt: TokenizedPrompt) -> TokenizedPrompt | None:
    """The prompt with all its content words as one subject's token; None without such words, or with assets: they are subjects.

    `<background>` is what stands outside of boxes, and cannot be bound to one.
    """
    content = tuple(i for i in range(1, prompt.end_position) if i not in prompt.function_positions)
    return replace(prompt, asset_positions={WORDS: content}) if content and not prompt.asset_positions else None


def _decode(base: BaseModel, latents: torch.Tensor, canvas: npt.NDArray[np.uint8], inside: BoolArray,
            config: EditConfig) -> list[FloatPixels]:  # fmt: skip
    """(R, R, 3), 0 .. 255, for each candidate."""
    with torch.no_grad():
        pixels = base.decode(latents)
    if config.background == "optimization":
        source = pixels_to_tensor(Image.fromarray(canvas)).to(base.device)
        mask = torch.from_numpy(inside).float()[None, None].to(base.device)
        with base.lend_vae() as vae:
            tuned = [tune_to_source(vae, row, source, mask, config.reconstruction_steps, config.optimize)
                     for row in latents.split(1)]  # fmt: skip
        pixels = torch.cat(tuned)
        check_pixels(pixels, base.parts)
    return [p.permute(1, 2, 0).cpu().numpy() * 255 for p in pixels.float()]


def _asset_regions(layout: Layout | None, inside: BoolArray) -> dict[str, BoolArray]:
    """Where each asset of the prompt should be seen: the masked part of its box, if it has one."""
    regions = {token: inside & box.rasterize(*inside.shape) for token, box in layout or ()}
    return {token: region for token, region in regions.items() if region.any()}


def _notes(scene: EditScene, config: EditConfig) -> tuple[str, ...]:
    notes, frame, inside = [], scene.frame, scene.inside
    if scene.islands:
        notes.append(f"the mask has {islands_in_words(scene.islands)}; what is there is not edited")
    if frame.scale < 1 / 1.5:
        notes.append(
            f"the edit is drawn at {frame.resolution}x{frame.resolution} pixels and enlarged {1 / frame.scale:.1f} times to fit"
        )
    if thickness(inside) <= 3 and not config.mask_dilation:
        notes.append(f"the mask is {thickness(inside)} latent pixels wide at its widest; --mask-dilation 4 helps thin masks")
    return tuple(notes)
