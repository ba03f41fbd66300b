"""Box-bounded attention (Bounded Attention, arXiv 2403.16990, section 4): each asset's tokens and pixels keep to its box."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from ..boxes import Layout
from ..prompts import BACKGROUND_TOKEN, TokenizedPrompt
from .compiled import is_compiled
from .groups import Groups, attention_in_groups, group_pixels
from .sites import Kernel, Processor, Site, attention_probabilities, attention_sites, kernel_of, use_processors


class StopForward(Exception):
    """Raised inside a forward pass when everything that was asked of it is recorded; the rest would be wasted."""


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass of the UNet is to bounded attention: its rows, and the maps that are kept of it."""

    images: int = 1
    unconditional: bool = True
    """Classifier-free guidance: as many unconditional rows stand before the conditional ones."""
    guiding: bool = False
    """A pass for box guidance, which compares places; otherwise one that draws."""
    recorded: tuple[Site, ...] = ()
    stop_when_recorded: bool = False
    """Ends the pass by `StopForward` once all of `recorded` are there."""

    def __post_init__(self) -> None:
        if self.guiding and self.unconditional:
            raise ValueError("a guidance pass has conditional rows alone")


@dataclass(frozen=True)
class Owners:
    """Whose adapter acts where."""

    adapters: int
    of_subjects: tuple[int, ...]
    """The adapter's number of each of the layout's assets."""
    background: int | None = None
    """Outside all boxes; by default none acts there."""

    @property
    def background_number(self) -> int:
        """-1 for none."""
        return -1 if self.background is None else self.background


