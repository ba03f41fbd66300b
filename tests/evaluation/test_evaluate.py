"""Evaluation from end to end: drawn pictures whose truth is known, both back ends, the commands, and what uses them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import FAST, copy_bundle, edit_json, load_base, mifo, tiny_base_folder, write_instance
from PIL import Image, ImageDraw

from mifo.boxes import Box, Layout
from mifo.bundle.store import load_bundle
from mifo.cli.parts import instance_of
from mifo.config import KeepConfig
from mifo.data.instance import load_instance
from mifo.errors import InputError
from mifo.evaluation.backend import Seen
from mifo.evaluation.cases import Case, CaseImage
from mifo.evaluation.measure import measure_images, summarize
from mifo.evaluation.toybox_backend import ToyboxBackend, agreement
from mifo.learning.learn import learn
from mifo.presets import learn_preset
from mifo.toybox.examples import EXAMPLES, write_example
from mifo.toybox.world import Scene, draw_scene, placed

PROMPT = "a photo of <asset0> and <asset1> on the grass"
BOXES = "[[0.05, 0.1, 0.47, 0.5], [0.53, 0.5, 0.97, 0.9]]"
TOYBOX = ("--backend", "toybox", "--steps", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`twins/`, an instance with its truth, and `bundles/twins` learned from it in seconds. Never write into them."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_example("twins", folder / "twins")
    mifo("learn", folder / "twins", "--model-path", tiny_base_folder(), "--output-dir", folder / "bundles", *FAST)
    return folder


def evaluate(bundle: Path, output: Path, *more: object, **options: int) -> dict[str, Any]:
    mifo("evaluate", bundle, "--output-path", output, *TOYBOX, *more, **options)
    return json.loads((output / "evaluation.json").read_text())


def test_the_background_is_learned_but_not_measured_as_a_thing(folder: Path, tmp_path: Path):
    learned = tmp_path / "twins"
    mifo("learn", folder / "twins", "--model-path", tiny_base_folder(), "--output-dir", tmp_path, *FAST, "--background-asset",
         "--keep", "best", "--backend", "toybox")  # fmt: skip
    assert load_bundle(learned).tokens == ("<asset0>", "<asset1>", "<background>")
    found = evaluate(learned, tmp_path / "out", "--samples", 1)
    assert found["base_model"]["name"] == tiny_base_folder().name  # and nowhere where it lies
    assert str(tiny_base_folder().parent) not in (tmp_path / "out" / "evaluation.json").read_text()
    assert found["tokens"] == ["<asset0>", "<asset1>"] == list(found["attention_outside"])
    assert len(found["leakage_matrix"]) == 2 and not any("<background>" in case["prompt"] for case in found["cases"])
    assert instance_of(load_bundle(learned), folder / "twins").tokens == ("<asset0>", "<asset1>")


# --- against the drawn truth --------------------------------------------------------------------


@pytest.fixture(scope="module")
def cars(tmp_path_factory: pytest.TempPathFactory) -> ToyboxBackend:
    write_example("toy_car", folder := tmp_path_factory.mktemp("cars") / "toy_car")
    return ToyboxBackend(load_instance(folder))


CENTERS = ((0.27, 0.24), (0.72, 0.47), (0.31, 0.76))
TOKENS = ("<asset0>", "<asset1>", "<asset2>")


def drawn(order: list[int | None]) -> CaseImage:
    """The three cars' places, with car `order[k]` standing in the box of asset k; None leaves it empty."""
    things = EXAMPLES["toy_car"].things
    here = tuple(placed(things[who], CENTERS[k], 0.42) for k, who in enumerate(order) if who is not None)
    boxes = tuple(Box(*placed(thing, center, 0.42).box) for thing, center in zip(things, CENTERS, strict=True))
    prompt = "a photo of <asset0> and <asset1> and <asset2> at the beach"
    return CaseImage(Case(prompt, Layout(TOKENS, boxes)), 0, draw_scene(Scene(here, "beach", 5)).image, "drawn.png")


