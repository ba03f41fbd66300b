"""Stable Diffusion folders and files as people have them: 768 pixels, inpainting, half-precision names, a single file, old
configurations. Each works, or is refused with what to use instead."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import FAST, edit_json, load_base, mifo, tiny_base_folder, write_instance
from PIL import Image
from safetensors.torch import load_file, save_file

from mifo.bundle.store import attach, base_of_bundle, load_bundle
from mifo.errors import InputError
from mifo.model import base_weights
from mifo.model.load_base import HUB_MODELS, load_base_model, resolve
from mifo.model.shapes import SHAPES, shape_of

SD2_AT_768 = {
    "sample_size": 96, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16, 16, 16), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
    "cross_attention_dim": 48, "attention_head_dim": (2, 2, 2, 2), "norm_num_groups": 4, "use_linear_projection": True,
}  # fmt: skip


#: of Stable Diffusion 1.x and 2.x: one text encoder
STEMS = {part: stem for part, stem in base_weights.STEMS.items() if part != "text_encoder_2"}


@pytest.fixture(scope="session")
def folder_at_768(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 2.x at 768 pixels, narrow: 96x96 latents, predicts velocity. The finest level has no attention, which
    would take most of a test's time there."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path_factory.mktemp("sd2") / "sd2_at_768"))
    UNet2DConditionModel(**SD2_AT_768).save_pretrained(folder / "unet")
    edit_json(folder / "vae" / "config.json", sample_size=768)
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    return folder


def test_stable_diffusion_2_at_768_checks_learns_draws_and_edits(folder_at_768: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Before, sites were those with maps of 16 and 32, which latents of 96 do not have."""
    monkeypatch.setattr("mifo.learning.learn.draw_preview", lambda *_: Image.new("RGB", (8, 8)))
    instance = write_instance(tmp_path / "instances" / "pair", size=(128, 128))
    checked = mifo("check", instance, "--model-path", folder_at_768, "--output-path", tmp_path / "check.png", "--json")
    assert json.loads(checked.stdout)["supervised_map_sizes"] == [48, 24]
    mifo("learn", instance, "--model-path", folder_at_768, "--output-dir", tmp_path, *FAST, "--resolution", 128)
    boxes = json.dumps([[0, 0, 0.5, 1], [0.5, 0, 1, 1]])
    common = ("--output-dir", tmp_path, "--steps", 2)
    mifo("synthesize", "pair", "--prompt", "a photo of <asset0> and <asset1>", "--boxes", boxes, "--width", 128, "--height", 128,
         "--output-path", tmp_path / "drawn", *common)  # fmt: skip
    assert Image.open(next((tmp_path / "drawn").rglob("*000000.png"))).size == (128, 128)
    mifo("edit", "pair", "--init-image", instance / "img.png", "--mask", instance / "mask0.png", "--prompt",
         "a photo of <asset1>", "--output-path", tmp_path / "edited", *common)  # fmt: skip
    assert list((tmp_path / "edited").rglob("*.png"))


@pytest.mark.parametrize("job", ["learn", "synthesize", "edit"])
def test_stable_diffusion_2_at_768_is_planned_for(folder_at_768: Path, job: str) -> None:
    found = json.loads(mifo("plan", "--model-path", folder_at_768, "--job", job, "--vram-gib", 64, "--json").stdout)
    assert found["resolution"] == 768 and found["peak_gib"] > 0


def test_stable_diffusion_2_1_was_published_twice() -> None:
    """Before, the random sd2.1 predicted velocity at 512 pixels, which no published model does."""
    shapes = {name: shape_of(name) for name in ("sd2.1", "sd2.1-768")}
    found = {name: (s["vae"]["sample_size"], s["unet"]["sample_size"], s["scheduler"]["prediction_type"])
             for name, s in shapes.items()}  # fmt: skip
    assert found == {"sd2.1": (512, 64, "epsilon"), "sd2.1-768": (768, 96, "v_prediction")}
    assert json.loads(mifo("plan", "--model-path", "sd2.1-768", "--vram-gib", 64, "--json").stdout)["resolution"] == 768
    assert set(HUB_MODELS) == set(SHAPES), "what can be planned for by its name can be fetched by it"


