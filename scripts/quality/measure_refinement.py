"""Whether refined masks depend on the seed of k-means: as they are made now, and as they were.

    python -m scripts.quality.measure_refinement --bundle Model_ours/toy_car

Ten pictures of the embedded model, three learned cars in boxes each. The self-attention of every step is kept; then both
procedures refine the boxes from these very maps, with two seeds. What counts is the overlap (IoU) of each subject's last mask
between the two seeds. The former procedure: one start of k-means++, the maps of one step alone, and a cluster's cover by the
cluster's own size.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.cluster.vq import kmeans2
from tqdm import tqdm

from mifo.attention.refine import MeanMap, cluster_pixels, refine_masks, subject_cover
from mifo.boxes import Layout, parse_layout
from mifo.bundle.store import attach, load_bundle
from mifo.data.instance import load_instance
from mifo.io.json_text import json_text
from mifo.learning.learn import learn
from mifo.model.base import BaseModel
from mifo.model.load_base import load_base_model
from mifo.presets import learn_preset, synthesis_preset
from mifo.prompts import join_assets
from mifo.sampling.guidance import MaskRefinement
from mifo.synthesis.synthesize import synthesize
from mifo.toybox.draw import BACKGROUNDS
from mifo.toybox.world import BACKGROUND_PHRASES
from scripts.quality.measure_main_job import ARRANGEMENTS, arrangement, load_things
from scripts.record import write_result

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (0, 1)


@dataclass
class Scene:
    """The maps of one picture: of every step its self-attention (h*w, h*w), and of the steps that refine the tokens' maps."""

    boxes: torch.Tensor
    """(subjects, h*w) bool"""
    own: list[torch.Tensor] = field(default_factory=list)
    tokens: dict[int, torch.Tensor] = field(default_factory=dict)
    """Step -> (subjects, h*w)."""


def record(base: BaseModel, prompt: str, layout: Layout, tokens: tuple[str, ...], seed: int) -> Scene:
    """Draws one picture as `synthesize` does, and keeps the maps."""
    scenes: list[Scene] = []
    real = MaskRefinement.after

    def after(self: MaskRefinement, step: int) -> None:
        control, maps = self.control, dict(self.control._maps)
        if not scenes:
            size = self.self_sites[0].map_size(*control.latent_size)
            scenes.append(Scene(torch.from_numpy(control.box_masks(size))))
        scenes[0].own.append(torch.stack([maps[s.name][-1].mean(0) for s in self.self_sites]).mean(0))
        if self._is_due(step):
            cross = torch.stack([maps[s.name][-1].mean(0) for s in self.cross_sites]).mean(0)
            scenes[0].tokens[step] = torch.stack([cross[:, control.subject_keys(k)].mean(1) for k in range(len(control.layout))])
        real(self, step)

    MaskRefinement.after = after  # type: ignore[method-assign]
    try:
        synthesize(base, prompt, layout, tokens, synthesis_preset("toybox"), seed)
    finally:
        MaskRefinement.after = real  # type: ignore[method-assign]
    return scenes[0]


def refined_now(scene: Scene, seed: int) -> torch.Tensor:
    """(subjects, h*w) bool: the masks after the last refinement."""
    config, mean, present = synthesis_preset("toybox").refinement, MeanMap(), scene.boxes
    labels = None
    for step, own in enumerate(scene.own):
        mean.add(own[None])
        if step in scene.tokens:
            labels = cluster_pixels(mean.mean[0], config.clusters_per_box * len(present), seed, labels)
            present = refine_masks(labels, scene.tokens[step], present, config.min_cover)
    return present


def refined_before(scene: Scene, seed: int) -> torch.Tensor:
    """As `refined_now`, by the procedure that it replaced."""
    config, present = synthesis_preset("toybox").refinement, scene.boxes
    for step, looks in scene.tokens.items():
        rows = scene.own[step].double().numpy()
        labels = kmeans2(rows, config.clusters_per_box * len(present), minit="++", iter=20, rng=np.random.default_rng(seed))[1]
        covers = torch.stack([subject_cover(a, m) for a, m in zip(looks, present, strict=True)])
        masks = torch.zeros_like(present)
        for label in np.unique(labels):
            pixels = torch.from_numpy(labels == label)
            share = covers[:, pixels].mean(1)
            if share.max() >= config.min_cover:
                masks[int(share.argmax())] |= pixels
        masks[~masks.any(1)] = present[~masks.any(1)]
        present = masks
    return present


def overlaps(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """IoU of each subject's two masks."""
    return ((first & second).sum(1) / (first | second).sum(1)).tolist()


def summary(by_scene: list[list[float]]) -> dict[str, Any]:
    values = [value for scene in by_scene for value in scene]
    return {"iou_median": round(statistics.median(values), 3), "iou_min": round(min(values), 3),
            "share_of_masks_at_0.9": round(float(np.mean([v >= 0.9 for v in values])), 3),
            "scenes_whose_mean_is_0.9": sum(statistics.mean(scene) >= 0.9 for scene in by_scene), "of_scenes": len(by_scene),
            "by_scene": [[round(v, 3) for v in scene] for scene in by_scene]}  # fmt: skip


def main(
    bundle: Annotated[Path | None, typer.Option(help="Of example/toy_car; learned first where none is given.")] = None,
    scenes: int = 10,
    name: str = "refinement",
) -> None:
    base = load_base_model("toybox")
    photo = ROOT / "example" / "toy_car"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "toy_car"
        learned = load_bundle(bundle) if bundle else learn(load_instance(photo), base, learn_preset("toybox"), folder)
    things = load_things(photo)
    now, before, seconds = [], [], []
    with attach(base, learned):
        for k in tqdm(range(scenes)):
            layout = parse_layout(json_text(arrangement(things, ARRANGEMENTS[k % len(ARRANGEMENTS)])), learned.tokens)
            prompt = f"{join_assets(learned.tokens)} {BACKGROUND_PHRASES[sorted(BACKGROUNDS)[k % len(BACKGROUNDS)]]}"
            scene = record(base, prompt, layout, learned.tokens, 100 + k)
            started = time.monotonic()
            one = refined_now(scene, SEEDS[0])
            seconds.append((time.monotonic() - started) / len(scene.tokens))
            now.append(overlaps(one, refined_now(scene, SEEDS[1])))
            before.append(overlaps(*(refined_before(scene, seed) for seed in SEEDS)))
    found = {"now": summary(now), "before": summary(before)}
    for key, numbers in found.items():
        print(key, {k: v for k, v in numbers.items() if k != "by_scene"})
    milliseconds = round(1000 * statistics.median(seconds), 1)
    print(write_result(name, {"seeds": list(SEEDS), "ms_a_refinement_median": milliseconds, **found}))


if __name__ == "__main__":
    typer.run(main)
