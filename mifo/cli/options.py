"""Options that the commands share: their choices, their types, their help, and the groups in which they are shown."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from .job import OptionGroup


class Precision(str, Enum):
    auto = "auto"
    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


class Recipe(str, Enum):
    mifo = "mifo"
    break_a_scene = "break-a-scene"


class AttentionLoss(str, Enum):
    reward_penalty = "reward-penalty"
    match = "match"
    none = "none"


class Sampler(str, Enum):
    ddim = "ddim"
    dpm = "dpm"
    unipc = "unipc"
    euler = "euler"
    own = "own"


class Spacing(str, Enum):
    own = "own"
    leading = "leading"
    linspace = "linspace"
    trailing = "trailing"


class Aspect(str, Enum):
    square = "square"
    photo = "photo"


class Timesteps(str, Enum):
    uniform = "uniform"
    logit_normal = "logit-normal"


class LoraPlace(str, Enum):
    everywhere = "everywhere"
    boxes = "boxes"


class LogWith(str, Enum):
    tensorboard = "tensorboard"
    wandb = "wandb"


class Attention(str, Enum):
    auto = "auto"
    sdpa = "sdpa"
    xformers = "xformers"
    materialized = "materialized"


class PlannedJob(str, Enum):
    learn = "learn"
    synthesize = "synthesize"
    edit = "edit"


class Keep(str, Enum):
    last = "last"
    best = "best"


class Judge(str, Enum):
    auto = "auto"
    toybox = "toybox"
    photo = "photo"


class MasksDrawn(str, Enum):
    auto = "auto"
    upright = "upright"
    stored = "stored"


class Metadata(str, Enum):
    keep = "keep"
    strip = "strip"  # type: ignore[assignment]  # it hides str's own method, which nobody calls here
    safe = "safe"


class ExportFormat(str, Enum):
    diffusers = "diffusers"
    kohya = "kohya"
    comfyui = "comfyui"
    pipeline = "pipeline"


class Background(str, Enum):
    pixel = "pixel"
    poisson = "poisson"
    optimization = "optimization"
    none = "none"


class Optimize(str, Enum):
    weights = "weights"
    latents = "latents"


class Start(str, Enum):
    noise = "noise"
    image = "image"


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _part(value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and 0 <= value < 1):
        raise typer.BadParameter(f"{value} is not at least 0 and less than 1.")
    return value


def _at_home(value: Any) -> Any:
    """`~/x` -> `/home/me/x`: in `--output-path=~/x` the shell leaves it as it is. Of one path, a list of them, or none."""
    if isinstance(value, (list, tuple)):
        return [_at_home(each) for each in value]
    return type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) and str(value)[:1] == "~" else value


def path(help: str | None = None, **more: Any) -> Any:
    """An option that is a path, or may be one: a hub id, or boxes as text, passes unchanged."""
    return typer.Option(callback=_at_home, help=help, **more)


def path_argument(help: str, **more: Any) -> Any:
    """As `path`, without a name."""
    return typer.Argument(callback=_at_home, help=help, **more)


def _folders_in(option: str, default: str, marker: str) -> Callable[[typer.Context, str], list[str]]:
    """Completes the names of the folders in the one that `option` names which hold a file like `marker`."""

    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        folder = Path(os.path.expanduser(ctx.params.get(option) or default))
        try:
            found = sorted({p.parent.name for p in folder.glob(f"*/{marker}") if not p.parent.name.startswith(".")})
        except OSError:
            return []
        return [name for name in found if name.startswith(incomplete)]

    return complete


bundle_names = _folders_in("output_dir", "Model_ours", "bundle.json")
instance_names = _folders_in("folder_path", "example", "mask0.png")


def number(minimum: float, maximum: float | None = None, help: str | None = None) -> Any:
    """A finite number within bounds: typer's own bounds let NaN through."""
    return typer.Option(min=minimum, max=maximum, callback=_finite, help=help)


