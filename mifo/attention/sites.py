"""Attention sites of a UNet by module path and downsampling level, and lending processors to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from ..errors import InputError

LEVELS = (1, 2, 4, 8)
"""Downsampling levels: how many times smaller than the latents a map is, in each direction."""


@dataclass(frozen=True)
class Site:
    """One attention layer. `name` is its processor's key in `unet.attn_processors`."""

    name: str
    block: str  # "down_blocks.1", "mid_block" or "up_blocks.0"
    is_cross: bool
    halvings: int  # how often the latents were halved where this layer sits

    @property
    def level(self) -> int:
        """How many times smaller than the latents the map is: 1, 2, 4 or 8."""
        return 1 << self.halvings

    def map_size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """(height, width) of this site's map for latents of that size; odd sizes round up, as the UNet's strides do."""
        for _ in range(self.halvings):
            latent_height, latent_width = (latent_height + 1) // 2, (latent_width + 1) // 2
        return latent_height, latent_width


def attention_sites(unet: UNet2DConditionModel) -> list[Site]:
    """Every attention site in the order in which a forward pass calls them."""
    levels = len(unet.config["block_out_channels"])
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    sites = []
    for name in unet.attn_processors:
        parts = name.split(".")
        if parts[0] == "mid_block":
            block, halvings = "mid_block", levels - 1
        else:
            index = int(parts[1])
            block, halvings = f"{parts[0]}.{index}", index if parts[0] == "down_blocks" else levels - 1 - index
        sites.append(Site(name, block, ".attn2." in name, halvings))
    return sorted(sites, key=lambda s: (order[s.block.split(".")[0]], s.block))


def smallest_map(unet: UNet2DConditionModel, latent_height: int, latent_width: int) -> tuple[int, int]:
    """(height, width) of the UNet's coarsest attention map for latents of that size."""
    return min(site.map_size(latent_height, latent_width) for site in attention_sites(unet))


def levels_within(levels: tuple[int, ...], unet_levels: int) -> set[int]:
    """`levels` in a UNet that halves its latents `unet_levels` - 1 times: a coarser level stands for its coarsest.

    So one preset fits Stable Diffusion's four levels and the smaller UNets distilled from it. Raises InputError for a level
    that is not in LEVELS.
    """
    if unknown := [level for level in levels if level not in LEVELS]:
        raise InputError(f"attention levels {unknown} do not exist; choose from {', '.join(map(str, LEVELS))}, a map's size as "
                         "a part of the latents': 1 is as large, 8 an eighth")  # fmt: skip
    return {min(level, 2 ** (unet_levels - 1)) for level in levels}


def choose_sites(unet: UNet2DConditionModel, blocks: tuple[str, ...], levels: tuple[int, ...],
                 kinds: tuple[str, ...] = ("cross",)) -> list[Site]:  # fmt: skip
    """Sites in `blocks` (prefixes such as "up_blocks") at one of `levels`, as `levels_within` reads them.

    Raises InputError when the model has no such site: a loss over nothing would be silently zero.
    """
    wanted = levels_within(levels, len(unet.config["block_out_channels"]))
    there = [s for s in attention_sites(unet) if ("cross" if s.is_cross else "self") in kinds]
    chosen = [s for s in there if s.block.startswith(blocks) and s.level in wanted]
    if not chosen:
        found = ", ".join(f"{block} at level {level}" for block, level in sorted({(s.block, s.level) for s in there})) or "none"
        raise InputError(
            f"the base model has no {'/'.join(kinds)}-attention in {', '.join(blocks)} at level {', '.join(map(str, levels))} "
            f"(a map's size as a part of the latents'); it has {found}; use another base model"
        )
    return chosen


@contextmanager
def use_processors(unet: UNet2DConditionModel, processors: Mapping[str, Any]) -> Iterator[None]:
    """Lends `processors` (by site name) to the model; on leaving, the model has back exactly what it had."""
    modules = {name: unet.get_submodule(name.removesuffix(".processor")) for name in processors}
    before = {name: module.processor for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.processor = processors[name]
        yield
    finally:
        for name, module in modules.items():
            module.processor = before[name]


#: (query, key, value, visible, scale): (B, heads, Q, D), (B, heads, L, D) twice, a boolean mask that broadcasts to
#: (B, heads, Q, L) or None -> (B, heads, Q, D)
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float) -> torch.Tensor:
    """PyTorch's fused attention: no map is ever held in memory."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


class Processor:
    """The parts that every attention processor shares; subclasses say how queries meet keys in `attend`."""

    def __init__(self, kernel: Kernel = sdpa):
        self.kernel = kernel

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """(B, H*W, C) -> (B, H*W, C). Without `encoder_hidden_states` this is self-attention."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states  # (B, L, C')
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, H*W or L, C / heads)
            for x in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        out = self.attend(query, key, value, attn.scale).transpose(1, 2).flatten(2).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + hidden_states
        scaled: torch.Tensor = out / attn.rescale_output_factor
        return scaled

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """(B, heads, H*W, D) x 2 (B, heads, L, D) -> (B, heads, H*W, D). Fused: no map is ever held in memory."""
        return self.kernel(query, key, value, None, scale)


def kernel_of(unet: UNet2DConditionModel, site: Site) -> Kernel:
    """The kernel on which a layer computes: that of its processor, or SDPA, as diffusers' own do."""
    processor = unet.get_submodule(site.name.removesuffix(".processor")).processor
    return processor.kernel if isinstance(processor, Processor) else sdpa


def attention_probabilities(query: torch.Tensor, key: torch.Tensor, scale: float,
                            visible: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    """The map itself, (B, heads, H*W, L), softmax in fp32. `visible` is a boolean mask that broadcasts to it.

    Queries are scaled before they meet keys: Stable Diffusion 2's raw scores do not fit into fp16.
    """
    scores = ((query * scale) @ key.transpose(-1, -2)).float()
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1)