def test_a_folder_with_dpm_solver_as_diffusers_saves_it_learns_draws_and_is_planned_for(tmp_path: Path) -> None:
    """Its least lambda is minus infinity, which strict JSON does not have."""
    from diffusers import DPMSolverMultistepScheduler

    base = Path(shutil.copytree(tiny_base_folder(), tmp_path / "base"))
    own = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    settings = {k: own[k] for k in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")}
    DPMSolverMultistepScheduler(**settings).save_pretrained(base / "scheduler")
    edit_json(base / "model_index.json", scheduler=["diffusers", "DPMSolverMultistepScheduler"])
    assert "-Infinity" in (base / "scheduler" / "scheduler_config.json").read_text()
    instance = write_instance(tmp_path / "instances" / "pair")
    mifo("learn", instance, "--model-path", base, "--output-dir", tmp_path / "bundles", *FAST,
         "--class-prompt", "a photo of a cup")  # fmt: skip
    mifo("synthesize", "pair", "--output-dir", tmp_path / "bundles", "--prompt", "a photo of <asset0>", "--steps", 2,
         "--scheduler", "own", "--output-path", tmp_path / "drawn")  # fmt: skip
    assert list((tmp_path / "drawn").rglob("*000000.png"))
    assert json.loads(mifo("plan", "--model-path", base, "--vram-gib", 64, "--json").stdout)["peak_gib"] > 0


# --- what cannot be right, and other kinds of model ---------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder(), tmp_path / "base"))


@pytest.mark.parametrize(
    "file, key, value",
    [("vae/config.json", "scaling_factor", 0), ("vae/config.json", "scaling_factor", float("nan")),
     ("vae/config.json", "latent_channels", -8), ("unet/config.json", "sample_size", 0),
     ("unet/config.json", "sample_size", [16, 24]), ("unet/config.json", "block_out_channels", []),
     ("scheduler/scheduler_config.json", "beta_start", float("nan")), ("scheduler/scheduler_config.json", "beta_end", 1.5),
     ("scheduler/scheduler_config.json", "trained_betas", [0.1, "x"]),
     ("scheduler/scheduler_config.json", "num_train_timesteps", 0), ("text_encoder/config.json", "hidden_size", "wide")],
)  # fmt: skip
def test_a_setting_that_cannot_be_right_is_refused_by_file_and_key(copy: Path, file: str, key: str, value: Any) -> None:
    edit_json(copy / file, **{key: value})
    with pytest.raises(InputError) as caught:
        load_base_model(str(copy))
    assert file in str(caught.value) and f"has {key} " in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [({"in_channels": 9}, "takes 9 channels and gives 12, but the VAE's latents have 12; give the text-to-image model"),
     ({"out_channels": 16}, "takes 12 channels and gives 16"),
     ({"addition_embed_type": "text_image"}, "has addition_embed_type 'text_image' .*1.x, 2.x and XL"),
     ({"addition_embed_type": "text_time"}, "is Stable Diffusion XL's, but there is no text_encoder_2"),
     ({"class_embed_type": "timestep"}, "has class_embed_type"), ({"time_cond_proj_dim": 256}, "has time_cond_proj_dim"),
     ({"cross_attention_dim": 768}, "gives 128 numbers a token .* takes 768")],
)  # fmt: skip
def test_other_kinds_of_unet_are_refused_with_what_to_use(
        copy: Path, changes: dict[str, Any], message: str, tmp_path: Path) -> None:  # fmt: skip
    edit_json(copy / "unet" / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_base_model(str(copy))
    instance = write_instance(tmp_path / "pair")
    for command in (["check", instance, "--output-path", tmp_path / "c.png"], ["plan"]):
        assert "unet" in mifo(*command, "--model-path", copy, exit_code=2).output.lower()


def test_an_inpainting_model_is_named(tiny_sd_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "base"))
    edit_json(folder / "unet" / "config.json", in_channels=9)
    with pytest.raises(InputError, match=r"an inpainting model.* such as sd1.5, sd2.1 or sdxl, with --model-path"):
        load_base_model(str(folder))


