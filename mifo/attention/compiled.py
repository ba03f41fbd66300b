"""Regional compilation: the UNet's repeated transformer blocks run as compiled code, once per kind of block.

Guidance passes, which need gradients and stop half way, stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from diffusers import UNet2DConditionModel

from ..errors import InputError


def repeated_blocks(unet: UNet2DConditionModel) -> list[torch.nn.Module]:
    """The modules that diffusers' own `compile_repeated_blocks` compiles."""
    return [module for module in unet.modules() if type(module).__name__ in unet._repeated_blocks]


@contextmanager
def compile_blocks(unet: UNet2DConditionModel, enabled: bool = True, **options: Any) -> Iterator[None]:
    """Within the block the UNet's repeated blocks are compiled, each without a break (`fullgraph`); afterwards they are as
    they were. The first denoising step takes seconds to minutes longer; further ones with the same size do not.

    `options` are those of `torch.compile`, such as `mode`. Raises InputError where nothing can be compiled, for want of a C++
    compiler say.
    """
    if not enabled:
        yield
        return
    blocks = repeated_blocks(unet)
    before = [block._compiled_call_impl for block in blocks]
    limits = torch._dynamo.config.recompile_limit
    # Every block of a UNet counts as another version of the same code: its LoRA, its width and its mask are its own.
    torch._dynamo.config.recompile_limit = max(limits, 4 * len(blocks))
    try:
        for block in blocks:
            block.compile(fullgraph=True, **options)
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--compile cannot be used here: {reason[:200]}; leave --compile out, or install what is missing") \
            from error
    finally:
        torch._dynamo.config.recompile_limit = limits
        for block, implementation in zip(blocks, before, strict=True):
            block._compiled_call_impl = implementation


def is_compiled(unet: UNet2DConditionModel) -> bool:
    """Within `compile_blocks`."""
    return any(block._compiled_call_impl is not None for block in repeated_blocks(unet))