BundleName = Annotated[str, path_argument("A bundle's name under --output-dir, or its folder.", autocompletion=bundle_names)]
OptionalBundleName = Annotated[
    str | None,
    path_argument("A bundle's name under --output-dir, or its folder.", metavar="[MODEL_ID]", autocompletion=bundle_names),
]
BundleNames = Annotated[
    list[str] | None,
    path_argument("A bundle's name under --output-dir, or its folder; several for assets of several photos.",
                  metavar="[MODEL_ID]...", autocompletion=bundle_names),
]  # fmt: skip
InstanceName = Annotated[
    str | None,
    path_argument("Folder name under --folder-path; without it, each of them.", autocompletion=instance_names),
]
MaskOrientation = Annotated[
    MasksDrawn, typer.Option(help="For photos that EXIF turns: masks drawn on the upright picture, or on the stored pixels.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run wrote there, all of it its own.")]
OverwriteFile = Annotated[bool, typer.Option("--overwrite", help="Replace a file of that name.")]
Resolution = Annotated[int | None, typer.Option(min=32, help="Pixels; the model's own by default.")]
ModelPath = Annotated[str, path("toybox (embedded), sd1.5, sd2.1, sd2.1-768, sdxl, a hub id, a folder or a file.")]
Precisions = Annotated[Precision, typer.Option(help="auto: what the device is best at.")]
KeepBasePath = Annotated[bool, typer.Option("--keep-base-path", help="Write into the bundle where the base lies.")]
Boxes = Annotated[str | None, path("JSON file or text: one [x0, y0, x1, y1] per asset, 0 to 1.")]
FolderPath = Annotated[Path, path("Holds the instance folders.")]
OutputDir = Annotated[Path, path("Where learned bundles are kept.")]
AttentionBackend = Annotated[Attention, typer.Option(help="auto: PyTorch's own, or xformers where it is a tenth faster.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="The same seed gives the same result.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; empty picks what is there.")]
VramGib = Annotated[float | None, number(0.5, 1024, "GPU memory to stay within; see 'plan'.")]
OwnText = Annotated[bool, typer.Option(help="In boxes, each asset reads the prompt as if it spoke of that asset alone.")]
LoraScale = Annotated[float | None, number(0, 4, "Strength of what was learned; 1 by default.")]
NegativePrompt = Annotated[str, typer.Option(help="What the picture should not show.")]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps.")]
Scale = Annotated[float | None, number(0, help="How strictly the prompt is followed; 1 and less: no guidance.")]


# --- groups -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BundleOptions(OptionGroup):
    """Which base model draws, and where bundles lie."""

    heading: ClassVar[str] = "Input"
    model_path: Annotated[str | None, path("The base model; the bundle's own by default.")] = None
    output_dir: OutputDir = Path("Model_ours")


@dataclass(frozen=True)
class OutputOptions(OptionGroup):
    """Where results go."""

    heading: ClassVar[str] = "Output"
    output_path: Annotated[Path | None, path("Folder to write; by default the next number in output/<bundle>/.")] = None
    overwrite: Overwrite = False


@dataclass(frozen=True)
class DeviceOptions(OptionGroup):
    """On what a job runs."""

    heading: ClassVar[str] = "Memory and device"
    mixed_precision: Precisions = Precision.auto
    seed: Seed = 0
    device: Device = ""


@dataclass(frozen=True)
class ComputeOptions(DeviceOptions):
    """The same, within a memory budget."""

    vram_gib: VramGib = None
    attention_backend: AttentionBackend = Attention.auto


@dataclass(frozen=True)
class DrawingOptions(ComputeOptions):
    """The same, for jobs that denoise."""

    compile: Annotated[bool, typer.Option("--compile", help="Compile the UNet's blocks: slow start, faster steps.")] = False


@dataclass(frozen=True)
class EvaluatorOptions(OptionGroup):
    """What measures images."""

    heading: ClassVar[str] = "Evaluation"
    backend: Annotated[
        Judge, typer.Option(help="What measures pictures; auto: toybox for the toybox, photo for all else.")
    ] = Judge.auto
    dino: Annotated[str | None, path("DINOv2 model of the photo back end: hub id or folder.")] = None
    clip: Annotated[str | None, path("CLIP model of the photo back end.")] = None
    detector: Annotated[str | None, path("OWL-ViT or OWLv2 detector of the photo back end.")] = None


@dataclass(frozen=True)
class SamplingOptions(OptionGroup):
    """How images are drawn, where nothing else can be chosen."""

    heading: ClassVar[str] = "Sampling"
    steps: Steps = None
    guidance_scale: Scale = None


@dataclass(frozen=True)
class LearnInput(OptionGroup):
    heading: ClassVar[str] = "Input"
    folder_path: FolderPath = Path("example")
    model_path: ModelPath = "toybox"
    mask_orientation: MaskOrientation = MasksDrawn.auto
    initializer_tokens: Annotated[str | None, typer.Option(help="Words per asset to start from, comma-separated.")] = None
    background_asset: Annotated[bool, typer.Option("--background-asset", help="Learn <background>, outside all masks.")] = False


@dataclass(frozen=True)
class TrainingOptions(OptionGroup):
    """What is trained, and how; None keeps the preset's value."""

    heading: ClassVar[str] = "Training"
    recipe: Annotated[Recipe, typer.Option(help="break-a-scene: that paper's losses, for comparison.")] = Recipe.mifo
    attention_loss: Annotated[
        AttentionLoss | None, typer.Option(help="match: Break-A-Scene's; none: learn without. Toybox: at the best rates of each.")
    ] = None
    step_factor: Annotated[float | None, number(0.01, 100, help="So many times the preset's steps, of both phases.")] = None
    phase1_train_steps: Annotated[int | None, typer.Option(min=1, help="Steps on the token embeddings alone.")] = None
    phase2_train_steps: Annotated[int | None, typer.Option(min=0, help="Steps with LoRA; 0 leaves it out.")] = None
    phase1_learning_rate: Annotated[float | None, number(0, help="Of the token embeddings.")] = None
    phase2_learning_rate: Annotated[float | None, number(0, help="Of LoRA.")] = None
    composites: Annotated[
        bool | None, typer.Option(help="Learn from the things cut out, on backgrounds that the model draws; toybox's default.")
    ] = None
    draws: Annotated[int | None, typer.Option(min=1, max=64, help="Noisy copies a step; several processes share them.")] = None
    pictures: Annotated[
        int | None, typer.Option(min=1, max=64, help="Pictures a step, which share its draws: as many --draws at least.")
    ] = None
    alone_share: Annotated[
        float | None, number(0, 1, help="Part of the pictures that shows one asset alone; the others, a random subset.")
    ] = None
    phase2_timesteps: Annotated[
        Timesteps | None, typer.Option(help="logit-normal: fewer at both ends, as many base models were trained.")
    ] = None
    lora_rank: Annotated[int | None, typer.Option(min=1, max=256, help="Higher: more detail, a larger bundle.")] = None
    train_text_encoder: Annotated[bool | None, typer.Option(help="LoRA in the text encoder too.")] = None
    penalty_weight: Annotated[float | None, number(0, help="Weight of the penalty attention loss, or of match.")] = None
    relative_penalty_weight: Annotated[
        float | None, number(0, help="Of the penalty on attention maps relative to their maximum; toybox: 0.02.")
    ] = None
    prior_preservation: Annotated[bool, typer.Option(help="Keep the base model's knowledge with its own pictures.")] = True
    class_prompt: Annotated[str | None, typer.Option(help="For prior preservation; several, separated by '|'.")] = None
    num_class_images: Annotated[int | None, typer.Option(min=1, max=10_000, help="Drawn once, for prior preservation.")] = None
    resolution: Resolution = None
    aspect: Annotated[Aspect | None, typer.Option(help="photo: learn at the photo's own shape; the default for SDXL.")] = None
    crop_conditioning: Annotated[
        bool | None, typer.Option(help="Tell SDXL how far a shifted copy of the photo was cropped; its default.")
    ] = None
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory for more time.")] = False
    resume: Annotated[bool | None, typer.Option(help="Go on from the last checkpoint of an interrupted run.")] = None
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints, at most 2 minutes; 0: none.")] = 50
    keep: Annotated[Keep, typer.Option(help="best: the checkpoint with the least leakage and the best samples.")] = Keep.last


@dataclass(frozen=True)
class LearnOutput(OptionGroup):
    heading: ClassVar[str] = "Output"
    output_dir: OutputDir = Path("Model_ours")
    name: Annotated[str | None, typer.Option(help="The bundle's name; the folder's name by default.")] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a bundle learned from another photo, other masks or on another base.")
    ] = False
    into: Annotated[
        str | None, typer.Option(help="An existing bundle: --only is learned into it, the others in it stay. Half the steps.")
    ] = None
    only: Annotated[list[str] | None, typer.Option(help="With --into: asset1, or an asset that it lacks; repeatable.")] = None
    keep_base_path: KeepBasePath = False
    log_with: Annotated[
        LogWith | None, typer.Option(help="Report losses, learning rates, attention and images there; files in output/logs.")
    ] = None


@dataclass(frozen=True)
class SynthesisOptions(SamplingOptions):
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="Pictures, drawn together.")] = 1
    best_of: Annotated[int | None, typer.Option(min=2, max=1000, help="Draw so many seeds, keep the best.")] = None
    negative_prompt: NegativePrompt = ""
    scheduler: Annotated[Sampler | None, typer.Option(help="own: the one that the base model's folder names.")] = None
    timestep_spacing: Annotated[Spacing | None, typer.Option(help="trailing: for checkpoints distilled to a few steps.")] = None
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; the model's own by default.")] = None
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; the model's own by default.")] = None
    lora_scale: LoraScale = None
    subject_token_indices: Annotated[str | None, typer.Option(help="Accepted for compatibility; never needed.")] = None


