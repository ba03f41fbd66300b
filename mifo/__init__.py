"""mifo: learn the individual things in one photo, each as its own word, and place each of them in new pictures.

The eight functions of `mifo.api` are here by name; PyTorch is imported when one of them is first looked at.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from .io.threads import choose_waiting

__version__ = "0.1.0"
__all__ = ["edit", "evaluate", "learn", "load_base_model", "load_bundle", "load_instance", "plan", "synthesize"]

if TYPE_CHECKING:
    from .api import edit, evaluate, learn, load_base_model, load_bundle, load_instance, plan, synthesize

choose_waiting()

# Where the package `kernels` is installed, bitsandbytes asks the hub for native code as soon as it is imported, and transformers
# and diffusers may do so later. None here means that an import fails and that they take it for missing; a program that uses
# `kernels` itself imports it before mifo.
os.environ["USE_HUB_KERNELS"] = "OFF"
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(".api", __name__), name)
    raise AttributeError(f"module 'mifo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