def test_a_tokenizer_with_more_words_than_the_text_encoder_is_refused(copy: Path) -> None:
    path = copy / "tokenizer" / "tokenizer.json"
    record = json.loads(path.read_text())
    record["model"]["vocab"]["more</w>"] = len(record["model"]["vocab"])
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="knows 700 words, but its text encoder has embeddings for 699"):
        load_base_model(str(copy))


def test_a_configuration_of_2022_is_read_as_diffusers_reads_it(tiny_sd_folder: Path, tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "base"))
    assert load_base_model(str(folder)).resolution == 256
    edit_json(folder / "unet" / "config.json", _diffusers_version="0.6.0")
    capsys.readouterr()
    assert load_base_model(str(folder)).resolution == 512
    assert "says sample_size 32 in a configuration of 2022; taken as 64 (512 pixels)" in capsys.readouterr().err
    found = json.loads(mifo("plan", "--model-path", folder, "--job", "synthesize", "--vram-gib", 64, "--json").stdout)
    assert found["resolution"] == 512


# --- names of files -----------------------------------------------------------------------------


def test_a_folder_with_half_precision_names_alone_loads(copy: Path) -> None:
    for part, stem in STEMS.items():
        (copy / part / f"{stem}.safetensors").rename(copy / part / f"{stem}.fp16.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        here, there = (getattr(base, part).state_dict() for base in (load_base_model(str(copy)), load_base()))
        assert all(torch.equal(here[name], there[name]) for name in there)


def test_shards_of_another_folder_are_not_followed(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="is no index of safetensors files"):
        load_base_model(str(copy))


def test_a_file_too_large_for_any_base_is_refused_unread(copy: Path) -> None:
    with (copy / "unet" / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.truncate(60 << 30)
    with pytest.raises(InputError, match="it has 61440 MiB, and at most 16384 MiB are read"):
        load_base_model(str(copy))


@pytest.mark.parametrize("plain", [("text_encoder", "vae", "unet"), ("vae",), ()])
def test_half_precision_weights_are_fetched_only_where_there_are_no_others(
        plain: tuple[str, ...], monkeypatch: Any, tmp_path: Path) -> None:  # fmt: skip
    from fnmatch import fnmatch

    hub = [f"{part}/{stem}{suffix}.safetensors" for part, stem in STEMS.items()
           for suffix in (["", ".fp16"] if part in plain else [".fp16"])]  # fmt: skip
    hub += ["unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin", "tokenizer/merges.txt"]
    fetched = []

    def download(repo: str, revision: str, allow_patterns: list[str]) -> str:
        for name in hub:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                fetched.append(name)
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).touch()
        return str(tmp_path)

    for part in STEMS:
        (tmp_path / part).mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    resolve("someone/model")
    expected = [f"{part}/{stem}{'' if part in plain else '.fp16'}.safetensors" for part, stem in STEMS.items()]
    assert sorted(fetched) == sorted([*expected, "tokenizer/merges.txt"])


# --- one file -----------------------------------------------------------------------------------


def original_names(part: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stable Diffusion 1.x's weights under the names of the original code; the reverse of what diffusers does on loading."""
    if part == "text_encoder":
        return {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v for k, v in weights.items()}
    rename = original_unet_name if part == "unet" else original_vae_name
    prefix = "model.diffusion_model." if part == "unet" else "first_stage_model."
    shaped = {k: v[..., None, None] if part == "vae" and "attentions" in k and k.endswith("weight") and v.ndim == 2 else v
              for k, v in weights.items()}  # fmt: skip
    return {prefix + rename(k): v for k, v in shaped.items()}


RESNET = (("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
          ("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection"))  # fmt: skip
ENDS = (("time_embedding.linear_1", "time_embed.0"), ("time_embedding.linear_2", "time_embed.2"), ("conv_norm_out", "out.0"),
        ("conv_in", "input_blocks.0.0"), ("conv_out", "out.2"))  # fmt: skip


def original_unet_name(name: str) -> str:
    kind, *rest = name.split(".")
    if kind not in ("down_blocks", "mid_block", "up_blocks"):
        return next(name.replace(a, b) for a, b in ENDS if name.startswith(a))
    if kind == "mid_block":
        layer, index, *tail = rest
        place = f"middle_block.{2 * int(index) if layer == 'resnets' else 1}"
    else:
        block, layer, index, *tail = int(rest[0]), *rest[1:]
        side, first = ("input_blocks", 3 * block + 1) if kind == "down_blocks" else ("output_blocks", 3 * block)
        if layer == "downsamplers":
            return f"{side}.{3 * block + 3}.0.op.{tail[-1]}"
        if layer == "upsamplers":
            return f"{side}.{3 * block + 2}.{1 if block == 0 else 2}.conv.{tail[-1]}"
        place = f"{side}.{first + int(index)}.{0 if layer == 'resnets' else 1}"
    inner = ".".join(tail)
    if layer == "resnets":
        inner = next(inner.replace(a, b) for a, b in RESNET if inner.startswith(a))
    return f"{place}.{inner}"


def original_vae_name(name: str) -> str:
    for old, new in (("conv_norm_out", "norm_out"), ("conv_shortcut", "nin_shortcut"), ("mid_block.attentions.0", "mid.attn_1"),
                     ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"), ("resnets", "block"),
                     ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("group_norm", "norm"), ("to_q", "q"),
                     ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):  # fmt: skip
        name = name.replace(old, new)
    for block in range(4):
        name = name.replace(f"encoder.down_blocks.{block}.", f"encoder.down.{block}.")
        name = name.replace(f"decoder.up_blocks.{block}.", f"decoder.up.{3 - block}.")
    return name


@pytest.fixture(scope="session")
def narrow_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5's shape at an eighth of its width, saved in fp16."""
    from scripts.make_random_sd import write_random_sd

    folder = tmp_path_factory.mktemp("narrow") / "sd15"
    write_random_sd("sd1.5", folder, 8)
    return folder


@pytest.fixture(scope="session")
def checkpoint(narrow_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file, its tokenizer's folder beside it."""
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    weights = {}
    for part, stem in STEMS.items():
        weights.update(original_names(part, load_file(narrow_sd_folder / part / f"{stem}.safetensors")))
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    shutil.copytree(narrow_sd_folder / "tokenizer", path.parent / "tokenizer")
    return path


def test_a_single_file_is_the_same_model_as_its_folder(narrow_sd_folder: Path, checkpoint: Path) -> None:
    folder, file = load_base_model(str(narrow_sd_folder)), load_base_model(str(checkpoint))
    for part in ("text_encoder", "vae", "unet"):
        here, there = getattr(file, part).state_dict(), getattr(folder, part).state_dict()
        assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in there), part
    assert file.fingerprint == folder.fingerprint
    assert (file.resolution, file.scheduler.config["prediction_type"]) == (512, "epsilon")
    assert file.source == str(checkpoint.resolve())


def test_a_single_file_is_checked_and_planned_for(checkpoint: Path, tmp_path: Path) -> None:
    instance = write_instance(tmp_path / "pair")
    checked = mifo("check", instance, "--model-path", checkpoint, "--output-path", tmp_path / "c.png", "--json")
    assert json.loads(checked.stdout)["supervised_map_sizes"] == [32, 16]
    planned = mifo("plan", "--model-path", checkpoint, "--job", "synthesize", "--vram-gib", 64, "--json")
    assert json.loads(planned.stdout)["resolution"] == 512


@pytest.mark.parametrize(
    "names, message",
    [({"lora_unet_down.weight": (4, 4)}, "it has no UNet, VAE, text encoder"),
     ({"conditioner.embedders.0.x": (1,)}, "has no UNet, VAE, first text encoder"),
     ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3), "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
       "first_stage_model.x": (1,), "cond_stage_model.model.x": (1,)}, "an inpainting model"),
     ({"model.diffusion_model.input_blocks.0.0.weight": (96, 4, 3, 3), "model.diffusion_model.out.2.weight": (4, 96, 3, 3),
       "first_stage_model.x": (1,), "cond_stage_model.x": (1,)}, "no UNet of Stable Diffusion 1.x, 2.x or XL")],
)  # fmt: skip
def test_a_single_file_of_another_kind_is_refused(names: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)
    with pytest.raises(InputError, match=message):
        load_base_model(str(path))