@dataclass(frozen=True)
class LayoutOptions(OptionGroup):
    heading: ClassVar[str] = "Boxes"
    guidance: Annotated[bool, typer.Option(help="Move the latents until the assets lie in their boxes.")] = True
    refine: Annotated[bool, typer.Option(help="Tighten the boxes to the things' own shapes.")] = True
    bounded: Annotated[bool, typer.Option(help="Mask attention to the boxes.")] = True
    own_text: OwnText = True
    contrast_scale: Annotated[
        float, number(0, 10, "Leads each box away from what the other assets' words would draw; try 1 for six look-alikes.")
    ] = 0.0
    lora_place: Annotated[
        LoraPlace | None, typer.Option(help="Where a bundle's LoRA acts; of several bundles always in the boxes.")
    ] = None


@dataclass(frozen=True)
class SeveralOptions(OptionGroup):
    """Bundles whose LoRA acts by place."""

    heading: ClassVar[str] = "Several bundles"
    word: Annotated[
        list[str] | None,
        typer.Option("--as", metavar="WORD=NAME", help="A word of one's own, such as cat=shelf.asset1 for <cat>."),
    ] = None
    background_lora: Annotated[
        str | None, typer.Option(metavar="MODEL_ID", help="The bundle whose LoRA acts outside the boxes; none by default.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class EditInput(BundleOptions):
    init_image: Annotated[Path, path("The picture to edit.")]
    mask: Annotated[Path, path("White where the picture may change.")]
    prompt: Annotated[str, typer.Option(help='Such as "a photo of <asset2>".')]
    model_id: Annotated[str | None, path("Instead of MODEL_ID; 'none' edits with the plain base model.")] = None
    invert_mask: Annotated[bool, typer.Option(help="Edit all but the white part.")] = False
    resize_mask: Annotated[bool, typer.Option(help="Accept a mask of another size.")] = False
    mask_orientation: MaskOrientation = MasksDrawn.auto
    boxes: Annotated[str | None, path("A box per asset; one asset alone takes the mask's box.")] = None


@dataclass(frozen=True)
class BlendingOptions(OptionGroup):
    heading: ClassVar[str] = "Blending"
    background: Annotated[Background, typer.Option(help="How the rest comes back; pixel: its bytes.")] = Background.pixel
    optimize: Annotated[Optimize, typer.Option(help="What --background optimization tunes.")] = Optimize.weights
    reconstruction_steps: Annotated[int, typer.Option(min=1, max=10_000, help="Of --background optimization.")] = 75
    start: Annotated[Start, typer.Option(help="image: keep something of what is there, for scribbles.")] = Start.noise
    mask_dilation: Annotated[int, typer.Option(min=0, max=64, help="Latent pixels; thin masks start larger and shrink.")] = 0
    blending_start_percentage: Annotated[
        float | None, typer.Option(callback=_part, help="Part of the schedule left out, 0 to 1.")
    ] = None


@dataclass(frozen=True)
class EditSampling(SamplingOptions):
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="Candidates; all are kept, the best first.")] = 1
    negative_prompt: NegativePrompt = ""
    lora_scale: LoraScale = None
    guidance: Annotated[bool | None, typer.Option(help="Move the latents until the asset lies in its box.")] = None
    bounded: Annotated[bool, typer.Option(help="Keep an asset to its box, and plain words to the mask.")] = True
    box_inset: Annotated[
        float | None, number(0, 0.25, "Part of the mask's longer side by which an asset's box ends inside it, at each side.")
    ] = None
    own_text: OwnText = True


