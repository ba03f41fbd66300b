"""The benchmark: its scenes, its methods, and that an interrupted run goes on where it was."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from _tiny import load_base, tiny_base_folder, write_instance

from mifo.boxes import Box
from mifo.data.instance import fit_instance, load_instance
from mifo.evaluation.toybox_backend import agreement, thing_looks
from mifo.model.embedding import initial_vectors, use_assets
from mifo.presets import learn_preset, synthesis_preset, with_attention_loss
from mifo.toybox.draw import RARE_CLASSES
from scripts.toybench import toybench, toybench_report
from scripts.toybench.methods import METHODS, choose_methods, training
from scripts.toybench.toybench import main, plan_jobs, run_all
from scripts.toybench.toybench_items import item_path, load_items, restore_items, save_items, write_record
from scripts.toybench.toybench_methods import PairData, pair_picture, trained, whole_model
from scripts.toybench.toybench_scenes import COUNTS, LARGE_COUNTS, LEVELS, Cell, bench_scene


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("count", COUNTS + LARGE_COUNTS)
def test_scenes_are_of_their_level(level: str, count: int):
    for index in range(6):
        cell = Cell(level, count, index, "dev")
        scene = bench_scene(cell)
        assert scene == bench_scene(cell) and len(scene.things) == count
        boxes = [Box(*t.box) for t in scene.things]  # raises where a thing leaves the picture
        assert all(a.iou(b) == 0 for a, b in combinations(boxes, 2))
        looks = [thing_looks(t) for t in scene.things]
        assert all(agreement(a, b) < 1 for a, b in combinations(looks, 2)), looks  # the metric can tell them apart
        classes, mains, patterns = ({t.class_name for t in scene.things}, {t.main for t in scene.things},
                                    {t.pattern for t in scene.things})  # fmt: skip
        sizes = {"classes": (count, None, None), "colors": (1, count, 1), "patterns": (1, 1, min(count, 4)),
                 "rare": (2, count, None)}[level]  # fmt: skip
        for found, expected in zip((classes, mains, patterns), sizes, strict=True):
            assert expected is None or len(found) == expected
        assert level != "rare" or classes <= set(RARE_CLASSES)


def test_every_third_seed_is_held_out_and_no_seed_comes_twice():
    seeds = {split: {Cell(level, count, k, split).seed for level in LEVELS for count in COUNTS + LARGE_COUNTS
                     for k in range(20)} for split in ("dev", "holdout")}  # fmt: skip
    assert len(seeds["dev"]) == len(seeds["holdout"]) == 20 * 4 * 5 and not seeds["dev"] & seeds["holdout"]
    assert max(seeds["dev"] | seeds["holdout"]) < 600_000
    assert [Cell("rare", 2, k, "dev").number for k in range(4)] == [0, 1, 3, 4]
    assert [Cell("rare", 2, k, "holdout").number for k in range(2)] == [2, 5]


def test_methods_change_what_they_say():
    ours = training("mifo", 3).config
    assert ours.embedding == learn_preset("toybox").embedding and ours.seed == 3
    inversion, dreambooth = training("textual-inversion-masked", 0).config, training("dreambooth-lora-pairs", 0)
    assert inversion.lora.train_steps == 0 and inversion.embedding.attention.loss == "none"
    assert dreambooth.kind == "pairs" and dreambooth.config.embedding.train_steps == 0
    assert dreambooth.config.lora.row_learning_rate == 0
    assert inversion.embedding.train_steps == dreambooth.config.lora.train_steps == 350  # equal budgets, of four draws each
    assert inversion.embedding.draws == dreambooth.config.lora.draws == ours.lora.draws == 4
    assert training("full-1e-4", 0).kind == "full" and training("rank-4", 0).config.lora.rank == 4
    quick = training("mifo", 0, 0.1).config
    assert (quick.embedding.train_steps, quick.embedding.attention.reward_steps, quick.lora.train_steps) == (15, 5, 20)
    changed = {method.training for method in METHODS.values()} - {"mifo"}
    assert all(training(name, 3, count=4) != training("mifo", 3, count=4) for name in changed)

    def steps(name: str) -> list[int]:
        return [training(name, 0, count=count).config.lora.train_steps for count in (2, 3, 6)]

    assert steps("mifo") == steps("break-a-scene-tuned") == [200, 200, 400] and steps("steps-of-three") == [200] * 3
    assert choose_methods("main,rank-4")[-1] == "rank-4" and "masks-only" in choose_methods("ablations")
    assert {"mifo", "break-a-scene-tuned", "break-a-scene-as-published"} < set(choose_methods("main"))
    assert choose_methods("our-rates,mifo").count("mifo") == 1 and "mifo" not in choose_methods("study")
    published = training("break-a-scene-as-published", 0).config  # arXiv 2305.16311, section 4 and appendix
    assert [(p.train_steps, p.draws) for p in (published.embedding, published.lora)] == [(400, 1), (400, 1)]
    assert published.embedding.learning_rate == 5e-4 and published.lora.attention.penalty_weight == 0.01
    assert published.composites.share == 0 and published.lora.averaged_share == 0 and not published.masked_loss_by_area
    with pytest.raises(KeyError):
        choose_methods("best-method")


@pytest.mark.parametrize(("loss", "method"), [("reward-penalty", "mifo"), ("match", "break-a-scene-tuned"),
                                               ("none", "no-attention-loss-tuned")])  # fmt: skip
@pytest.mark.parametrize("count", [3, 4])
def test_learns_option_for_the_attention_loss_is_what_was_measured(loss: str, method: str, count: int):
    assert with_attention_loss(learn_preset("toybox", assets=count), "toybox", loss) == training(method, 0, count=count).config


@pytest.mark.parametrize("method", ["mifo", *(name for name in METHODS if METHODS[name].group == "tuned")])
def test_tuned_methods_are_what_their_own_search_found_best(method: str):
    """A table that says "each with its own search" must be of those settings, and differ in nothing else."""
    named = {"mifo": "mifo", "no-attention-loss-tuned": "none", "break-a-scene-first-search": "break_a_scene_first"}
    recipe = named.get(method, method.removesuffix("-tuned").replace("-", "_"))
    result = json.loads((Path(__file__).parents[2] / "scripts" / "results" / f"search_{recipe}.json").read_text())
    best, tuned, ours = result["trials"][0], training(method, 0).config, training("mifo", 0).config
    assert len(result["trials"]) >= 12 and best["mean"] == max(t["mean"] for t in result["trials"] if "mean" in t)
    assert sum("mean" in t for t in result["trials"]) == 3
    found = {"embedding_rate": tuned.embedding.learning_rate, "lora_rate": tuned.lora.learning_rate,
             "row_rate": tuned.lora.row_learning_rate}  # fmt: skip
    for rate in set(found) & set(best):
        assert found[rate] == pytest.approx(best[rate], rel=0.01)  # as they are rounded there
    for phase, rate in ((tuned.embedding, "embedding_rate"), (tuned.lora, "lora_rate")):
        assert (phase.train_steps > 0) == (rate in best)
        assert ("attention_weight" in best) == (phase.attention.loss != "none")
        if "attention_weight" in best:
            assert phase.attention.penalty_weight == pytest.approx(best["attention_weight"], rel=0.01)
    assert tuned.embedding.train_steps + tuned.lora.train_steps == ours.embedding.train_steps + ours.lora.train_steps
    assert tuned.embedding.draws == tuned.lora.draws == ours.lora.draws and tuned.prior == ours.prior
    assert tuned.union_sampling == ours.union_sampling and (tuned.composites == ours.composites) == best.get("composites", True)


def test_pairs_hold_the_subset_alone_on_one_color(tmp_path: Path):
    base = load_base()
    fitted = fit_instance(load_instance(write_instance(tmp_path / "cups")), 128)
    picture = np.asarray(pair_picture(fitted, (1,), (7, 8, 9), False))
    inside = np.asarray(fitted.masks[1]) > 0
    assert (picture[~inside] == (7, 8, 9)).all() and (picture[inside] == np.asarray(fitted.image)[inside]).all()
    flipped = np.asarray(pair_picture(fitted, (1,), (7, 8, 9), True))
    assert (flipped == picture[:, ::-1]).all()
    batch = PairData(fitted, base, 0).sample(np.random.default_rng(0), torch.Generator().manual_seed(0), 1, True, 0.5)
    assert batch.union_mask.min() == 1 and len(batch.asset_masks) == len(batch.assets)
    assert batch.latents().shape == (1, 12, 16, 16)


def test_full_fine_tuning_trains_the_model_and_gives_it_back():
    base = load_base()
    rows = initial_vectors(base.text_encoders, base.tokenizer, [None])
    before = {k: v.clone() for k, v in base.unet.state_dict().items()}
    with use_assets(base.text_encoders, [len(base.tokenizer)], rows) as embedding:
        with whole_model(base, embedding.table) as parts:
            trainable = [p for part in parts.values() for p in part.parameters() if p.requires_grad]
            assert len(trainable) > 100 and not embedding.table.weight.requires_grad
            with torch.no_grad():
                for weight in base.unet.parameters():
                    weight.add_(1)
        assert all(torch.equal(v, before[k]) for k, v in base.unet.state_dict().items())
    assert not any(p.requires_grad for p in (*base.unet.parameters(), *base.text_encoder.parameters()))


def test_a_run_goes_on_where_it_was_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    preset = synthesis_preset("toybox")
    short = replace(preset, steps=2, guidance=replace(preset.guidance, max_iterations=1))
    monkeypatch.setattr("scripts.toybench.toybench.synthesis_preset", lambda family: short)
    model, work = str(tiny_base_folder()), tmp_path / "work"
    methods = ["textual-inversion-masked", "textual-inversion-pairs"]
    cells = [Cell("colors", 2, k, "dev") for k in range(2)]

    def plan(samples: int = 1):
        return plan_jobs(cells, methods, samples, 0.001, model, work, "cpu", load_base().fingerprint)

    jobs, there = plan()
    assert (len(jobs), there) == (4, 0)
    finished: list[str] = []
    assert run_all(jobs[:3], 1, finished.extend) == []  # the fourth: as if stopped before it
    assert finished == ["colors-2-000 textual-inversion-masked", "colors-2-000 textual-inversion-pairs",
                        "colors-2-001 textual-inversion-masked"]  # fmt: skip
    jobs, there = plan()
    assert ([j.training for j in jobs], there) == (["textual-inversion-pairs"], 3)
    assert len(plan(samples=2)[0]) == 4  # other settings: measured again
    item = json.loads(item_path(work, cells[0], methods[0]).read_text())
    assert len(item["alone"]["identity"]) == 6 and len(item["in_boxes"]["ious"]) == 6 and item["learn_seconds"] > 0
    assert not list((work / "jobs").glob("*"))  # nothing is left lying about
    item_path(work, cells[0], methods[0]).write_text("{ half")
    assert plan()[1] == 2
    item_path(work, cells[0], methods[0]).write_text(json.dumps(item))

    monkeypatch.setattr(toybench_report, "FOLDER", tmp_path)
    monkeypatch.setattr("scripts.record.FOLDER", tmp_path)

    def report(folder: Path, file: Path | None = None) -> dict[str, Any]:
        with pytest.raises(BaseException) as stopped:
            main(report_only=True, methods=",".join(methods), work=folder, name="bench", samples=1, share=0.001, model_path=model,
                 items_file=file)  # fmt: skip
        assert getattr(stopped.value, "exit_code", None) == 0
        found: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())["methods"]
        return found

    here = report(work)
    assert here[methods[0]]["colors"]["iou"]["groups"] == 1  # the other method has not finished the second scene
    assert (tmp_path / "bench.png").stat().st_size > 1000

    # on another machine, from one small file: as far as it was here, and the same report
    file, elsewhere = tmp_path / "items.jsonl.gz", tmp_path / "elsewhere"
    assert report(work, file) == report(elsewhere, file) == here
    assert len(plan_jobs(cells, methods, 1, 0.001, model, elsewhere, "cpu", load_base().fingerprint)[0]) == 1

    monkeypatch.setattr("scripts.toybench.toybench_methods.learn", None)  # drawn anew, and not learned anew
    assert run_all([j for j in plan(samples=2)[0] if j.training == methods[0]], 1, finished.extend) == []
    again = json.loads(item_path(work, cells[0], methods[0]).read_text())
    assert again["learn_seconds"] == item["learn_seconds"] and len(again["alone"]["identity"]) == 12
    assert again["alone"]["identity"][:1] == item["alone"]["identity"][:1], "the same bundle draws the same picture"

    assert set(report(work)) == {methods[1]}  # what was measured otherwise is not mixed in


def test_a_file_of_items_loses_none(tmp_path: Path):
    cells = [Cell("colors", 3, k, "dev") for k in range(2)]

    def item(cell: Cell, method: str, seed: int, value: float) -> dict:
        return {"split": "dev", "scene": cell.name, "method": method, "learning_seed": seed, "key": "k", "value": value}

    file, first, second = tmp_path / "items.jsonl.gz", tmp_path / "first", tmp_path / "second"
    save_items(file, [item(cells[0], "mifo", 0, 0.1), item(cells[0], "mifo", 1, 0.2)])
    save_items(file, [item(cells[0], "mifo", 1, 0.3), item(cells[1], "reward", 0, 0.4)])  # one measured again, one new
    write_record(item_path(first, cells[0], "mifo", 0), item(cells[0], "mifo", 0, 0.9))  # measured here: stays
    assert (restore_items(file, first), restore_items(file, first), restore_items(file, second)) == (2, 0, 3)
    def key_of(cell: Cell, method: str, seed: int) -> str:
        return "k"

    for work, values in ((first, [0.9, 0.3, 0.4]), (second, [0.1, 0.3, 0.4])):
        assert [i["value"] for i in load_items(work, ["mifo", "reward"], cells, key_of, 2, paired=True)] == values
    before = file.read_bytes()
    save_items(file, [])
    assert file.read_bytes() == before  # the same items, the same bytes
    for wrong in (b"no items", before[:40], gzip.compress(b"[1]\n"), gzip.compress(b'{"scene": "colors-3-000"}\n')):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match="is not a file of toybench's items"):
            save_items(file, [item(cells[0], "mifo", 0, 0.1)])
        assert file.read_bytes() == wrong and not list(tmp_path.glob("*.partial"))
        with pytest.raises(typer.BadParameter, match="give another name"):
            main(report_only=True, work=tmp_path / "third", items_file=file)


def test_a_report_is_of_runs_that_all_methods_have_finished(tmp_path: Path):
    cell = Cell("colors", 3, 0, "dev")
    for method, seeds in (("mifo", 3), ("reward", 2)):
        for seed in range(seeds):
            found = {"split": "dev", "scene": cell.name, "method": method, "learning_seed": seed, "key": "k"}
            write_record(item_path(tmp_path, cell, method, seed), found)

    def runs(seeds: int, paired: bool = False) -> list[tuple[str, int]]:
        items = load_items(tmp_path, ["mifo", "reward"], [cell], lambda *_: "k", seeds, paired)
        return [(i["method"], i["learning_seed"]) for i in items]

    assert runs(1) == [("mifo", 0), ("reward", 0)]  # no more learning seeds than the report says it has
    assert runs(3) == [("mifo", 0), ("mifo", 1), ("reward", 0), ("reward", 1)]
    assert len(runs(3, paired=True)) == 5


def test_quick_run_measures_real_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toybench_report, "FOLDER", tmp_path)
    monkeypatch.setattr("scripts.record.FOLDER", tmp_path)
    monkeypatch.setattr(toybench, "_BASES", {})
    preset = synthesis_preset("toybox")
    few = replace(preset, steps=10, guidance=replace(preset.guidance, steps=4))
    monkeypatch.setattr(toybench, "synthesis_preset", lambda family: few)
    with pytest.raises(BaseException) as stopped:
        main(quick=True, methods="mifo", work=tmp_path / "work")
    assert getattr(stopped.value, "exit_code", None) == 0
    report = json.loads((tmp_path / "toybench_quick.json").read_text())
    assert set(report["methods"]) == {"mifo"} and (tmp_path / "toybench_quick.png").stat().st_size > 1000
    found = report["methods"]["mifo"]["all"]
    assert found["iou"]["groups"] == 1
    # boxes hold even what was hardly learned: measured 0.87, and 0.45 without box control
    assert found["iou"]["mean"] > 0.65


def test_comparison_by_scene():
    def item(method: str, scene: int, margins: list[float]) -> dict:
        return {"method": method, "scene": f"s{scene}", "level": "colors", "count": 2, "alone": {"confused": [1 - margins[0]]},
                "in_boxes": {"identity_margin": margins}, "attention_in_others": 0.1, "draw_seconds": 4.0, "pictures": 8,
                "learn_seconds": 10.0 + scene}  # fmt: skip

    items = [item("mifo", k, [0.9, 0.8 + 0.01 * k]) for k in range(8)]
    items += [item("rank-4", k, [0.3, 0.1 * (k % 3)]) for k in range(9)]
    items += [item("published-penalty", k, [0.7, 0.7]) for k in range(6)]
    items += [item("published-no-attention-loss", k, [0.4, 0.4]) for k in range(6)]
    found = toybench_report.summarize(items)
    against = found["rank-4"]["mifo_against_it"]["colors"]["margin_in_boxes"]
    assert against["scenes"] == 8 and against["ahead_with_intervals_apart"] is True and 0.6 < against["difference"]["mean"] < 0.75
    assert found["rank-4"]["mifo_against_it"]["all"]["confused_alone"]["ahead_with_intervals_apart"] is True
    assert "rare" not in found["rank-4"]["mifo_against_it"]  # one of them has nothing there
    assert found["mifo"]["cost"] == {"learn_seconds": 13.5, "seconds_per_picture": 0.5} and "mifo_against_it" not in found["mifo"]
    no_loss = found["published-penalty"]["against_no_attention_loss"]["margin_in_boxes"]
    assert toybench_report.difference(no_loss) == "**+0.30 (+0.30 to +0.30)**"
    assert not any("against_no_attention_loss" in found[name] for name in ("mifo", "published-no-attention-loss"))
    composites = toybench_report.summarize(items + [item("reward", k, [0.7, 0.7]) for k in range(6)]
                                           + [item("no-attention-loss", k, [0.5, 0.5]) for k in range(6)])  # fmt: skip
    for name, margin in (("reward", 0.2), ("published-penalty", 0.3)):  # each beside none of its own kind
        compared = composites[name]["against_no_attention_loss"]["margin_in_boxes"]
        assert compared["difference"]["mean"] == pytest.approx(margin)
    assert "| mifo | 0.87 (" in toybench_report.table(found)
    assert "| colors | 8 | **0.87 (" in toybench_report.versus_table(found, "rank-4")
    paired = toybench_report.paired_table(found)
    assert "| rank-4 | 8 | **-0.6" in paired and "| mifo |" not in paired  # 0.2 against 0.87; the ninth scene has no partner
    assert "| colors | **+0.6" in toybench_report.difference_table(found, "rank-4")
    few = toybench_report.summarize([i for i in items if i["scene"] in ("s0", "s1", "s2", "s3")])
    assert "| colors | 4 | 0.8" in toybench_report.versus_table(few, "rank-4")  # apart, yet too few to be bold
    assert "| rank-4 | 4 | -0.6" in toybench_report.paired_table(few)
    assert trained.__doc__ and all(chart.bars for chart in toybench_report.charts(found, 9))


def test_prompt_fit_is_compared_between_the_same_kinds_of_pictures():
    """Contrast, drawn in boxes alone, once seemed to lose 15 points beside pictures of single things."""

    def item(method: str, alone: dict, fit: float) -> dict:
        return {"method": method, "scene": "s0", "level": "colors", "count": 2, "alone": alone, "attention_in_others": 0.1,
                "in_boxes": {"identity_margin": [0.5], "prompt_fit": [fit]}, "draw_seconds": 4.0, "pictures": 8,
                "learn_seconds": 10.0}  # fmt: skip

    found = toybench_report.summarize([item("mifo", {"prompt_fit": [1.0]}, 0.5), item("contrast", {}, 0.4)])
    assert found["mifo"]["all"]["prompt_fit"]["mean"] == 0.75
    against = found["contrast"]["mifo_against_it"]["all"]
    assert against["prompt_fit"] is None and against["prompt_fit_in_boxes"]["difference"]["mean"] == pytest.approx(0.1)