@pytest.mark.parametrize(
    "steps, yaml, expected",
    [(None, None, (96, "v_prediction")), (875_000, None, (64, "epsilon")), (None, "  parameterization: eps", (64, "epsilon")),
     (None, '    parameterization: "v"', (96, "v_prediction"))],
)  # fmt: skip
def test_what_a_single_file_of_stable_diffusion_2_predicts(
        steps: int | None, yaml: str | None, expected: Any, tmp_path: Path) -> None:  # fmt: skip
    from mifo.model.single_file import configs_of_file

    path = tmp_path / "v2.safetensors"
    unet = "model.diffusion_model."
    shapes = {unet + "input_blocks.0.0.weight": (320, 4, 3, 3), unet + "out.2.weight": (4, 320, 3, 3),
              "first_stage_model.x": (1,), "cond_stage_model.model.x": (1,)}  # fmt: skip
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file({**weights, **({"global_step": torch.tensor(steps)} if steps else {})}, path)
    if yaml:
        path.with_suffix(".yaml").write_text(f"model:\n{yaml}\n")
    configs = configs_of_file(path)
    assert (configs["unet"]["sample_size"], configs["scheduler"]["prediction_type"]) == expected
    assert configs["unet"]["cross_attention_dim"] == shape_of("sd2.1")["unet"]["cross_attention_dim"]


