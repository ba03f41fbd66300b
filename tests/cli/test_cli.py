"""The command line from end to end on a tiny random model: what each command writes, prints and repeats."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import (
    FAST,
    ROOT,
    copy_bundle,
    learn_arguments,
    load_base,
    mifo,
    snapshot,
    tiny_base_folder,
    tiny_bundle_folder,
    write_instance,
)
from _warm import command_line
from PIL import Image

from mifo.bundle.store import load_bundle
from mifo.config import PriorConfig
from mifo.learning.prior import PriorData, make_prior
from mifo.presets import learn_preset

PROMPT = "a photo of <asset0> and <asset1>"
BOXES = "[[0.0, 0.1, 0.5, 0.9], [0.5, 0.1, 1.0, 0.9]]"
QUICK = ["--steps", "2"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(*arguments: object, folder: Path, anew: bool = False) -> subprocess.Popen[str]:
    """The command line in a process of its own: one that Ctrl-C reaches, wherever the tests run. `anew`: as users start it, with
    all that is imported."""
    command = [sys.executable, ROOT / "cli.py", *arguments] if anew else command_line(*arguments)
    return subprocess.Popen([str(word) for word in command], cwd=folder, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `learn` wrote and printed: `cups/` and `printed.json`. Never write into it."""
    folder = tmp_path_factory.mktemp("learned")
    write_instance(folder / "cups")
    result = mifo(*learn_arguments(folder / "cups", folder / "bundles", "--seed", 3, "--json"))
    (folder / "printed.json").write_text(result.stdout)
    return folder


def synthesize(output: Path, *more: object, prompt: str = PROMPT) -> dict[str, Any]:
    """What `synthesize` printed, on the shared bundle."""
    result = mifo("synthesize", tiny_bundle_folder(), "--prompt", prompt, "--output-path", output, *QUICK, *more, "--json")
    return json.loads(result.stdout)


def pixels(path: str | Path) -> bytes:
    return Image.open(path).tobytes()


# --- starting -----------------------------------------------------------------------------------


def test_help_is_there_at_once():
    code = "import sys, mifo.cli; print([m for m in ('torch', 'numpy', 'PIL', 'diffusers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], env=ENVIRONMENT, text=True).strip() == "[]"
    for command in ("learn", "synthesize", "boxes", "export", "demo"):
        assert "--json" in mifo(command, "--help").stdout
    assert mifo("--version").stdout.strip().count(".") == 2


def test_in_processes_of_their_own_learn_then_synthesize(tmp_path: Path):
    write_instance(tmp_path / "photos" / "cups")
    process = start("learn", "cups", "--folder-path", "photos", "--model-path", tiny_base_folder(), *FAST, folder=tmp_path,
                    anew=True)  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "learned <asset0>, <asset1> in " in out and "Model_ours/cups" in out and "% of its attention is inside its mask" in out
    assert "phase 1, tokens" in err and "phase 2, LoRA" in err and "diffusion=" in err  # progress, with the loss's parts
    for noise in ("torchvision", "Warning", "warn", "Loading weights"):
        assert noise not in out + err
    process = start("synthesize", "cups", "--prompt", PROMPT, "--boxes", BOXES, *QUICK, "--json", folder=tmp_path,
                    anew=True)  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("\n") == 1 and json.loads(out)["images"] == ["output/cups/0001/000000.png"]
    assert "denoising" in err and "torchvision" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Model_ours", "output", "photos"]


# --- learn --------------------------------------------------------------------------------------


def test_learn_writes_a_bundle_and_prints_its_summary(learned: Path):
    facts = json.loads((learned / "printed.json").read_text())
    bundle = load_bundle(learned / "bundles" / "cups")
    assert Path(facts["bundle"]) == bundle.folder and facts["tokens"] == ["<asset0>", "<asset1>"] == list(bundle.tokens)
    assert facts["seconds"] > 0 and facts["peak_gib"] > 0.1 and 0 < facts["mib"] < 5
    assert set(facts["attention_inside_mask"]) == set(bundle.tokens)
    for name in ("preview", "attention"):
        assert Image.open(facts[name]).width > 200
    assert (bundle.config.seed, bundle.config.lora.rank, bundle.config.embedding.train_steps) == (3, 2, 2)
    assert sorted(p.name for p in bundle.folder.iterdir()) == [
        "assets.safetensors", "attention.png", "attention.webp", "bundle.json", "instance", "manifest.json", "preview.png",
        "text_lora", "unet_lora",
    ]  # fmt: skip


