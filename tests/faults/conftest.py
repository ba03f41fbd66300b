"""What the tests of interrupted runs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mifo.data.instance import Instance


@pytest.fixture(scope="module")
def quick_preview() -> Iterator[None]:
    """Drawing the preview takes longer than these runs learn, and comes after all that is tested."""
    from PIL import Image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mifo.learning.learn.draw_preview", lambda *_: Image.new("RGB", (8, 8)))
        yield


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Instance:
    from _tiny import write_instance

    from mifo.data.instance import load_instance

    return load_instance(write_instance(tmp_path_factory.mktemp("photos") / "cups"))


@pytest.fixture(scope="module")
def whole(quick_preview: None, instance: Instance, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run learns that nobody interrupts."""
    from _short_runs import base, config

    from mifo.learning.learn import learn

    return learn(instance, base(), config(), tmp_path_factory.mktemp("whole") / "cups").folder
