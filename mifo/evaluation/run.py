"""The evaluation of one bundle: draws (or takes) pictures, measures, and hands on everything that evaluation.json holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..bundle.store import Bundle, attach
from ..config import SynthesisConfig, to_dict
from ..data.instance import Instance, fit_instance
from ..data.mask_file import open_mask
from ..data.mask_orientation import upright_masks
from ..editing.source_image import load_source_image
from ..errors import InputError
from ..io.image_file import load_image
from ..learning.dataset import InstanceData
from ..learning.supervision import learned_size
from ..model.base import BaseModel
from ..prompts import assets_in, tokenize_prompt
from ..sampling.layout_control import check_boxes, latent_shape
from ..synthesis.resumable import Keep, draw_now
from ..synthesis.synthesize import synthesize
from . import metrics
from .attention import attention_leakage
from .backend import Backend
from .cases import Case, CaseImage
from .measure import Record, leakage_matrix, measure_images, summarize

BATCH = 4  # pictures drawn together
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """`record` is evaluation.json; `pictures[k]` belongs to `record["pictures"][k]`."""

    record: dict[str, Any]
    images: list[CaseImage]


def draw_cases(base: BaseModel, cases: Sequence[Case], tokens: Sequence[str], config: SynthesisConfig, seed: int, samples: int,
               report: Report = lambda done, total: None, keep: Keep = draw_now) -> list[CaseImage]:  # fmt: skip
    """`samples` pictures of each case, of the seeds from `seed` on; those that fail are left out. The assets must be attached."""
    images: list[CaseImage] = []
    done = 0
    for index, case in enumerate(cases):
        for first in range(0, samples, BATCH):
            count = min(BATCH, samples - first)
            for k, image in enumerate(_draw(base, case, tokens, config, seed + first, count, keep), seed + first):
                images.append(CaseImage(case, k, image, f"{index:02d}-{k:06d}.png"))
            done += count
            report(done, len(cases) * samples)
    return images


def draw_prompts(base: BaseModel, prompts: Sequence[str], tokens: Sequence[str], config: SynthesisConfig, seed: int,
                 samples: int, keep: Keep = draw_now) -> list[tuple[int, Image.Image]]:  # fmt: skip
    """(seed, picture) of each prompt without assets, `samples` each; those that fail are left out."""
    drawn: list[tuple[int, Image.Image]] = []
    for prompt in prompts:
        drawn += enumerate(_draw(base, Case(prompt, None), tokens, config, seed, samples, keep), seed)
    return drawn


def _draw(base: BaseModel, case: Case, tokens: Sequence[str], config: SynthesisConfig, seed: int, count: int,
          keep: Keep) -> Sequence[Image.Image]:  # fmt: skip
    """`count` pictures drawn together, or none where that failed."""
    recipe = {**case.to_json(), "tokens": list(tokens), "config": to_dict(config), "seed": seed, "count": count}
    seeds = f"seed {seed}" if count == 1 else f"seeds {seed} to {seed + count - 1}"
    name = f"'{case.prompt}', {seeds}{'' if tokens else ', by the base model alone'}"

    def draw() -> list[Image.Image]:
        return synthesize(base, case.prompt, case.layout, tokens, config, seed, count).images

    return keep(name, recipe, count, draw) or []


def _check_cases(base: BaseModel, cases: Sequence[Case], config: SynthesisConfig) -> None:
    """Raises InputError for a prompt or a box that the model cannot take. The assets must be attached."""
    size = latent_shape(base, config)
    for case in cases:
        tokenize_prompt(base.tokenizer, case.prompt, assets_in(case.prompt), f"prompt {case.prompt[:60]!r}")
        if case.layout:
            check_boxes(base, case.layout, size)


def evaluate(base: BaseModel, bundle: Bundle, instance: Instance, backend: Backend, config: SynthesisConfig,
             cases: Sequence[Case], images: Sequence[CaseImage] | None = None, seed: int = 0, samples: int = 4,
             report: Report = lambda done, total: None, keep: Keep = draw_now) -> Evaluation | None:  # fmt: skip
    """Draws `samples` pictures of each case, or takes `images`, and measures everything that DEFINITIONS names.

    The same seed gives the same record. Pictures that `keep` has are not drawn again; what cannot be drawn is left out. None when
    nothing is left. Raises InputError, before anything is drawn, when the bundle does not fit the base model, or a prompt is too
    long.
    """
    tokens = instance.tokens  # of the things; a bundle may have <background> too
    data = InstanceData(fit_instance(instance, learned_size(base, bundle.config, instance.image.size)), base)
    unrelated, few = backend.unrelated_prompts, min(samples, BATCH)
    with attach(base, bundle, config.lora_scale):
        if images is None:
            _check_cases(base, cases, config)
        after = {p: draw_prompts(base, [p], bundle.tokens, config, seed, few, keep) for p in unrelated}
        attention = attention_leakage(base, data, tokens, bundle.config.lora.attention)
        if images is None:
            taken = draw_cases(base, cases, bundle.tokens, config, seed, samples, report, keep)
        else:
            taken = list(images)
    before = {p: draw_prompts(base, [p], (), config, seed, few, keep) for p in unrelated}
    if not taken:
        return None
    both = [p for p in unrelated if before[p] and after[p]]
    records = measure_images(taken, backend, tokens)
    among = backend.among_sources()
    record = {
        "bundle": bundle.name,
        "base_model": {"name": bundle.base_name, "fingerprint": bundle.base_fingerprint},
        "backend": backend.facts(),
        "seed": seed,
        "samples": samples,
        "synthesis": to_dict(config),
        "cases": [case.to_json() for case in dict.fromkeys(p.case for p in taken)],
        "summary": summarize(records, backend.thresholds),
        "tokens": list(tokens),
        "leakage_matrix": leakage_matrix(records, len(among)),
        "source_similarity": [[round(float(v), 4) for v in row] for row in among],
        "attention_outside": _by_token(tokens, attention[0]),
        "attention_in_others": _by_token(tokens, attention[1]),
        "drift": drift([drawn for p in both for drawn in before[p]], [drawn for p in both for drawn in after[p]], backend),
        "definitions": metrics.DEFINITIONS,
        "pictures": records,
    }
    return Evaluation(record, taken)


def measure_edit(original: Path | None, edited: Path | None, mask: Path | None, drawn: str = "auto") -> dict[str, int] | None:
    """`metrics.edit_preservation` of three files; None when none is given. `drawn`: as `mask_orientation.upright_masks` has it,
    for an original that EXIF turns. Raises InputError when one is missing or their sizes differ."""
    paths = {"--original": original, "--edited": edited, "--edit-mask": mask}
    if not any(paths.values()):
        return None
    if original is None or edited is None or mask is None:
        missing = [name for name, path in paths.items() if path is None]
        raise InputError(f"{', '.join(missing)} is missing; to measure an edit give --original, --edited and --edit-mask")
    before = load_source_image(original)
    (grey,), _ = upright_masks(before.image, original.name, before.orientation, [open_mask(mask)], drawn)
    images = [before.image, load_image(edited), Image.fromarray(grey)]
    if len({image.size for image in images}) > 1:
        sizes = ", ".join(f"{name} {i.width}x{i.height}" for name, i in zip(paths, images, strict=True))
        raise InputError(f"the edit's pictures have different sizes ({sizes}); give all three at one size")
    return metrics.edit_preservation(*images)


def drift(before: Sequence[tuple[int, Image.Image]], after: Sequence[tuple[int, Image.Image]], backend: Backend) -> Record:
    """Mean distance of pictures with equal prompts and seeds, with its interval over seeds."""
    by_seed: dict[int, list[float]] = {}
    if not before:
        return metrics.interval(by_seed)
    seen = [backend.see([image for _, image in drawn]) for drawn in (before, after)]
    for (seed, _), first, second in zip(before, *seen, strict=True):
        by_seed.setdefault(seed, []).append(backend.distance(first, second))
    return metrics.interval(by_seed)


def _by_token(tokens: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {token: round(value, 4) for token, value in zip(tokens, values, strict=True)}
