"""Records cross-attention maps for the learning losses, at the chosen sites only."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel

from .sites import Processor, Site, attention_probabilities, use_processors


class AttentionRecorder(threading.local):
    """Maps of the last forward pass of a thread by site name, mean over heads: (B, H*W, L).

    With gradient checkpointing the processors run again inside `backward()`; `take()` closes the book before that, so a
    recomputation neither overwrites a map nor keeps it alive.
    """

    def __init__(self) -> None:
        self._maps: dict[str, torch.Tensor] = {}
        self._open = False

    def open(self) -> None:
        """Start recording; call before the forward pass."""
        self._maps, self._open = {}, True

    def take(self) -> dict[str, torch.Tensor]:
        """The maps since `open()`, handed over and forgotten. Call after the forward pass and before `backward()`."""
        maps, self._maps, self._open = self._maps, {}, False
        return maps

    def note(self, site_name: str, probabilities: torch.Tensor) -> None:
        if self._open:
            self._maps[site_name] = probabilities.mean(1)


class RecordingProcessor(Processor):
    """Materialises the map of one site and hands it to the recorder."""

    def __init__(self, site_name: str, recorder: AttentionRecorder):
        super().__init__()
        self.site_name, self.recorder = site_name, recorder

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        probabilities = attention_probabilities(query, key, scale)  # (B, heads, H*W, L)
        self.recorder.note(self.site_name, probabilities)
        return probabilities.to(value.dtype) @ value


@contextmanager
def record_attention(unet: UNet2DConditionModel, sites: Sequence[Site]) -> Iterator[AttentionRecorder]:
    """Within the block, the recorder keeps the maps of `sites`; every other site keeps the model's fused attention."""
    recorder = AttentionRecorder()
    with use_processors(unet, {s.name: RecordingProcessor(s.name, recorder) for s in sites}):
        yield recorder


def token_maps(maps: dict[str, torch.Tensor], sites: Sequence[Site], positions: Sequence[int], row: int,
               latent_size: tuple[int, int]) -> list[torch.Tensor]:  # fmt: skip
    """One token's maps, one per site, each (h, w): the mean over `positions` of batch row `row`."""
    found = []
    for site in sites:
        height, width = site.map_size(*latent_size)
        found.append(maps[site.name][row, :, list(positions)].mean(-1).view(height, width))
    return found
