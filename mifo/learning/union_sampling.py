"""Which assets a step is about (union sampling: Break-A-Scene, arXiv 2305.16311, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def choose_assets(shown: Sequence[int], rng: np.random.Generator, union_sampling: bool, alone_share: float = 0.0,
                  about: frozenset[int] = frozenset()) -> tuple[int, ...]:  # fmt: skip
    """A subset of the assets that a picture shows, in random order.

    It has one asset in `alone_share` of the cases, else a size uniform in 1..N; without `union_sampling` it has all of them. With
    `about` it has one of those at least, where the picture shows any.
    """
    count = len(shown)
    if union_sampling:
        count = 1 if alone_share and rng.random() < alone_share else int(rng.integers(1, len(shown) + 1))
    chosen = tuple(shown[int(i)] for i in rng.permutation(len(shown))[:count])
    wanted = [i for i in shown if i in about]
    if wanted and not about.intersection(chosen):
        chosen = (wanted[int(rng.integers(len(wanted)))], *chosen[1:])
    return chosen