def test_a_perfect_picture_a_swapped_one_and_one_with_a_hole(cars: ToyboxBackend):
    perfect, swapped, hole = measure_images([drawn([0, 1, 2]), drawn([1, 0, 2]), drawn([0, None, 2])], cars, TOKENS)
    assert perfect["identity"] == perfect["identity_margin"] == perfect["right_instance"] == [1, 1, 1]
    assert perfect["detect_and_compare"] == 1 and perfect["count_right"] and not any(perfect["confused"])
    assert min(perfect["ious"]) > 0.7 and perfect["prompt_fit"] == 1
    assert swapped["confused"] == [True, True, False] and swapped["identity_margin"][0] < 0
    assert swapped["right_instance"] == [0, 0, 1] and swapped["detect_and_compare"] == 1  # it sees no places
    assert hole["ious"][1] == 0 and hole["identity"][1] == 0 and hole["crops"][1] is None
    assert not hole["count_right"] and hole["detect_and_compare"] == 0 and not hole["confused"][1]
    summary = summarize([perfect, swapped, hole], cars.thresholds)["in_boxes"]
    assert summary["collapse_below_0.5"]["mean"] == pytest.approx(3 / 9, abs=1e-4)  # the two swapped ones, and the missing one
    assert summary["count_right"]["mean"] == pytest.approx(2 / 3, abs=1e-4)


def test_the_judge_reads_what_the_truth_says(cars: ToyboxBackend, tmp_path: Path):
    write_example("toy_car", tmp_path / "toy_car")
    (tmp_path / "toy_car" / "truth.json").unlink()
    read = ToyboxBackend(load_instance(tmp_path / "toy_car"), judge=cars.judge)
    assert read.looks == cars.looks and cars.from_truth and not read.from_truth
    assert read.words[0] == "red and white striped car"


def test_checkered_things_have_no_main_color():
    red, white = ("car", "red", "white", "checkered"), ("car", "white", "red", "checkered")
    assert agreement(red, white) == 1 and agreement((*red[:3], "dotted"), white) == 0.25
    assert agreement(("car", "red", None, "plain"), ("car", "red", "white", "striped")) == 0.5


# --- photographs: wiring only, on tiny random models ---------------------------------------------


