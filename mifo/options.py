"""Options that several commands share."""

from __future__ import annotations

from enum import Enum


class Precision(str, Enum):
    auto = "auto"
    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"
