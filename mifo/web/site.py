"""What the page's parts share: where things lie, the list of jobs, and how an error becomes a message."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from ..errors import InputError, NotFinite
from ..io.terminal import without_folders
from ..jobs.store import JobStore
from ..jobs.uploads import UPLOADS
from ..jobs.worker import LIST

T = TypeVar("T")
OPTION = re.compile(r"--([a-z])([a-z-]*)")
MOST_QUEUED = 20


@dataclass(frozen=True)
class Site:
    """Folders: of the bundles, of results, of instances that the page makes; and of the page's own state."""

    bundles: Path
    output: Path
    photos: Path
    state: Path

    @cached_property
    def store(self) -> JobStore:
        return JobStore(self.state / LIST)

    @property
    def drafts(self) -> Path:
        return self.state / "drafts"

    @property
    def uploads(self) -> Path:
        return self.state / UPLOADS


def told(error: Exception | str) -> str:
    """The message for a page: no folders, and options as words."""
    return OPTION.sub(lambda m: m[1] + m[2].replace("-", " "), without_folders(str(error)))


def guarded(function: Callable[..., T]) -> Callable[..., T]:
    """What is wrong with the input becomes a message on the page; what is wrong with mifo too, without its details."""

    @wraps(function)
    def run(*values: Any) -> T:
        try:
            return function(*values)
        except (InputError, NotFinite) as error:
            raise gr.Error(told(error), duration=20, print_exception=False) from None
        except (OSError, MemoryError) as error:
            raise gr.Error(f"that did not work: {told(getattr(error, 'strerror', None) or type(error).__name__)}",
                           print_exception=False) from None  # fmt: skip

    return run