class BoundedAttention:
    """Masks for every map size, built once each, and the maps that guidance and refinement ask for.

    `subjects` are the layout's assets, in its order. `sampling` is the pass that draws; `begin` says of any other pass what it
    is, and `end` gives its maps and goes back to `sampling`.

    With `own_text` each of several subjects has a text of its own: the prompt, read as if all its assets were that one. A text
    encoder mixes what stands in one prompt, and look-alikes blend in it before any attention mask can part them (this
    project's own; measured in scripts/results/toybench*.json). The keys of a sampling pass's cross-attention are the embeds
    of all `texts`, one behind another. A guidance pass reads the prompt alone: it is about places, which the one text compares.

    Without `bounded` nothing is masked, and boxes only guide. With `apart` subjects do not look at the background either, which
    they would otherwise continue.
    """

    def __init__(self, prompt: TokenizedPrompt, layout: Layout, latent_size: tuple[int, int], device: torch.device | str,
                 own_text: bool = False, bounded: bool = True, apart: bool = False,
                 sampling: ForwardPass = ForwardPass(), owners: Owners | None = None):  # fmt: skip
        # one subject's own text is the prompt, but where the background reads that without the subject's adapter
        self.own_text = own_text and (len(layout) > 1 or owners is not None)
        self.owners = owners
        self.bounded, self.apart, self.sampling = bounded, apart, sampling
        self._pass = sampling
        self.prompt, self.layout, self.latent_size, self.device = prompt, layout, latent_size, torch.device(device)
        self._asset_positions = [p for token, _ in layout for p in prompt.asset_positions[token]]
        self._refined: torch.Tensor | None = None  # (images, subjects, h, w) bool
        self._subjects: dict[tuple[int, int], torch.Tensor] = {}
        self._masks: dict[tuple[Any, ...], torch.Tensor] = {}
        self._groups: dict[tuple[int, int], tuple[Groups, ...]] = {}
        self._maps: dict[str, torch.Tensor] = {}
        self._gates: dict[tuple[Any, ...], torch.Tensor] = {}

    # --- subjects' pixels ---

    def subject_masks(self, size: tuple[int, int]) -> torch.Tensor:
        """Pixels of each subject at a map size: (images or 1, subjects, h*w) bool; from boxes, or refined.

        A refined mask that vanishes at a small size gives way to its box there.
        """
        if size not in self._subjects:
            masks = torch.from_numpy(self.box_masks(size))[None].to(self.device)
            if self._refined is not None:
                resized = (F.interpolate(self._refined.float(), size, mode="bilinear", antialias=True) >= 0.5).flatten(2)
                masks = torch.where(resized.any(2, keepdim=True), resized, masks)
            self._subjects[size] = masks
        return self._subjects[size]

    def box_masks(self, size: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """(subjects, h*w), from the boxes alone."""
        return np.stack([box.rasterize(*size).ravel() for _, box in self.layout])

    def refine(self, masks: torch.Tensor) -> None:
        """From now on (images, subjects, h, w) bool masks stand for the boxes."""
        self._refined = masks
        for made in (self._subjects, self._masks, self._groups, self._gates):
            made.clear()

    # --- texts ---

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of the prompt, and with `own_text` of each subject's own text: (1 or 1 + N, L)."""
        ids = list(self.prompt.input_ids)
        return [ids, *(self._speaking_of([word]) for word in self._words_of_subjects)] if self.own_text else [ids]

    @property
    def texts_of_others(self) -> list[list[int]]:
        """As `texts` with `own_text`, (1 + N, L), but each subject's speaks of the others where the prompt has an asset."""
        words = self._words_of_subjects
        return [list(self.prompt.input_ids), *(self._speaking_of(words[:k] + words[k + 1 :]) for k in range(len(words)))]

    @property
    def _words_of_subjects(self) -> list[int]:
        """Each subject's token id, (N,)."""
        return [self.prompt.input_ids[self.prompt.asset_positions[token][0]] for token, _ in self.layout]

    def _speaking_of(self, words: Sequence[int]) -> list[int]:
        """Token ids (L,) of the prompt with `words`, by turns, where it has an asset."""
        ids = list(self.prompt.input_ids)
        for turn, position in enumerate(self._asset_positions):
            ids[position] = words[turn % len(words)]
        return ids

    def subject_keys(self, index: int) -> list[int]:
        """The keys of cross-attention that are subject `index`'s own token, in the kind of pass that runs."""
        if self._reads_own:
            return [(1 + index) * len(self.prompt.input_ids) + p for p in self._asset_positions]
        return list(self.prompt.asset_positions[self.layout.tokens[index]])

    @property
    def _reads_own(self) -> bool:
        return self.own_text and not self._pass.guiding

    # --- what may see what ---

    def visible(self, site: Site) -> torch.Tensor | None:
        """Boolean mask for a site's map, (batch or 1, 1, h*w, keys): True where a query may see a key. Built once.

        None where nothing is masked.
        """
        if not self.bounded:
            return None
        size = site.map_size(*self.latent_size)
        key = (site.is_cross, size, self._pass.guiding, self._pass.unconditional, self._pass.images)
        if key not in self._masks:
            self._masks[key] = self._cross_mask(size) if site.is_cross else self._self_mask(size)
        return self._masks[key]

    def _cross_mask(self, size: tuple[int, int]) -> torch.Tensor:
        """Conditional half: an asset's token shows to its own box, function words to nobody, the end of the text to
        subjects only (it sums the subjects up). In guidance the background sees the assets, to be pushed away from them.
        With own texts, a subject reads its own and nothing else when sampling, and the background the prompt.
        """
        subjects = self.subject_masks(size)  # (I, N, h*w)
        background = ~subjects.any(1)  # (I, h*w)
        # the pixels that read each text, (I, h*w)
        readers = [background, *subjects.unbind(1)] if self._reads_own else [torch.ones_like(background)]
        mask = torch.cat([self._words(reader, background) for reader in readers], -1)  # (I, h*w, keys)
        mask[..., self._asset_positions] = False
        for index, subject in enumerate(subjects.unbind(1)):
            shown = subject | background if self._pass.guiding else subject
            mask[..., self.subject_keys(index)] = shown[..., None]
        if not self._pass.guiding:
            mask[..., self.prompt.end_position] &= ~background
        mask = mask[:, None].expand(self._pass.images, -1, -1, -1)  # (images, 1, h*w, keys)
        if not self._pass.unconditional:
            return mask
        if self.owners is None or not self._reads_own:
            return torch.cat([torch.ones_like(mask), mask])  # the unconditional half sees everything
        # its texts differ by the adapter with which they were read, so a pixel sees its own
        length = len(self.prompt.input_ids)
        own = torch.cat([reader[..., None].expand(-1, -1, length) for reader in readers], -1)
        return torch.cat([own[:, None].expand_as(mask), mask])

    def _words(self, readers: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        """One text's part of the mask, (I, h*w, L): its words for the pixels that read it, (I, h*w)."""
        mask = readers[..., None].repeat(1, 1, len(self.prompt.input_ids))
        mask[..., list(self.prompt.function_positions)] = False
        for position in self.prompt.asset_positions.get(BACKGROUND_TOKEN, ()):
            mask[..., position] &= background
        return mask

    def _self_mask(self, size: tuple[int, int]) -> torch.Tensor:
        """A subject's pixels see their own box and the background; the background sees all. Both halves alike.

        `apart` in sampling: in the conditional half they see their own box alone, and in the unconditional half everything, so
        that classifier-free guidance leads away from going on with the background.
        """
        subjects = self.subject_masks(size)
        background = ~subjects.any(1)
        apart = self.apart and not self._pass.guiding
        keys = torch.zeros_like(background) if apart else background
        mask = background[:, :, None] | keys[:, None, :]  # (I, h*w, h*w): 256 MiB for 1024 pixels, so nothing beside it
        for subject in subjects.unbind(1):
            mask |= subject[:, :, None] & subject[:, None, :]
        mask = mask[:, None]  # (I, 1, h*w, h*w)
        if apart and self._pass.unconditional:
            mask = mask.expand(self._pass.images, -1, -1, -1)
            return torch.cat([torch.ones_like(mask), mask])
        if len(mask) == 1:
            return mask
        return torch.cat([mask, mask]) if self._pass.unconditional else mask

    def groups(self, site: Site, elements: int) -> tuple[Groups, ...] | None:
        """Of the pixels of a self-attention map, to be used instead of `visible`: for all pictures, or for each of them;
        `elements` as in `Groups.saves_memory`.

        None where a mask is needed (halves differ), where nothing is bounded, or where groups do not pay.
        """
        if site.is_cross or not self.bounded or (self.apart and not self._pass.guiding):
            return None
        size = site.map_size(*self.latent_size)
        if size not in self._groups:
            self._groups[size] = tuple(group_pixels(masks).to(self.device) for masks in self.known_masks(size))
        found, with_gradient = self._groups[size], torch.is_grad_enabled()
        return found if all(g.saves_memory(elements // len(found), with_gradient) for g in found) else None

    def known_masks(self, size: tuple[int, int]) -> Iterable[npt.NDArray[np.bool_]]:
        """(subjects, h*w) for all pictures, or for each of them; from boxes without a look at the device."""
        return [self.box_masks(size)] if self._refined is None else self.subject_masks(size).cpu().numpy()

    # --- where adapters act ---

    def pixel_gates(self, size: tuple[int, int]) -> torch.Tensor:
        """(rows or 1, h*w, adapters) float: 1 on the pixels of an adapter's subjects; where they overlap the later one's.

        Raises ValueError where no subject has an adapter of its own.
        """
        key = ("pixels", size, self._pass.unconditional)
        if key not in self._gates:
            owners = self._known_owners()
            place = torch.full(self.subject_masks(size).shape[::2], owners.background_number, device=self.device)  # (I, h*w)
            for owner, subject in zip(owners.of_subjects, self.subject_masks(size).unbind(1), strict=True):
                place = torch.where(subject, owner, place)
            gates = (place[..., None] == torch.arange(owners.adapters, device=self.device)).float()
            self._gates[key] = torch.cat([gates, gates]) if len(gates) > 1 and self._pass.unconditional else gates
        return self._gates[key]

    def key_gates(self) -> torch.Tensor:
        """(keys, adapters) float, for the texts that the pass reads: each subject's own is its adapter's, the prompt the
        background's. In guidance, which reads the prompt alone, each asset's tokens are its adapter's; one adapter has all."""
        key = ("keys", self._reads_own)
        if key not in self._gates:
            owners, length = self._known_owners(), len(self.prompt.input_ids)
            numbers = torch.arange(owners.adapters, device=self.device)
            if self._reads_own:
                texts = torch.tensor([owners.background_number, *owners.of_subjects], device=self.device)
                gates = (texts.repeat_interleave(length)[:, None] == numbers).float()
            else:
                gates = (torch.tensor(self.prompt_owners, device=self.device)[:, None] == numbers).float()
            self._gates[key] = gates
        return self._gates[key]

    @property
    def prompt_owners(self) -> list[int]:
        """The adapter of each of the prompt's tokens in a guidance pass; one that there is not, for none."""
        owners = self._known_owners()
        if owners.adapters == 1:
            return [0] * len(self.prompt.input_ids)
        found = [owners.background_number] * len(self.prompt.input_ids)
        for owner, (token, _) in zip(owners.of_subjects, self.layout, strict=True):
            for position in self.prompt.asset_positions[token]:
                found[position] = owner
        return found

    def _known_owners(self) -> Owners:
        if self.owners is None:
            raise ValueError("no adapters act by place")
        return self.owners

    # --- passes ---

    def begin(self, forward_pass: ForwardPass) -> None:
        """The next forward pass is `forward_pass`."""
        self._pass, self._maps = forward_pass, {}

    def end(self) -> dict[str, torch.Tensor]:
        """The maps of the pass that `begin` announced, by site name; the next one draws. Of a guidance pass (batch, heads, h*w,
        keys), of another its conditional half's mean over heads, (images, h*w, keys)."""
        maps, self._maps, self._pass = self._maps, {}, self.sampling
        return maps

    @contextmanager
    def meanwhile(self, forward_pass: ForwardPass) -> Iterator[None]:
        """Within the block runs another pass, without an end to the one that runs, or to what is kept of it."""
        before = self._pass, self._maps
        self._pass, self._maps = forward_pass, {}
        try:
            yield
        finally:
            self._pass, self._maps = before

    def records(self, site: Site) -> bool:
        """Whether the pass that runs keeps the map of `site`."""
        return site in self._pass.recorded

    def note(self, site: Site, probabilities: torch.Tensor) -> None:
        """Keeps a map, (batch, heads, h*w, keys); of a pass that draws only what refinement asks for, which at 1024 pixels is a
        fortieth of it. Raises StopForward when it was the last that was asked for."""
        self.keep(site, probabilities if self._pass.guiding else _drawn_map(probabilities, self._pass.images))
        if self._pass.stop_when_recorded and len(self._maps) == len(self._pass.recorded):
            raise StopForward

    def keep(self, site: Site, kept: torch.Tensor) -> None:
        """A map as `end` gives it."""
        self._maps[site.name] = kept

    @property
    def forward_pass(self) -> ForwardPass:
        """The one that runs, or runs next."""
        return self._pass


def _drawn_map(probabilities: torch.Tensor, images: int) -> torch.Tensor:
    """(batch, heads, h*w, keys) -> (images, h*w, keys): the conditional half, which stands last, and its mean over heads."""
    return probabilities[-images:].mean(1)


class _FixedPass:
    """What a drawing pass is to one site, in plain values that compiled code can read: its mask, and whether its map is kept."""

    def __init__(self, visible: torch.Tensor | None, recorded: bool, images: int):
        self.visible, self.recorded, self.images = visible, recorded, images
        self.kept: torch.Tensor | None = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, kernel: Kernel) -> torch.Tensor:
        if not self.recorded:
            return kernel(query, key, value, self.visible, scale)
        probabilities = attention_probabilities(query, key, scale, self.visible)
        self.kept = _drawn_map(probabilities, self.images)
        return probabilities.to(value.dtype) @ value


class _BoundedProcessor(Processor):
    """Fused attention under the mask, or without one in groups; the map itself only where it is wanted."""

    def __init__(self, site: Site, control: BoundedAttention, kernel: Kernel):
        super().__init__(kernel)
        self.site, self.control = site, control
        self.fixed: _FixedPass | None = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        if self.fixed is not None:
            return self.fixed.attend(query, key, value, scale, self.kernel)
        recorded = self.control.records(self.site)
        if not recorded and (groups := self.control.groups(self.site, query.numel() // query.shape[2])):
            return attention_in_groups(query, key, value, groups, scale, self.kernel)
        visible = self.control.visible(self.site)
        if not recorded:
            return self.kernel(query, key, value, visible, scale)
        probabilities = attention_probabilities(query, key, scale, visible)
        self.control.note(self.site, probabilities)
        return probabilities.to(value.dtype) @ value


class _CompiledPasses:
    """Hooks around a UNet whose blocks are compiled: what its processors need of the pass that begins is fixed before it, and
    the maps that they kept are collected after it. A guidance pass runs uncompiled."""

    def __init__(self, control: BoundedAttention, processors: dict[str, _BoundedProcessor]):
        self.control, self.processors = control, processors
        torch.compiler.set_stance("default")

    def before(self, unet: Any, inputs: Any) -> None:
        running = self.control.forward_pass
        torch.compiler.set_stance("force_eager" if running.guiding else "default")
        for processor in self.processors.values():
            site = processor.site
            processor.fixed = None if running.guiding else _FixedPass(
                self.control.visible(site), self.control.records(site), running.images)  # fmt: skip

    def after(self, unet: Any, inputs: Any, output: Any) -> None:
        for processor in self.processors.values():
            if processor.fixed and processor.fixed.kept is not None:
                self.control.keep(processor.site, processor.fixed.kept)


@contextmanager
def bound_attention(unet: UNet2DConditionModel, control: BoundedAttention) -> Iterator[BoundedAttention]:
    """Within the block every attention layer obeys `control`, on the kernel that it has; afterwards the model is as it was."""
    processors = {s.name: _BoundedProcessor(s, control, kernel_of(unet, s)) for s in attention_sites(unet)}
    with use_processors(unet, processors):
        if not is_compiled(unet):
            yield control
            return
        passes = _CompiledPasses(control, processors)
        hooks = [unet.register_forward_pre_hook(passes.before), unet.register_forward_hook(passes.after)]
        try:
            yield control
        finally:
            torch.compiler.set_stance("default")
            for hook in hooks:
                hook.remove()