@pytest.mark.parametrize("name", ["model", "Ada's own", "a\"; touch stolen; \" $(touch stolen)", "back\\slash"])
def test_a_pickle_is_refused_with_the_line_that_converts_it(tmp_path: Path, name: str) -> None:
    path, weight = tmp_path / f"{name}.ckpt", torch.arange(6.0).reshape(2, 3)
    torch.save({"state_dict": {"conv.weight": weight}, "epoch": 3}, path)
    message = " ".join(mifo("plan", "--model-path", path, exit_code=2).output.split())
    assert "is a pickle, which could run code" in message
    with pytest.raises(InputError) as caught:
        load_base_model(str(path))
    line = str(caught.value).split(" by: ")[1]
    subprocess.run(line.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True, cwd=tmp_path)
    assert torch.equal(load_file(tmp_path / f"{name}.safetensors")["conv.weight"], weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([path.name, f"{name}.safetensors"])


def test_a_bundle_learned_on_a_single_file_finds_it_and_fits_its_folder(
        narrow_sd_folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:  # fmt: skip
    monkeypatch.setattr("mifo.learning.learn.draw_preview", lambda *_: Image.new("RGB", (8, 8)))
    instance = write_instance(tmp_path / "pair")
    mifo("learn", instance, "--model-path", checkpoint, "--output-dir", tmp_path / "out", *FAST, "--resolution", 64,
         "--no-prior-preservation")  # fmt: skip
    bundle = load_bundle(tmp_path / "out" / "pair")
    for base in (load_base_model(str(checkpoint)), load_base_model(str(narrow_sd_folder))):
        with attach(base, bundle):
            pass
    if Path(bundle.base_source).is_absolute():  # where the bundle says where its base lies
        assert base_of_bundle(bundle) == str(checkpoint.resolve())