def test_the_same_seed_learns_the_same_bits(learned: Path, tmp_path: Path):
    mifo(*learn_arguments(learned / "cups", tmp_path, "--seed", 3))
    first, second = snapshot(learned / "bundles" / "cups"), snapshot(tmp_path / "cups")
    differ = {name for name in first | second if first.get(name) != second.get(name)}
    assert differ <= {"bundle.json", "manifest.json"}  # the seconds, and their digest


def test_a_photo_as_a_camera_makes_it(tmp_path: Path):
    """12 megapixels, not square, stored on its side; the masks were drawn on what a viewer shows."""
    folder = tmp_path / "photo"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.effect_noise((400, 300), 60).convert("RGB").resize((4000, 3000)).save(folder / "img.jpg", exif=exif)
    for index, box in enumerate(((200, 300, 1400, 1800), (1500, 2000, 2900, 3900))):
        mask = Image.new("1", (3000, 4000))
        mask.paste(1, box)
        mask.save(folder / f"mask{index}.png")
    more = ("--phase1-learning-rate", "0", "--phase2-train-steps", "0", "--initializer-tokens", "red car,", "--name", "by-hand")
    mifo(*learn_arguments(folder, tmp_path / "out", *more))
    bundle = load_bundle(tmp_path / "out" / "by-hand")
    assert bundle.adapters == () and os.listdir(tmp_path / "out") == ["by-hand"]  # without phase 2 no prior is drawn
    base = load_base()
    words = base.text_encoder.get_input_embeddings()(torch.tensor(base.tokenizer("red car").input_ids[1:-1])).mean(0)
    similarity = torch.cosine_similarity(bundle.token_embeddings, words[None])
    assert similarity[0] > 0.9 > 0.5 > similarity[1]


def test_break_a_scenes_recipe_runs(learned: Path, tmp_path: Path):
    options = ("--recipe", "break-a-scene", "--no-prior-preservation", "--no-train-text-encoder")
    mifo(*learn_arguments(learned / "cups", tmp_path, *options))
    bundle = load_bundle(tmp_path / "cups")
    assert bundle.config.recipe == "break-a-scene" and bundle.config.lora.attention.loss == "match"
    assert bundle.adapters == ("unet_lora",)


@pytest.mark.parametrize("loss", ["reward-penalty", "match", "none"])
def test_the_attention_loss_that_was_asked_for_is_learned_with(learned: Path, tmp_path: Path, loss: str):
    mifo(*learn_arguments(learned / "cups", tmp_path, "--attention-loss", loss, "--no-prior-preservation"))
    config = load_bundle(tmp_path / "cups").config
    assert config.recipe == "mifo"
    assert {config.embedding.attention.loss, config.lora.attention.loss} == {loss}


def test_weights_of_the_attention_terms_reach_both_phases(learned: Path, tmp_path: Path):
    options = ("--penalty-weight", "0.7", "--relative-penalty-weight", "0.3", "--no-prior-preservation")
    mifo(*learn_arguments(learned / "cups", tmp_path, *options))
    config = load_bundle(tmp_path / "cups").config
    for terms in (config.embedding.attention, config.lora.attention):
        assert (terms.penalty_weight, terms.relative_penalty_weight) == (0.7, 0.3)


def test_a_factor_of_the_presets_steps(learned: Path, tmp_path: Path):
    """Of both phases and of the reward in the first; a number of steps that is given says it exactly."""
    arguments = list(learn_arguments(learned / "cups", tmp_path))
    del arguments[(exact := arguments.index("--phase1-train-steps")) : exact + 2]
    mifo(*arguments, "--step-factor", 0.01)
    config, preset = load_bundle(tmp_path / "cups").config, learn_preset("stable-diffusion")
    assert config.embedding.train_steps == preset.embedding.train_steps // 100
    assert config.embedding.attention.reward_steps == preset.embedding.attention.reward_steps // 100
    assert config.lora.train_steps == 2


