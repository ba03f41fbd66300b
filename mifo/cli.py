"""The command line: parses, builds a configuration, calls one function, prints.

Results go to standard output (one JSON object with --json), progress and messages to standard error.
Exit status: 0 done, 2 the input is wrong, 1 our fault, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import InputError

if TYPE_CHECKING:
    import torch

    from .base_model import BaseModel
    from .config import LearnConfig, SynthesisConfig

app = typer.Typer(
    name="mifo",
    help="Learn the things in one photo, each as its own word, and put each of them where you want in new pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Recipe(str, Enum):
    mifo = "mifo"
    break_a_scene = "break-a-scene"


class Precision(str, Enum):
    auto = "auto"
    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


ModelPath = Annotated[str, typer.Option(help="toybox (embedded), sd1.5, sd2.1, a hub id, or a folder.")]
OutputDir = Annotated[Path, typer.Option(help="Where learned bundles are kept.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same result.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; empty picks what is there.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@app.command()
def learn(
    instance: Annotated[str | None, typer.Argument(help="Folder name under --folder-path; without it, each of them.")] = None,
    folder_path: Annotated[Path, typer.Option(help="Holds the instance folders.")] = Path("example"),
    model_path: ModelPath = "toybox",
    output_dir: OutputDir = Path("Model_ours"),
    name: Annotated[str | None, typer.Option(help="The bundle's name; the folder's name by default.")] = None,
    initializer_tokens: Annotated[str | None, typer.Option(help="A word or phrase per asset to start from, comma-separated.")] = None,
    recipe: Annotated[Recipe, typer.Option(help="break-a-scene: that paper's losses, for comparison.")] = Recipe.mifo,
    phase1_train_steps: Annotated[int | None, typer.Option(min=1)] = None,
    phase2_train_steps: Annotated[int | None, typer.Option(min=0, help="0 leaves LoRA out.")] = None,
    phase1_learning_rate: Annotated[float | None, typer.Option(min=0)] = None,
    phase2_learning_rate: Annotated[float | None, typer.Option(min=0)] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, max=256)] = None,
    train_text_encoder: Annotated[bool | None, typer.Option(help="LoRA in the text encoder too.")] = None,
    penalty_weight: Annotated[float | None, typer.Option(min=0, help="Weight of the penalty attention loss.")] = None,
    class_prompt: Annotated[str | None, typer.Option(help="For prior preservation; several, separated by '|'.")] = None,
    num_class_images: Annotated[int | None, typer.Option(min=1)] = None,
    prior_preservation: Annotated[bool, typer.Option(help="Keep the base model's knowledge with its own pictures.")] = True,
    resolution: Annotated[int | None, typer.Option(min=32, help="Pixels; the model's own by default.")] = None,
    gradient_checkpointing: bool = False,
    mixed_precision: Precision = Precision.auto,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Learn the things in INSTANCE (img.jpg and mask0.png, mask1.png, ...), each as its own token."""
    with _errors():
        from .base_model import load_base_model
        from .config import learn_preset
        from .instance import load_instance
        from .learn import learn as run_learn

        folders = _instance_folders(instance, folder_path)
        if name and len(folders) > 1:
            raise InputError(f"--name {name} fits one instance, but {len(folders)} would be learned; name the INSTANCE too")
        instances = [load_instance(folder) for folder in folders]  # all input is checked before anything long starts
        chosen, precision = _device(device), mixed_precision
        dtype = _dtype(precision, chosen)
        results = []
        for each in instances:
            for warning in each.warnings:
                _say(f"note: {warning}")
            base = load_base_model(model_path, chosen, dtype)
            config = learn_preset(base.family, recipe.value)
            config = _learn_overrides(config, locals(), _accelerate_name(dtype))
            bundle_name = _bundle_name(name or each.name)
            with _Bar() as bar:
                bundle = run_learn(each, base, config, output_dir / bundle_name, bar.learning,
                                   _initializers(initializer_tokens, each.count))  # fmt: skip
            results.append(_learn_summary(bundle))
            if not as_json:
                _print_learned(results[-1])
        if as_json:
            print(json.dumps(results[0] if len(results) == 1 else results))