@pytest.fixture(scope="module")
def photo_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """DINOv2, CLIP and OWLv2 in miniature, random weights: what they see means nothing."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model, Owlv2Config, Owlv2ForObjectDetection

    folder = tmp_path_factory.mktemp("photo_models")
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_base_folder() / "tokenizer")
    tokenizer.model_max_length = 16
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {**small, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**small, image_size=32, patch_size=8)).save_pretrained(folder / "dino")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder / "clip")
    detector = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32))
    detector.save_pretrained(folder / "owl")
    common = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "do_resize": True, "do_rescale": True}
    square = {"size": {"height": 32, "width": 32}}
    write = {
        "dino": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}, "do_center_crop": False},
        "clip": {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor", **square,
                 "do_center_crop": False},
        "owl": {"image_processor_type": "Owlv2ImageProcessor", "processor_class": "Owlv2Processor", **square, "do_pad": True},
    }  # fmt: skip
    for name, settings in write.items():
        (folder / name / "preprocessor_config.json").write_text(json.dumps({**common, **settings}))
        if name != "dino":
            tokenizer.save_pretrained(folder / name)
    return {"dino": str(folder / "dino"), "clip": str(folder / "clip"), "detector": str(folder / "owl")}


def test_photo_back_end_wiring(photo_models: dict[str, str], tmp_path: Path):
    from mifo.evaluation.photo_backend import PhotoBackend

    write_instance(tmp_path / "cups")
    (tmp_path / "cups" / "words.txt").write_text("red mug\nblue house\n")
    instance = load_instance(tmp_path / "cups")
    backend = PhotoBackend(instance, **photo_models, min_score=0.0)
    seen, blank = backend.see([instance.image, Image.new("RGB", (96, 64), "white")])
    assert all(0 <= v <= 1 for d in seen.detections for v in d.box) and {d.label for d in seen.detections} <= set(backend.words)
    cup = Image.new("RGB", instance.image.size, (127, 127, 127))
    cup.paste(instance.image, (0, 0), instance.masks[1])
    x0, y0, x1, y1 = instance.masks[1].getbbox()
    rows = backend.similarity(Seen(cup, ()), [(x0 / 96, y0 / 64, x1 / 96, y1 / 64), None])
    assert rows[0, 1] == pytest.approx(1, abs=1e-5) and rows[0, 0] < rows[0, 1]  # the source crop itself
    assert rows[1].tolist() == [0, 0] and np.allclose(np.diag(backend.among_sources()), 1)
    assert abs(backend.distance(seen, seen)) < 1e-5 < backend.distance(seen, blank)
    with_words = backend.prompt_fit(seen, "a photo of red mug", [])
    assert backend.prompt_fit(seen, "a photo of <asset0>", [0]) == pytest.approx(with_words)
    picture = CaseImage(Case(PROMPT, Layout(TOKENS[:2], (Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1)))), 0, instance.image, "cups.png")
    (record,) = measure_images([picture], backend, TOKENS[:2])
    assert all(record["crops"])  # a detector that misses is no proof that nothing is there
    assert backend.facts()["revisions"] == {"dino": None, "clip": None, "detector": None}  # local folders
    assert backend.facts()["models"] == {"dino": "dino", "clip": "clip", "detector": "owl"}  # not where they lie
    models = {**photo_models, "clip": str(tmp_path)}
    words = [w for kind, path in models.items() for w in (f"--{kind}", path)]
    result = mifo("evaluate", copy_bundle(tmp_path / "bundle"), "--output-path", tmp_path / "out", *words, exit_code=2)
    assert f"the clip model '{tmp_path}' cannot be loaded" in result.stderr


def test_a_models_own_code_is_never_run(photo_models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Not even when the terminal's answer to transformers' question would be yes."""
    from mifo.evaluation.photo_backend import PhotoBackend

    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    instance, canary = load_instance(write_instance(tmp_path / "cups")), tmp_path / "canary"
    for kind, path in photo_models.items():
        folder = Path(shutil.copytree(path, tmp_path / kind))
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
        for name in ("config.json", "preprocessor_config.json"):
            edit_json(folder / name, model_type="evil", auto_map=dict.fromkeys(
                ("AutoConfig", "AutoModel", "AutoModelForZeroShotObjectDetection", "AutoProcessor", "AutoImageProcessor"),
                "evil.Evil"))  # fmt: skip
        with pytest.raises(InputError, match=f"the {kind} model .* cannot be loaded"):
            PhotoBackend(instance, **{**photo_models, kind: str(folder)})
        assert not canary.exists()


def test_a_models_pickle_or_pipe_is_never_opened(photo_models: dict[str, str], tmp_path: Path):
    from mifo.evaluation.photo_backend import PhotoBackend

    instance = load_instance(write_instance(tmp_path / "cups"))
    folder = Path(shutil.copytree(photo_models["dino"], tmp_path / "dino"))
    weights = folder / "model.safetensors"
    torch.save({}, folder / "pytorch_model.bin")
    weights.rename(tmp_path / "weights")
    with pytest.raises(InputError, match=r"the dino model .* cannot be loaded"):
        PhotoBackend(instance, **{**photo_models, "dino": str(folder)})
    os.mkfifo(weights)
    with pytest.raises(InputError, match=r"the dino model .* cannot be loaded .*pipe"):
        PhotoBackend(instance, **{**photo_models, "dino": str(folder)})