def test_without_an_instance_each_of_the_folder_is_learned(tmp_path: Path):
    for name in ("a", "b"):
        write_instance(tmp_path / "photos" / name, assets=1)
    options = ("--phase2-train-steps", "0", "--model-path", tiny_base_folder(), "--phase1-train-steps", "1", "--json")
    result = mifo("learn", "--folder-path", tmp_path / "photos", "--output-dir", tmp_path / "out", *options)
    assert [b["bundle"] for b in json.loads(result.stdout)["bundles"]] == [str(tmp_path / "out" / n) for n in ("a", "b")]


def test_the_prior_is_drawn_once_and_a_damaged_cache_again(tmp_path: Path):
    base, config, drawn = load_base(), PriorConfig(num_class_images=2, sampling_steps=1, class_prompt="a car|a fish"), []

    def make() -> PriorData:
        return make_prior(base, config, base.resolution, 0, tmp_path / ".prior", lambda done, total: drawn.append(done))

    first = make()
    assert torch.equal(make().latents, first.latents) and drawn == [2] and first.prompts == ("a car", "a fish")
    (cache,) = (tmp_path / ".prior").iterdir()
    whole = cache.read_bytes()
    for damaged in (whole[:-1], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        cache.write_bytes(damaged)
        assert torch.equal(make().latents, first.latents)
        assert torch.equal(make().latents, first.latents) and os.listdir(tmp_path / ".prior") == [cache.name]
    assert drawn == [2] * 4


# --- synthesize ---------------------------------------------------------------------------------


def test_pictures_are_named_by_seed_and_say_how_they_were_made(tmp_path: Path):
    facts = synthesize(tmp_path / "p", "--boxes", BOXES, "--seed", 7, "--batch-size", 2)
    assert facts["images"] == [str(tmp_path / "p" / "000007.png"), str(tmp_path / "p" / "000008.png")]
    names = ["000007.png", "000008.png", "contact.png", "manifest.json", "synthesis.json"]
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == names
    assert Image.open(facts["contact_sheet"]).width > 2 * 256
    record = json.loads(Path(facts["json"]).read_text())
    assert record["images"] == ["000007.png", "000008.png"] and record["guidance_history"]
    for seed in (7, 8):
        image = Image.open(tmp_path / "p" / f"{seed:06d}.png")
        recipe = json.loads(image.text["mifo"])  # type: ignore[attr-defined]
        assert (recipe["prompt"], recipe["seed"], recipe["batch_size"]) == (PROMPT, seed, 1)
        assert recipe["boxes"] == {"<asset0>": [0.0, 0.1, 0.5, 0.9], "<asset1>": [0.5, 0.1, 1.0, 0.9]}
        assert recipe["config"]["steps"] == 2 and recipe["bundle"] == "two_cups"
        assert recipe["base_model"] == tiny_base_folder().name


def test_the_same_seed_draws_the_same_pixels_in_a_file_or_a_batch(tmp_path: Path):
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"asset1": [0.5, 0.1, 1.0, 0.9], "<asset0>": [0.0, 0.1, 0.5, 0.9]}))
    first = synthesize(tmp_path / "a", "--boxes", BOXES, "--seed", 7, "--width", 64, "--height", 32)["images"]
    again = synthesize(tmp_path / "b", "--boxes", boxes, "--seed", 7, "--width", 64, "--height", 32)["images"]
    assert Image.open(first[0]).size == (64, 32)
    assert pixels(first[0]) == pixels(again[0])
    other = synthesize(tmp_path / "c", "--boxes", BOXES, "--seed", 8, "--width", 64, "--height", 32)["images"]
    assert pixels(first[0]) != pixels(other[0])


def test_options_matter(tmp_path: Path):
    def draw(*more: object) -> bytes:
        return pixels(synthesize(tmp_path / "p", "--boxes", BOXES, *more, "--overwrite")["images"][0])

    usual = draw()
    for option in (["--no-guidance"], ["--no-bounded"], ["--no-own-text"], ["--lora-scale", 0],
                   ["--negative-prompt", "a red car"], ["--guidance-scale", 2], ["--scheduler", "dpm"],
                   ["--scheduler", "unipc"]):  # fmt: skip
        assert draw(*option) != usual, option
    assert draw("--subject-token-indices", "4,6") == usual  # accepted, never needed