@app.command()
def synthesize(
    model_id: Annotated[str, typer.Argument(help="A bundle's name under --output-dir, or its folder.")],
    prompt: Annotated[str, typer.Option(help='Such as "a photo of <asset0> and <asset1> at the beach".')],
    boxes: Annotated[str | None, typer.Option(help="JSON file or text: one [x0, y0, x1, y1] per asset, 0 to 1.")] = None,
    model_path: Annotated[str | None, typer.Option(help="The base model; the bundle's own by default.")] = None,
    output_dir: OutputDir = Path("Model_ours"),
    output_path: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("output"),
    batch_size: Annotated[int, typer.Option(min=1, max=64)] = 1,
    steps: Annotated[int | None, typer.Option(min=1, max=1000)] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=1)] = None,
    negative_prompt: str = "",
    scheduler: Annotated[str | None, typer.Option(help="ddim, dpm or unipc.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; the model's own by default.")] = None,
    height: Annotated[int | None, typer.Option(min=1)] = None,
    lora_scale: Annotated[float | None, typer.Option(min=0, max=4)] = None,
    guidance: Annotated[bool, typer.Option(help="Move the latents until the assets lie in their boxes.")] = True,
    refine: Annotated[bool, typer.Option(help="Tighten the boxes to the things' own shapes.")] = True,
    bounded: Annotated[bool, typer.Option(help="Mask attention to the boxes.")] = True,
    subject_token_indices: Annotated[str | None, typer.Option(help="Accepted for compatibility; never needed.")] = None,
    mixed_precision: Precision = Precision.auto,
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Draw the learned assets, each in its box."""
    with _errors():
        from .boxes import parse_layout
        from .bundle import attach, find_bundle, load_bundle
        from .config import synthesis_preset
        from .prompts import assets_in, check_prompt
        from .synthesize import save_synthesis
        from .synthesize import synthesize as run_synthesize

        bundle = load_bundle(find_bundle(model_id, output_dir))
        check_prompt(prompt, bundle.tokens)
        layout = parse_layout(boxes, assets_in(prompt)) if boxes is not None else None
        if subject_token_indices:
            _say("note: --subject-token-indices is not needed; the assets' positions are found in the prompt")
        chosen = _device(device)
        base = load_base_model_of(bundle, model_path, chosen, _dtype(mixed_precision, chosen))
        config = _synthesis_overrides(synthesis_preset(base.family), locals())
        with attach(base, bundle, config.lora_scale), _Bar() as bar:
            result = run_synthesize(base, prompt, layout, bundle.tokens, config, seed, batch_size, bar.denoising)
        paths = save_synthesis(result, output_path, {"bundle": bundle.name, "base_model": base.name})
        facts = {"images": [str(p) for p in paths], "contact_sheet": str(output_path / "contact.png"),
                 "json": str(output_path / "synthesis.json"), "seconds": round(result.seconds, 2),
                 "peak_gib": round(result.peak_gib, 3)}  # fmt: skip
        if as_json:
            print(json.dumps(facts))
        else:
            print(f"{len(paths)} picture{'s' if len(paths) > 1 else ''} in {output_path} ({facts['seconds']} s, peak {facts['peak_gib']} GiB)")
            print(f"contact sheet: {facts['contact_sheet']}")


@app.command()
def boxes(
    boxes: Annotated[str, typer.Argument(help="JSON file or text, as for synthesize.")],
    prompt: Annotated[str | None, typer.Option(help="Names the assets; without it they are numbered in order.")] = None,
    image: Annotated[Path | None, typer.Option(help="Draw over this picture instead of a blank one.")] = None,
    size: Annotated[int, typer.Option(min=64, max=4096, help="Pixels of the blank canvas.")] = 512,
    output_path: Annotated[Path, typer.Option(help="PNG to write.")] = Path("output/boxes.png"),
    as_json: AsJson = False,
) -> None:
    """Draw boxes over a blank canvas or a picture, before anything runs."""
    with _errors():
        from .boxes import parse_boxes_alone, parse_layout
        from .bundle import unwritable
        from .instance import load_image
        from .pictures import draw_boxes
        from .prompts import assets_in

        layout = parse_layout(boxes, assets_in(prompt)) if prompt else parse_boxes_alone(boxes)
        from PIL import Image

        canvas = load_image(image) if image else Image.new("RGB", (size, size), (240, 240, 240))
        try:
            output_path.parent.mkdir(parents=True, exist_ok=True)
            draw_boxes(canvas, layout).save(output_path, "PNG")
        except OSError as error:
            raise unwritable(output_path, error) from None
        print(json.dumps({"image": str(output_path), "boxes": layout.to_json()}) if as_json else output_path)


@app.command()
def export(
    model_id: Annotated[str, typer.Argument(help="A bundle's name under --output-dir, or its folder.")],
    output_path: Annotated[Path, typer.Option(help="Folder to write.")],
    model_path: Annotated[str | None, typer.Option(help="The base model; the bundle's own by default.")] = None,
    output_dir: OutputDir = Path("Model_ours"),
    as_json: AsJson = False,
) -> None:
    """Write a bundle so that diffusers' load_lora_weights and load_textual_inversion read it."""
    with _errors():
        from .bundle import export_for_diffusers, find_bundle, load_bundle

        bundle = load_bundle(find_bundle(model_id, output_dir))
        base = load_base_model_of(bundle, model_path, "cpu", _dtype(Precision.no, "cpu"))
        export_for_diffusers(base, bundle, output_path)
        files = sorted(p.name for p in output_path.iterdir())
        print(json.dumps({"folder": str(output_path), "files": files}) if as_json else f"{output_path}: {', '.join(files)}")