def test_models_from_the_hub_are_pinned_and_their_commits_recorded(photo_models: dict[str, str], tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    from mifo.evaluation.photo_backend import PhotoBackend
    from mifo.model.hub_models import CLIP, DETECTOR, DINO, REVISIONS

    asked = {}

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked[name] = revision
        assert set(allow_patterns) == {"*.json", "*.txt", "*.safetensors"}
        kind = {DINO: "dino", CLIP: "clip"}.get(name, "detector")
        commit = revision if name in REVISIONS else "5" * 40
        return shutil.copytree(photo_models[kind], tmp_path / name / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / DINO).mkdir(parents=True)  # a folder that happens to have the name is not what is meant
    assert all(re.fullmatch("[0-9a-f]{40}", REVISIONS[name]) for name in (DINO, CLIP, DETECTOR))
    backend = PhotoBackend(load_instance(write_instance(tmp_path / "cups")), detector="somebody/owl")
    assert asked == {DINO: REVISIONS[DINO], CLIP: REVISIONS[CLIP], "somebody/owl": "main"}
    assert backend.facts()["revisions"] == {"dino": REVISIONS[DINO], "clip": REVISIONS[CLIP], "detector": "5" * 40}


# --- the command --------------------------------------------------------------------------------


def test_evaluate_twice_gives_the_same_json(folder: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na photo of <asset1> in the snow\n")
    more = ("--prompts", tmp_path / "prompts.txt", "--boxes", BOXES, "--samples", 2, "--seed", 7)
    found = evaluate(folder / "bundles" / "twins", tmp_path / "first", *more)
    again = evaluate(folder / "bundles" / "twins", tmp_path / "second", *more)
    assert found == again
    assert [(p["seed"], p["name"]) for p in found["pictures"]] == [
        (7, "00-000007.png"), (8, "00-000008.png"), (7, "01-000007.png"), (8, "01-000008.png")]  # fmt: skip
    assert set(found["attention_outside"]) == {"<asset0>", "<asset1>"}
    assert all(0 <= found["attention_in_others"][t] <= found["attention_outside"][t] <= 1 for t in found["tokens"])
    assert found["drift"]["mean"] > 0 and found["backend"]["instances_from"] == "truth.json"  # kept in the bundle
    assert found["source_similarity"] == [[1, 0.75], [0.75, 1]] and "definitions" in found
    for name in ("contact.png", "plots.png", "pictures/01-000008.png"):
        assert Image.open(tmp_path / "first" / name).width >= 64
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "letter.txt").write_text("not ours")
    mifo("evaluate", folder / "bundles" / "twins", "--output-path", tmp_path / "third", *TOYBOX, exit_code=2)


def test_without_matplotlib_all_but_the_charts_is_written_and_said(folder: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    monkeypatch.setattr("mifo.evaluation.report.can_plot", lambda: False)
    said = mifo("evaluate", folder / "bundles" / "twins", "--samples", 1, "--output-path", tmp_path / "out", *TOYBOX)
    assert "no charts, because matplotlib is not installed" in said.stderr
    there = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"evaluation.json", "contact.png", "pictures"} <= there and "plots.png" not in there


def test_evaluate_pictures_that_exist_and_an_edit(folder: Path, tmp_path: Path):
    bundle = folder / "bundles" / "twins"
    mifo("synthesize", bundle, "--prompt", PROMPT, "--boxes", BOXES, "--batch-size", 2, "--seed", 4, "--steps", 2,
         "--output-path", tmp_path / "pictures")  # fmt: skip
    before = tmp_path / "pictures" / "000004.png"
    after = Image.open(before)
    after.putpixel((3, 3), (0, 0, 0))
    after.save(tmp_path / "after.png")
    mask = Image.new("L", after.size)
    ImageDraw.Draw(mask).rectangle((20, 20, 40, 40), fill=255)
    mask.save(tmp_path / "mask.png")
    edit = ("--original", before, "--edited", tmp_path / "after.png", "--edit-mask", tmp_path / "mask.png")
    found = evaluate(bundle, tmp_path / "out", "--images", tmp_path / "pictures", *edit)
    assert [(p["seed"], p["name"], len(p["ious"])) for p in found["pictures"]] == [(4, "000004.png", 2), (5, "000005.png", 2)]
    assert found["cases"][0]["boxes"]["<asset0>"] == json.loads(BOXES)[0]
    assert found["edit_preservation"]["changed_pixels"] == 1 and not (tmp_path / "out" / "pictures").exists()
    for wrong, said in (
        (("--images", tmp_path), r"after\.png does not say what was asked for"),
        (("--images", tmp_path / "none"), "there is no folder"),
        (("--original", before), "--edited, --edit-mask is missing"),
        ((*edit[:-1], folder / "twins" / "mask0.png"), "different sizes"),
    ):
        result = mifo("evaluate", bundle, "--output-path", tmp_path / "x", *TOYBOX, *wrong, exit_code=2)
        assert not (tmp_path / "x").exists()

        assert re.search(said, result.stderr), result.stderr


# --- best of, keep best -------------------------------------------------------------------------


def test_best_of_keeps_the_best_seed_bit_for_bit(folder: Path, tmp_path: Path):
    words = ("synthesize", folder / "bundles" / "twins", "--prompt", PROMPT, "--boxes", BOXES, "--steps", 2)
    printed = mifo(*words, "--backend", "toybox", "--best-of", 3, "--seed", 10, "--output-path", tmp_path / "best", "--json")
    ranking = json.loads(printed.stdout)["best_of"]
    record = json.loads((tmp_path / "best" / "synthesis.json").read_text())
    assert record["best_of"] == ranking and record["seed"] == ranking[0]["seed"]
    assert sorted(r["seed"] for r in ranking) == [10, 11, 12]
    assert [r["score"] for r in ranking] == sorted((r["score"] for r in ranking), reverse=True)
    (name,) = record["images"]
    mifo(*words, "--seed", ranking[0]["seed"], "--output-path", tmp_path / "alone")
    pictures = [Image.open(tmp_path / where / name).tobytes() for where in ("best", "alone")]
    assert pictures[0] == pictures[1]
    mifo(*words, "--best-of", 3, "--batch-size", 2, "--output-path", tmp_path / "no", exit_code=2)


def test_keep_best_returns_to_the_best_checkpoint(tmp_path: Path):
    """The judge says that step 1 of 4 was best: what is saved is what one step alone would have learned."""
    preset = learn_preset("stable-diffusion")
    config = replace(preset, embedding=replace(preset.embedding, train_steps=1), lora=replace(preset.lora, rank=2),
                     prior=replace(preset.prior, enabled=False))  # fmt: skip
    instance = load_instance(write_instance(tmp_path / "cups"))
    scores = iter([0.0, 1.0, 0.5, 0.2, 9.0])
    seen = []

    def judge(base: Any, data: Any, tokens: Any, terms: Any) -> dict[str, float]:
        seen.append(tokens)
        return {"score": next(scores)}

    def learned(name: str, steps: int, keep: KeepConfig) -> Any:
        chosen = replace(config, lora=replace(config.lora, train_steps=steps), keep=keep)
        return learn(instance, load_base(), chosen, tmp_path / name, judge=judge)

    best = learned("best", 4, KeepConfig(enabled=True, every_steps=1, patience=2))
    assert best.metadata["kept"]["step"] == 1 and [c["step"] for c in best.metadata["kept"]["checks"]] == [0, 1, 2, 3]
    assert list(seen[0]) == ["<asset0>", "<asset1>"]
    one = learned("one", 1, KeepConfig())
    assert torch.equal(best.token_embeddings, one.token_embeddings)
    for part in ("unet_lora", "text_lora"):
        weights = [(tmp_path / name / part / "adapter_model.safetensors").read_bytes() for name in ("best", "one")]
        assert weights[0] == weights[1]
    assert "kept" not in one.metadata


def test_keep_best_by_the_judge_from_the_command_line(folder: Path, tmp_path: Path):
    mifo("learn", folder / "twins", "--model-path", tiny_base_folder(), "--output-dir", tmp_path, *FAST, "--keep", "best",
         "--backend", "toybox")  # fmt: skip
    kept = load_bundle(tmp_path / "twins").metadata["kept"]
    assert kept["phase"] == "lora" and {"score", "identity_margin", "attention_in_others"} <= set(kept["checks"][0])


# --- bundles without their picture --------------------------------------------------------------


def test_a_bundle_keeps_what_it_was_learned_from(folder: Path, tmp_path: Path):

    bundle = Path(shutil.copytree(folder / "bundles" / "twins", tmp_path / "twins"))
    kept = load_instance(bundle / "instance")
    assert kept.count == 2 and kept.image.size == (128, 128) and kept.words == load_instance(folder / "twins").words
    shutil.rmtree(bundle / "instance")
    result = mifo("evaluate", bundle, "--output-path", tmp_path / "out", *TOYBOX, exit_code=2)
    assert "--instance" in result.stderr
    write_example("toy_car", tmp_path / "toy_car")
    result = mifo("evaluate", bundle, "--output-path", tmp_path / "out", "--instance", tmp_path / "toy_car", *TOYBOX, exit_code=2)
    assert "3 masks, but the bundle has 2 assets" in result.stderr
