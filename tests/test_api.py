"""The eight names, as a program uses them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _pages import PAGES, blocks_of
from _tiny import (
    copy_bundle,
    snapshot,
    tiny_base_folder,
    tiny_bundle_folder,
    tiny_xl_bundle_folder,
    tiny_xl_folder,
    write_instance,
)
from _tiny import mifo as mifo_command
from PIL import Image

import mifo
from mifo import edit, evaluate, learn, load_base_model, load_bundle, load_instance, plan, synthesize
from mifo.config import GuidanceConfig, LearnConfig, RefinementConfig, SynthesisConfig
from mifo.errors import InputError
from mifo.jobs.job import LearnJob
from mifo.jobs.workshop import Workshop
from mifo.learning.trainer import Progress
from mifo.model import load_base
from mifo.presets import edit_preset, learn_preset, synthesis_preset

BOXES = [[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]
BOTH = "a photo of <asset0> and <asset1>"


def test_the_names_are_there_and_importing_them_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys, mifo\n"
        "assert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules), 'heavy'\n"
        "assert set(mifo.__all__) <= set(dir(mifo))\n"
        "assert all(callable(getattr(mifo, name)) and getattr(mifo, name).__doc__ for name in mifo.__all__)\n"
        "assert 'torch' in sys.modules and not hasattr(mifo, 'learner')\n"
    )
    root = Path(mifo.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_learn_place_and_edit_in_eight_lines(tmp_path: Path) -> None:
    base = load_base_model(str(tiny_base_folder()))
    photo = load_instance(write_instance(tmp_path / "cups"))
    short = learn_preset(base.family)
    short = replace(short, embedding=replace(short.embedding, train_steps=1), lora=replace(short.lora, train_steps=1),
                    prior=replace(short.prior, enabled=False))  # fmt: skip
    seen: list[str] = []
    bundle = learn(photo, base, tmp_path / "bundles" / "cups", short, seed=4, on_progress=lambda p: seen.append(p.phase))
    assert bundle.tokens == ("<asset0>", "<asset1>") and bundle.config.seed == 4 and {"embedding", "lora"} <= set(seen)

    quick = replace(synthesis_preset(base.family), steps=2)
    result = synthesize(base, load_bundle(tmp_path / "bundles" / "cups"), BOTH, BOXES, num_images=2, seed=7, config=quick)
    assert [image.size for image in result.images] == [(base.resolution, base.resolution)] * 2
    paths = result.save(tmp_path / "first")
    assert [p.name for p in paths] == ["000007.png", "000008.png"] and (tmp_path / "first" / "synthesis.json").is_file()
    assert np.array_equal(np.asarray(Image.open(paths[1])), np.asarray(result.images[1]))
    with pytest.raises(InputError, match="--overwrite"):
        result.save(tmp_path / "first")
    assert base.unet.config is not None and not hasattr(base.unet, "peft_config"), "the base is handed back as it was"

    edited = edit(base, bundle, photo_of(tmp_path), tmp_path / "cups" / "mask1.png", "a photo of <asset0>", num_images=2,
                  config=replace(edit_preset(base.family), steps=2))  # fmt: skip
    assert [image.size for image in edited.images] == [(96, 64)] * 2 and {"asset", "prompt"} <= set(edited.scores[0])
    assert [p.name for p in edited.save(tmp_path / "edits")] == ["edit00.png", "edit01.png"]
    outside = np.asarray(Image.open(tmp_path / "cups" / "mask1.png")) == 0
    before, after = (np.asarray(Image.open(p).convert("RGB")) for p in (photo_of(tmp_path), tmp_path / "edits" / "edit00.png"))
    assert np.array_equal(before[outside], after[outside])


def photo_of(folder: Path) -> Path:
    return folder / "cups" / "img.png"


def test_no_output_of_a_program_lies_in_what_it_reads(tmp_path: Path) -> None:
    """As no command's does."""
    base, cups = load_base_model(str(tiny_base_folder())), write_instance(tmp_path / "cups")
    bundle, photo = load_bundle(copy_bundle(tmp_path)), load_instance(cups)
    before = snapshot(tmp_path)
    quick = replace(synthesis_preset(base.family), steps=1)
    drawn = synthesize(base, bundle, BOTH, BOXES, config=quick)
    edited = edit(base, bundle, cups / "img.png", cups / "mask1.png", "a photo of <asset0>",
                  config=replace(edit_preset(base.family), steps=1))  # fmt: skip
    for job, message in (
        (lambda: learn(photo, base, cups / "new"), "lies in the instance"),
        (lambda: learn(photo, base, tiny_base_folder() / "new"), "lies in the base model"),
        (lambda: drawn.save(bundle.folder / "pictures"), "lies in the bundle"),
        (lambda: drawn.save(tiny_base_folder() / "pictures", overwrite=True), "lies in the base model"),
        (lambda: edited.save(cups, overwrite=True), "holds image"),
        (lambda: synthesize(base, bundle, BOTH, BOXES, num_images=0), "num_images is 0, expected a whole number"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            job()
    assert snapshot(tmp_path) == before


def test_an_interrupted_run_is_not_forgotten_unasked(tmp_path: Path) -> None:
    base, photo = load_base_model(str(tiny_base_folder())), load_instance(write_instance(tmp_path / "cups"))
    short = learn_preset(base.family)
    short = replace(short, embedding=replace(short.embedding, train_steps=2), lora=replace(short.lora, train_steps=0))

    def stop(progress: Progress) -> None:
        if progress.phase == "previews":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(photo, base, tmp_path / "out" / "cups", short, on_progress=stop)
    with pytest.raises(InputError, match="has a checkpoint"):
        learn(photo, base, tmp_path / "out" / "cups", short)
    assert learn(photo, base, tmp_path / "out" / "cups", short, resume=True).tokens


def test_learning_knows_its_base_models_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of an fp16 base are scaled though the settings do not say so."""
    seen = []
    monkeypatch.setattr("mifo.api.run_learn", lambda instance, base, config, *_, **__: seen.append(config.mixed_precision))
    photo = load_instance(write_instance(tmp_path / "cups"))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        learn(photo, load_base.load_base_model(str(tiny_base_folder()), dtype=dtype), tmp_path / "out")
    assert seen == ["no", "fp16", "bf16"]


class Asked(Exception):
    """Instead of learning."""


def test_more_than_three_things_are_learned_in_more_steps_however_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At three things' steps four look-alikes are confused (LOG.md)."""

    def stop(instance: object, base: object, config: LearnConfig, *_: object, **__: object) -> None:
        raise Asked(config)

    monkeypatch.setattr("mifo.api.run_learn", stop)
    base, bundles = load_base_model("toybox"), tmp_path / "bundles"

    def steps(assets: int, model: str = "toybox", **options: bool) -> tuple[int, int, int]:
        """Of phase 1, of the reward in it, and of phase 2, the same by API, command and job."""
        folder = tmp_path / f"cups{assets}"
        if not folder.exists():
            write_instance(folder, assets)
        asked = []
        ways: list[Callable[[], object]] = [
            lambda: mifo_command("learn", folder, "--model-path", model, "--output-dir", bundles,
                                 *(["--background-asset"] if options else [])),
            lambda: Workshop(bundles).do(LearnJob(str(folder), model=model, **options)),
        ]
        if not options and model == "toybox":
            ways.append(lambda: learn(load_instance(folder), base, bundles / "cups"))
        for way in ways:
            with pytest.raises(Asked) as stopped:
                way()
            found = stopped.value.args[0]
            asked.append((found.embedding.train_steps, found.embedding.attention.reward_steps, found.lora.train_steps))
        assert len(set(asked)) == 1
        return asked[0]

    assert steps(2) == steps(3) == (150, 50, 200) and steps(4) == (200, 67, 267)
    assert steps(3, background=True) == steps(4), "<background> is learned beside them"
    whole = str(tiny_base_folder())
    assert steps(2, whole) == steps(5, whole), "Stable Diffusion's are the published ones: nobody measured others"


def test_boxes_in_every_form_are_the_same_layout(tmp_path: Path) -> None:
    base, bundle = load_base_model(str(tiny_base_folder())), load_bundle(tiny_bundle_folder())
    config = replace(synthesis_preset(base.family), steps=1)
    (tmp_path / "boxes.json").write_text(str(BOXES))
    forms = (BOXES, tuple(map(tuple, BOXES)), np.array(BOXES), dict(zip(bundle.tokens, BOXES, strict=True)), str(BOXES),
             tmp_path / "boxes.json")  # fmt: skip
    layouts = {synthesize(base, bundle, BOTH, form, config=config).synthesis.layout for form in forms}  # type: ignore[arg-type]
    assert len(layouts) == 1
    with pytest.raises(InputError, match=r"expected one \[x0, y0, x1, y1\] per asset"):
        synthesize(base, bundle, BOTH, [1, 2, 3, 4], config=config)  # type: ignore[list-item]
    plain = synthesize(base, None, "a photo of a cup", config=config)
    assert plain.synthesis.layout is None and plain.facts["bundle"] is None


def test_a_bundle_of_the_toybox_is_evaluated(tmp_path: Path) -> None:
    base, photo = load_base_model(), load_instance(Path(__file__).parent.parent / "example" / "twins")
    short = learn_preset("toybox")
    short = replace(short, embedding=replace(short.embedding, train_steps=1), lora=replace(short.lora, train_steps=0),
                    composites=replace(short.composites, num_backgrounds=1))  # fmt: skip
    bundle = learn(photo, base, tmp_path / "twins", short)
    found = evaluate(base, bundle, samples=1, config=replace(synthesis_preset("toybox"), steps=1))
    assert found.record["tokens"] == list(bundle.tokens) and "identity" in str(found)
    assert Path(found.save(tmp_path / "measured")["json"]).is_file()


def test_a_plan_counts_and_refuses() -> None:
    assert plan("toybox", vram_gib=8).fits
    assert plan("sd2.1", "synthesize", assets=2).largest.peak > 1 << 30
    with pytest.raises(InputError, match="does not fit"):
        plan("toybox", "synthesize", vram_gib=0.5).check()
    with pytest.raises(InputError, match="choose learn, synthesize or edit"):
        plan("sd2.1", "draw")


def test_the_lines_of_readme_and_docs_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny models under the names that they give, and few steps; one page after the other in one folder."""
    import mifo.api
    import mifo.synthesis.modular

    blocks = [(page.name, block) for page in PAGES for block in blocks_of(page, "python")]
    assert {name for name, _ in blocks} >= {"README.md", "exchange.md", "learn.md", "place.md"}
    real = mifo.api.learn_preset

    def short(family: str, assets: int) -> LearnConfig:
        config = real(family, assets=assets)
        return replace(config, embedding=replace(config.embedding, train_steps=1), lora=replace(config.lora, train_steps=1),
                       prior=replace(config.prior, enabled=False))  # fmt: skip

    monkeypatch.setattr(mifo.api, "learn_preset", short)
    monkeypatch.setattr(mifo.api, "synthesis_preset", lambda family: replace(synthesis_preset(family), steps=2))
    monkeypatch.setattr(mifo.api, "edit_preset", lambda family: replace(edit_preset(family), steps=2))
    control = SynthesisConfig(guidance=GuidanceConfig(steps=1, max_iterations=1, levels=(1, 2)),
                              refinement=RefinementConfig(levels=(2,)))  # fmt: skip
    monkeypatch.setattr(mifo.synthesis.modular, "synthesis_preset", lambda family: control)
    monkeypatch.chdir(tmp_path)
    write_instance(tmp_path / "my_photos" / "desk", assets=3)
    Image.open(tmp_path / "my_photos" / "desk" / "img.png").save("street.jpg")
    (tmp_path / "mask.png").write_bytes((tmp_path / "my_photos" / "desk" / "mask1.png").read_bytes())
    shutil.copytree(tiny_xl_bundle_folder(), tmp_path / "Model_ours" / "desk_xl")
    for name, block in blocks:
        lines = block.replace('"sd2.1"', repr(str(tiny_base_folder()))).replace('"sdxl"', repr(str(tiny_xl_folder())))
        exec(compile(lines.replace("num_inference_steps=30", "num_inference_steps=2"), name, "exec"), {})
    for written in ("Model_ours/desk/bundle.json", "output/beach/000000.png", "output/street/edit00.png",
                    "output/first/000000.png", "night.png", "pair.png"):  # fmt: skip
        assert (tmp_path / written).is_file()
