"""mifo: learn the individual things in one photo, each as its own word, and place each of them in new pictures."""

import os
import sys

__version__ = "0.1.0"

# Where the package `kernels` is installed, bitsandbytes asks the hub for native code as soon as it is imported, and transformers
# and diffusers may do so later. None here means that an import fails and that they take it for missing; a program that uses
# `kernels` itself imports it before mifo.
os.environ["USE_HUB_KERNELS"] = "OFF"
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