def test_without_boxes_and_in_words_for_people(tmp_path: Path):
    result = mifo("synthesize", "two_cups", "--output-dir", tiny_bundle_folder().parent, "--prompt", "a photo of <asset1>",
                  "--output-path", tmp_path / "out", *QUICK)  # fmt: skip
    assert result.stdout.startswith(f"1 picture in {tmp_path / 'out'} (") and "contact.png" in result.stdout
    assert json.loads((tmp_path / "out" / "synthesis.json").read_text())["boxes"] is None


# --- boxes, export ------------------------------------------------------------------------------


def test_boxes_are_drawn_before_anything_runs(tmp_path: Path):
    facts = json.loads(mifo("boxes", BOXES, "--output-path", tmp_path / "new" / "boxes.png", "--json").stdout)
    assert facts["boxes"] == {"<asset0>": [0.0, 0.1, 0.5, 0.9], "<asset1>": [0.5, 0.1, 1.0, 0.9]}
    drawn = Image.open(facts["image"])
    assert drawn.size == (512, 512) and len(drawn.getcolors(1 << 20)) > 3
    Image.new("RGB", (90, 60), "navy").save(tmp_path / "photo.jpg")
    options = ("--image", tmp_path / "photo.jpg", "--prompt", "<asset1> by <asset0>", "--output-path", tmp_path / "over.png")
    assert mifo("boxes", BOXES, *options).stdout.strip() == str(tmp_path / "over.png")
    assert Image.open(tmp_path / "over.png").size == (90, 60)


def test_drawing_boxes_needs_no_torch(tmp_path: Path):
    code = f"import sys, mifo.cli as c\ntry: c.app(['boxes', '{BOXES}'])\nexcept SystemExit: print('torch' in sys.modules)"
    out = subprocess.check_output([sys.executable, "-c", code], env=ENVIRONMENT, cwd=tmp_path, text=True)
    assert out.splitlines() == ["output/boxes-0001.png", "False"]


def test_export_writes_what_diffusers_reads(tmp_path: Path):
    arguments = ("export", tiny_bundle_folder(), "--output-path", tmp_path / "for_diffusers")
    names = ["asset0.safetensors", "asset1.safetensors", "pytorch_lora_weights.safetensors"]
    assert json.loads(mifo(*arguments, "--json").stdout) == {"folder": str(tmp_path / "for_diffusers"), "files": names}
    assert "asset0.safetensors, asset1.safetensors" in mifo(*arguments, "--overwrite").stdout


# --- stopped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"),
                                                      (signal.SIGHUP, 129, "terminated")])  # fmt: skip
def test_a_stopped_learn_keeps_the_earlier_bundle(
    tmp_path: Path, how: signal.Signals, status: int, word: str, request: pytest.FixtureRequest
):
    before_tests = signal.signal(how, lambda *_: None)  # a process under nohup would ignore the signal, and so would its own
    request.addfinalizer(lambda: signal.signal(how, before_tests))
    folder = copy_bundle(tmp_path / "out")
    write_instance(tmp_path / "two_cups")
    before = snapshot(tmp_path)
    process = start(*learn_arguments(tmp_path / "two_cups", tmp_path / "out", "--no-prior-preservation"),
                    "--phase1-train-steps", "100000", folder=tmp_path)  # fmt: skip
    seen = ""
    while "diffusion=" not in seen:  # it has begun to learn
        character = process.stderr.read(1)  # type: ignore[union-attr]
        assert character, seen
        seen += character
    process.send_signal(how)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status and out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"{word}: nothing half-written is left; kept: {folder}; the state at phase 1, step ")
    assert last.endswith(" of 100000 is kept: the same command with --resume goes on from there")
    assert "Traceback" not in err
    shutil.rmtree(tmp_path / "out" / ".checkpoints")
    assert snapshot(tmp_path) == before