@dataclass(frozen=True)
class EditOutput(OutputOptions):
    metadata: Annotated[
        Metadata, typer.Option(help="Of the picture's file; safe: date and camera, no position, owner, serial number.")
    ] = Metadata.safe


@dataclass(frozen=True)
class EvaluateInput(BundleOptions):
    prompts: Annotated[Path | None, path("Text file, one prompt a line; without it, each asset and all.")] = None
    boxes: Annotated[str | None, path("JSON file or text, as for synthesize; for all prompts.")] = None
    images: Annotated[Path | None, path("Measure this folder's pictures instead of drawing.")] = None
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Pictures of each prompt.")] = 4
    steps: Steps = None
    instance: Annotated[Path | None, path("What the bundle was learned from; its own copy by default.")] = None
    mask_orientation: MaskOrientation = MasksDrawn.auto


@dataclass(frozen=True)
class EditToMeasure(OptionGroup):
    """An edit to be measured beside a bundle: is all outside the mask kept?"""

    heading: ClassVar[str] = "An edit"
    original: Annotated[Path | None, path("With --edited and --edit-mask: is all outside the mask kept?")] = None
    edited: Annotated[Path | None, path("The picture after the edit.")] = None
    edit_mask: Annotated[Path | None, path("White where the edit was allowed.")] = None


@dataclass(frozen=True)
class PlannedWork(OptionGroup):
    """The job whose memory is counted."""

    heading: ClassVar[str] = "Job"
    job: PlannedJob = PlannedJob.learn
    resolution: Resolution = None
    assets: Annotated[int, typer.Option(min=1, max=64, help="Learned or drawn together.")] = 3
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="Pictures drawn together.")] = 1
    lora_rank: Annotated[int, typer.Option(min=1, max=256, help="Of what is learned.")] = 16
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory for more time.")] = False
    prior_preservation: Annotated[bool, typer.Option(help="A picture of the class beside each step's own.")] = True
    background: Annotated[Background, typer.Option(help="Of edit; optimization tunes the decoder.")] = Background.pixel


@dataclass(frozen=True)
class PlannedMemory(OptionGroup):
    heading: ClassVar[str] = "Memory"
    vram_gib: VramGib = None
    mixed_precision: Annotated[Precision, typer.Option(help="auto: bf16, as on a GPU.")] = Precision.auto
    attention_backend: Annotated[Attention, typer.Option(help="materialized shows what fused attention saves.")] = Attention.auto