@app.command()
def demo(
    output_path: Annotated[Path, typer.Option(help="Folder for the demo's picture and bundle.")] = Path("output"),
    seed: Seed = 0,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Learn three look-alike cars from one picture, then put each in its box on two new backgrounds."""
    with _errors():
        from .demo import run_demo

        with _Bar() as bar:
            result = run_demo(output_path, seed, _device(device), bar)
        if as_json:
            print(json.dumps(result))
        else:
            print(f"The three cars were learned in {result['learn_seconds']} s; each picture took {result['synthesize_seconds']} s.")
            print(f"Look at {result['picture']}")


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False) -> None:
    pass


# --- parts --------------------------------------------------------------------------------------


def load_base_model_of(bundle: Any, model_path: str | None, device: str, dtype: torch.dtype) -> BaseModel:
    """The bundle's own base model, or the one asked for (refused later when it is another)."""
    from .base_model import load_base_model

    recorded = bundle.base_name
    return load_base_model(model_path or recorded, device, dtype)


def _instance_folders(instance: str | None, folder_path: Path) -> list[Path]:
    if instance is not None:
        direct = Path(instance)
        return [direct if direct.is_dir() and not (folder_path / instance).is_dir() else folder_path / instance]
    if not folder_path.is_dir():
        raise InputError(f"There is no folder {folder_path}; give the folder that holds the instances with --folder-path")
    found = sorted(p for p in folder_path.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise InputError(f"{folder_path} holds no instance folders; put img.jpg and mask0.png, ... into one each")
    return found


def _bundle_name(name: str) -> str:
    if not name or name.startswith(".") or any(c in name for c in "/\\\0") or len(name) > 100:
        raise InputError(f"'{name[:100]}' cannot name a bundle; use letters, digits, '-' and '_'")
    return name


def _initializers(text: str | None, count: int) -> list[str | None] | None:
    if text is None:
        return None
    words = [w.strip() or None for w in text.split(",")]
    if len(words) != count:
        raise InputError(f"--initializer-tokens has {len(words)} entries for {count} assets; give one per asset, comma-separated")
    return words


def _learn_overrides(config: LearnConfig, given: dict[str, Any], precision: str) -> LearnConfig:
    """The preset with the options that were given on the command line."""
    embedding = _override(config.embedding, train_steps=given["phase1_train_steps"], learning_rate=given["phase1_learning_rate"])
    lora = _override(config.lora, train_steps=given["phase2_train_steps"], learning_rate=given["phase2_learning_rate"],
                     rank=given["lora_rank"], text_encoder=given["train_text_encoder"])  # fmt: skip
    weight = given["penalty_weight"]
    if weight is not None:
        embedding = replace(embedding, attention=replace(embedding.attention, penalty_weight=weight))
        lora = replace(lora, attention=replace(lora.attention, penalty_weight=weight))
    prior = _override(config.prior, class_prompt=given["class_prompt"], num_class_images=given["num_class_images"])
    prior = replace(prior, enabled=given["prior_preservation"])
    return replace(config, embedding=embedding, lora=lora, prior=prior, resolution=given["resolution"], seed=given["seed"],
                   gradient_checkpointing=given["gradient_checkpointing"], mixed_precision=precision)  # fmt: skip


def _synthesis_overrides(config: SynthesisConfig, given: dict[str, Any]) -> SynthesisConfig:
    names = ("steps", "guidance_scale", "negative_prompt", "scheduler", "width", "height", "lora_scale", "bounded")
    config = _override(config, **{n: given[n] for n in names})
    return replace(config, guidance=replace(config.guidance, enabled=given["guidance"]),
                   refinement=replace(config.refinement, enabled=given["refine"]))  # fmt: skip


def _override(config: Any, **values: Any) -> Any:
    return replace(config, **{k: v for k, v in values.items() if v is not None})


def _device(name: str) -> str:
    import torch

    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"the device '{name}' cannot be used here ({str(error).splitlines()[0]}); try --device cpu") from None
    return name


def _dtype(precision: Precision, device: str) -> torch.dtype:
    """The frozen base's dtype. 'auto': bf16 or fp16 on a GPU, fp32 elsewhere."""
    import torch

    names = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision is not Precision.auto:
        return names[precision.value]
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _accelerate_name(dtype: torch.dtype) -> str:
    return {"torch.float32": "no", "torch.float16": "fp16", "torch.bfloat16": "bf16"}[str(dtype)]


def _learn_summary(bundle: Any) -> dict[str, Any]:
    facts = bundle.facts
    size = sum(p.stat().st_size for p in bundle.folder.rglob("*") if p.is_file())
    return {"bundle": str(bundle.folder), "tokens": list(bundle.tokens), "seconds": facts["seconds"], "peak_gib": facts["peak_gib"],
            "mib": round(size / 2**20, 2), "attention_inside_mask": facts["attention_inside_mask"],
            "preview": str(bundle.folder / "preview.png"), "attention": str(bundle.folder / "attention.png")}  # fmt: skip


def _print_learned(facts: dict[str, Any]) -> None:
    print(f"learned {', '.join(facts['tokens'])} in {facts['seconds']} s, peak {facts['peak_gib']} GiB")
    print(f"bundle: {facts['bundle']} ({facts['mib']} MiB)")
    for token, share in facts["attention_inside_mask"].items():
        print(f"  {token}: {100 * share:.0f} % of its attention is inside its mask")
    print(f"look at {facts['preview']} and {facts['attention']}")


class _Bar:
    """Progress on standard error, with the loss's parts and the time left."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._label = ""

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _show(self, label: str, done: int, total: int, losses: dict[str, float]) -> None:
        from tqdm import tqdm

        if self._bar is None or label != self._label or done <= self._bar.n:
            self.__exit__()
            self._bar, self._label = tqdm(total=total, desc=label, file=sys.stderr, mininterval=0.5), label
        if losses:
            self._bar.set_postfix({k: f"{v:.4f}" for k, v in losses.items()}, refresh=False)
        self._bar.update(done - self._bar.n)

    def learning(self, progress: Any) -> None:
        label = {"prior": "drawing the prior", "embedding": "phase 1, tokens", "lora": "phase 2, LoRA"}[progress.phase]
        self._show(label, progress.step, progress.total, progress.losses)

    def denoising(self, done: int, total: int) -> None:
        self._show("denoising", done, total, {})


def _say(message: str) -> None:
    print(message, file=sys.stderr)


@contextmanager
def _errors() -> Iterator[None]:
    """Turns what went wrong into one message and an exit status."""
    try:
        yield
    except InputError as error:
        _say(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        _say("interrupted: nothing half-written is left; bundles and pictures that were complete before are kept")
        raise typer.Exit(130) from None
    except MemoryError:
        _say("error: out of memory; use a smaller --resolution or --batch-size")
        raise typer.Exit(1) from None


def main() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.stderr.isatty() is False:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    app()
