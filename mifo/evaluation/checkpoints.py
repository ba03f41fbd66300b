"""The judge behind `learn --keep best`: attention leakage and a few samples, instead of the loss.

score = mean identity + 0.5 * mean identity margin of the samples
        - mean share of attention inside the others' masks - 0.5 * mean share outside its own

Identity and margin are what learning is for; leakage is measured in the learned picture and moves more smoothly than a few
samples do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..config import AttentionTerms
from ..learning.dataset import InstanceData
from ..model.base import BaseModel
from ..prompts import join_assets, things_among
from ..sampling.sample import sample_prompts
from .attention import attention_leakage
from .backend import Backend
from .cases import Case, CaseImage
from .measure import measure_images

SAMPLE_STEPS = 15
CHECK_SEED = 700_000  # fixed, so that checkpoints are compared on the same noise, and apart from what users draw


def checkpoint_judge(backend: Backend, samples: int) -> Callable[[BaseModel, InstanceData, Sequence[str], AttentionTerms],
                                                                   dict[str, float]]:  # fmt: skip
    """What `learn` calls with the model as it stands; `samples` pictures of each asset alone."""

    def judge(base: BaseModel, data: InstanceData, tokens: Sequence[str], terms: AttentionTerms) -> dict[str, float]:
        outside, in_others = attention_leakage(base, data, tokens, terms)
        things, taken = things_among(tokens), []
        resolution = data.moments[False][0].shape[-1] * base.vae_factor  # that of the learning
        for k in range(samples):
            prompts = [join_assets([token]) for token in things]
            images = sample_prompts(base, prompts, tokens, CHECK_SEED + 100 * k, SAMPLE_STEPS, resolution)
            taken += [CaseImage(Case(p, None), k, image, f"{k}") for p, image in zip(prompts, images, strict=True)]
        records: list[dict[str, Any]] = measure_images(taken, backend, things)
        margins = [m for r in records for m in r["identity_margin"] if m is not None]
        margin = float(np.mean(margins)) if margins else 0.0
        identity = float(np.mean([v for r in records for v in r["identity"]]))
        leak, out = float(np.mean(in_others)), float(np.mean(outside))
        return {"score": identity + 0.5 * margin - leak - 0.5 * out, "identity": identity, "identity_margin": margin,
                "attention_in_others": leak, "attention_outside": out}  # fmt: skip

    return judge
