"""Which assets a step is about (union sampling: Break-A-Scene, arXiv 2305.16311, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose_assets(shown: Sequence[int], rng: np.random.Generator, union_sampling: bool,
                  about: frozenset[int] = frozenset()) -> tuple[int, ...]:  # fmt: skip
    """A subset of the assets that a picture shows, its size uniform in 1..N, in random order; without `union_sampling` all of
    them. With `about` it has one of those at least, where the picture shows any."""
    count = int(rng.integers(1, len(shown) + 1)) if union_sampling else len(shown)
    chosen = tuple(shown[int(i)] for i in rng.permutation(len(shown))[:count])
    wanted = [i for i in shown if i in about]
    if wanted and not about.intersection(chosen):
        chosen = (wanted[int(rng.integers(len(wanted)))], *chosen[1:])
    return chosen
