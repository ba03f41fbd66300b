"""LoRA that acts in places: every adapter's change of a layer is added where that adapter's things are, and nowhere else.

All adapters of a layer are computed together, as one of the summed rank, whose columns are switched on and off by place:

    y = W x + B (gate * A x)        A, B of all adapters stacked; gate 0 or the adapter's scale, by pixel or by token
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError
from .lora import AGAIN, LORA_WEIGHTS, Adapter, lend_adapter

PREFIX = "base_model.model."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
TEXT_LAYERS = ("attn2.to_k", "attn2.to_v")
"""Layers of the UNet whose input is the text."""


class Gates(Protocol):
    """Where the adapters act in the forward pass that runs."""

    latent_size: tuple[int, int]

    def pixel_gates(self, size: tuple[int, int]) -> torch.Tensor:
        """(rows or 1, h*w, adapters), 1 where the adapter acts."""

    def key_gates(self) -> torch.Tensor:
        """(keys, adapters) of cross-attention's text."""


@dataclass(frozen=True)
class LentBundle:
    """What one bundle adds: adapters by the base model's parts, and where they were read, for messages."""

    name: str
    folder: Path
    unet: Adapter | None
    texts: Mapping[str, Adapter]
    """By the text encoder's part of the base model."""


@dataclass(frozen=True)
class _Layer:
    """The adapters of one layer, their ranks stacked to R."""

    name: str
    module: nn.Module
    down: torch.Tensor
    """(R, in), or of a convolution (R, in, k, k); fp32"""
    up: torch.Tensor
    """(out, R), or (out, R, 1, 1); fp32, times each adapter's scale"""
    owner: torch.Tensor
    """(R,): the adapter's number of each rank"""


class LocalLora:
    """The UNet's adapters of several bundles, by place; and each one's text encoders, lent while its own texts are read.

    Make it with `lend_by_place`; it acts within `bound_to`.
    """

    def __init__(self, parts: Mapping[str, Any], bundles: Sequence[LentBundle], owners: Mapping[str, int],
                 background: int | None, scale: float):  # fmt: skip
        """`owners`: asset token -> number of its bundle. `background`: the bundle whose adapter acts outside all boxes."""
        self.parts, self.bundles, self.owners, self.background, self.scale = parts, bundles, owners, background, scale
        self.layers = self._stack(parts["unet"])
        self._gates: Gates | None = None

    def _stack(self, unet: Any) -> list[_Layer]:
        """Raises InputError for weights that are not this UNet's layers', or that nothing here would use."""
        found: dict[str, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        for owner, bundle in enumerate(self.bundles):
            if bundle.unet is None:
                continue
            weights, strength = bundle.unet.weights, self.scale * bundle.unet.config.lora_alpha / bundle.unet.config.r
            names = {key.removeprefix(PREFIX).removesuffix(DOWN).removesuffix(UP) for key in weights}
            if len(weights) != 2 * len(names):
                raise _misfit(bundle, "a layer's two matrices are not both there, or there is more")
            for name in sorted(names):
                down, up = (weights.get(f"{PREFIX}{name}{end}") for end in (DOWN, UP))
                module = _find(unet, name)
                if module is None or down is None or up is None or not _fits(module, down, up):
                    raise _misfit(bundle, name)
                if "time_emb" in name:
                    raise InputError(f"the bundle '{bundle.name}' changes how the model reads the time ({name}), which has no "
                                     "place in a picture; use it alone")  # fmt: skip
                found.setdefault(name, []).append((owner, down.float(), up.float() * strength))
        device = unet.conv_in.weight.device
        return [_Layer(name, unet.get_submodule(name), torch.cat([down for _, down, _ in each]).to(device),
                       torch.cat([up for *_, up in each], 1).to(device),
                       torch.tensor([owner for owner, down, _ in each for _ in down], device=device))
                for name, each in found.items()]  # fmt: skip

    def owners_of(self, tokens: Sequence[str]) -> tuple[int, ...]:
        """The bundle's number of each asset."""
        return tuple(self.owners[token] for token in tokens)

    @contextmanager
    def reading_as(self, owner: int | None) -> Iterator[None]:
        """Within the block the text encoders read as bundle `owner` learned them; None: as the base model."""
        with ExitStack() as stack:
            for part, adapter in (self.bundles[owner].texts if owner is not None else {}).items():
                stack.enter_context(lend_adapter(self.parts[part], adapter, self.bundles[owner or 0].folder / part, self.scale))
            yield

    @contextmanager
    def bound_to(self, gates: Gates) -> Iterator[None]:
        """Within the block the UNet's layers are changed where `gates` says."""
        self._gates = gates
        hooks = [layer.module.register_forward_hook(self._hook(layer)) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._gates = None

    def _hook(self, layer: _Layer) -> Any:
        on_text = layer.name.endswith(TEXT_LAYERS)

        def convolve(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            low = F.conv2d(x, layer.down.to(x.dtype), None, module.stride, module.padding, module.dilation)
            size = (low.shape[-2], low.shape[-1])
            gate = self._gate(layer, size).transpose(1, 2).unflatten(2, size)
            return output + F.conv2d(low * gate.to(low.dtype), layer.up.to(x.dtype))

        def project(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            low = F.linear(x, layer.down.to(x.dtype))
            gate = self._gate(layer, None if on_text else self._size(low.shape[1]))
            return output + F.linear(low * gate.to(low.dtype), layer.up.to(x.dtype))

        return convolve if isinstance(layer.module, nn.Conv2d) else project

    def _gate(self, layer: _Layer, size: tuple[int, int] | None) -> torch.Tensor:
        """Of each rank: (rows or 1, h*w, R), or for text (1, keys, R)."""
        assert self._gates is not None
        gates = self._gates.key_gates()[None] if size is None else self._gates.pixel_gates(size)
        return gates[..., layer.owner]

    def _size(self, pixels: int) -> tuple[int, int]:
        """The map of that many pixels."""
        assert self._gates is not None
        height, width = self._gates.latent_size
        for _ in range(8):
            if height * width == pixels:
                return height, width
            height, width = -(-height // 2), -(-width // 2)
        raise ValueError(f"no map of latents {self._gates.latent_size} has {pixels} pixels")


def _find(unet: nn.Module, name: str) -> nn.Module | None:
    try:
        return unet.get_submodule(name)
    except AttributeError:
        return None


def _misfit(bundle: LentBundle, what: str) -> InputError:
    return InputError(f"{bundle.folder / LORA_WEIGHTS} does not fit the base model's layers ({what}); {AGAIN}")


def _fits(module: nn.Module, down: torch.Tensor, up: torch.Tensor) -> bool:
    """Whether the two matrices stand around a layer of this shape."""
    if down.shape[0] != up.shape[1]:
        return False
    if isinstance(module, nn.Conv2d):
        into = (module.in_channels, *module.kernel_size)
        return tuple(down.shape[1:]) == into and tuple(up.shape) == (module.out_channels, len(down), 1, 1)
    if not isinstance(module, nn.Linear):
        return False
    return down.shape[1] == module.in_features and tuple(up.shape) == (module.out_features, len(down))


@contextmanager
def lend_by_place(base: Any, bundles: Sequence[LentBundle], owners: Mapping[str, int], background: int | None,
                  scale: float) -> Iterator[LocalLora]:  # fmt: skip
    """Within the block `base.local_lora` are the bundles' adapters. Raises InputError for adapters that do not fit."""
    made = LocalLora(base.parts, bundles, owners, background, scale)
    base.local_lora = made
    try:
        yield made
    finally:
        base.local_lora = None
