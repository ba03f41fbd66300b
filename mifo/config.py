"""Settings as frozen dataclasses, units in the names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from .checked import Checked, Within, field_types
from .errors import InputError

T = TypeVar("T")
Count = Annotated[int, Within(0, 10**9)]
AtLeastOne = Annotated[int, Within(1, 10**9)]
NotNegative = Annotated[float, Within(0)]
Part = Annotated[float, Within(0, 1)]
Steps = Annotated[int, Within(1, 1000)]
Contrast = Annotated[float, Within(0, 10)]
Seed = Annotated[int, Within(0, 2**63 - 1)]
Timesteps = Literal["uniform", "logit-normal"]
"""How the draws' timesteps are distributed: 'uniform' as published, or 'logit-normal' (Esser et al., arXiv 2403.03206, section
3.1), as many base models were themselves trained."""


@dataclass(frozen=True)
class AttentionTerms(Checked):
    """Which attention maps a learning phase supervises, and how strongly."""

    loss: Literal["reward-penalty", "match", "none"] = "reward-penalty"
    """'reward-penalty' (MIFO), 'match' (Break-A-Scene's MSE to the whole mask) or 'none'."""
    blocks: tuple[str, ...] = ("up_blocks",)
    """Prefixes of the UNet's block names."""
    levels: Annotated[tuple[int, ...], Within(1)] = (2, 4)
    """Downsampling levels: how many times smaller than the latents the maps are (1, 2, 4 or 8), at any resolution."""
    reward_steps: Count = 0
    """Training steps with the reward before the penalty takes over."""
    reward_weight: NotNegative = 1e-2
    penalty_weight: NotNegative = 2e-2
    separation_weight: NotNegative = 0.0
    """Weight of the cosine similarity between the assets' maps; 0.1 is the published variant."""
    relative_penalty_weight: NotNegative = 0.0
    """Beside the loss: weight of the penalty on maps relative to their maximum, averaged over sites, at all timesteps. This
    project's own; what it is worth is in LOG.md."""
    max_timestep: Count = 500
    """Attention terms apply where the instance's timestep (of 1000) is below this."""
    average_sites: bool = False
    """Compare one map averaged over all sites (Break-A-Scene) instead of each site's own."""


@dataclass(frozen=True)
class EmbeddingPhase(Checked):
    """Phase 1: the assets' embedding rows alone."""

    train_steps: Count = 600
    learning_rate: NotNegative = 5e-3
    warmup_steps: Count = 10
    cosine_restarts: bool = True
    """Cosine with restarts after the warm-up (one cycle, as published) or constant."""
    draws: AtLeastOne = 1
    """(timestep, noise) draws of one step, divided among its pictures."""
    timesteps: Timesteps = "uniform"
    attention: AttentionTerms = field(default_factory=lambda: AttentionTerms(reward_steps=200))


@dataclass(frozen=True)
class LoraPhase(Checked):
    """Phase 2: LoRA in the UNet's attention (and the text encoder), and the rows."""

    train_steps: Count = 400
    learning_rate: NotNegative = 1e-4
    row_learning_rate: NotNegative = 1e-4
    rank: AtLeastOne = 16
    """Rank of the adapters; alpha equals the rank."""
    text_encoder: bool = True
    draws: AtLeastOne = 1
    timesteps: Timesteps = "uniform"
    use_8bit_adam: bool = True
    averaged_share: Part = 0.0
    """Of the steps, the last ones, over which the learned weights are averaged. 0 as published: the weights after the last step.
    Where `KeepConfig` keeps the best checkpoint, nothing is averaged."""
    attention: AttentionTerms = field(
        default_factory=lambda: AttentionTerms(blocks=("down_blocks", "mid_block", "up_blocks"), levels=(4,))
    )


@dataclass(frozen=True)
class PriorConfig(Checked):
    """Prior preservation: images of the class by the base model itself keep its knowledge in place."""

    enabled: bool = True
    weight: NotNegative = 1.0
    every_steps: AtLeastOne = 1
    """Every so many steps a prior image goes along, and then weighs as much as one in each step would."""
    num_class_images: AtLeastOne = 100
    class_prompt: str = "a photo at the beach"
    """Several prompts, separated by '|', take turns."""
    sampling_steps: Steps = 30
    guidance_scale: NotNegative = 7.5


@dataclass(frozen=True)
class CompositeConfig(Checked):
    """Training pictures made of the things' cut-outs on backgrounds that the base model drew; see `learning/composites.py`."""

    share: Part = 0.0
    """Of the steps; the others are about the photo. 0 as published."""
    outside_weight: Part = 0.5
    """Of the diffusion loss outside the things; 1 on them."""
    scale: Annotated[tuple[float, float], Within(0.05, 4)] = (0.8, 1.2)
    """How much smaller or larger a thing is than in its photo."""
    backgrounds: str = "a photo at the beach|a photo in the snow|a photo on the grass|a photo on a table|a photo of a wall"
    """Prompts, separated by '|', that begin with "a photo"; the words after it are the composite's too."""
    num_backgrounds: AtLeastOne = 20
    """Drawn once, the prompts in turn."""
    sampling_steps: Steps = 30
    guidance_scale: NotNegative = 7.5


@dataclass(frozen=True)
class MemoryConfig(Checked):
    """What is given up for GPU memory; the default gives up nothing. `--vram-gib` chooses, `plan` shows what and why."""

    vae_on_cpu: bool = False
    """The VAE visits the GPU only to encode and to decode."""
    text_encoder_on_cpu: bool = False
    """The text encoder lives and runs on the CPU, in fp32."""
    tiled_vae: bool = False
    """The VAE works tile by tile; tiles overlap and are blended, so pictures differ a little."""
    max_batch: AtLeastOne = 8
    """Pictures that the base model draws together for the prior and the previews."""
    nf4: bool = False
    """The UNet's linear layers in 4 bits (bitsandbytes' NF4)."""


@dataclass(frozen=True)
class KeepConfig(Checked):
    """Keeping the best checkpoint of the last phase by attention leakage and a few samples, instead of its last step."""

    enabled: bool = False
    every_steps: AtLeastOne = 50
    patience: AtLeastOne = 3
    """Checks without improvement after which the phase stops."""
    samples: AtLeastOne = 2
    """Pictures of each asset alone, at every check."""


@dataclass(frozen=True)
class LearnConfig(Checked):
    """All that decides what `learn` does. Saved whole in the bundle."""

    recipe: Literal["mifo", "break-a-scene"] = "mifo"
    embedding: EmbeddingPhase = field(default_factory=EmbeddingPhase)
    lora: LoraPhase = field(default_factory=LoraPhase)
    prior: PriorConfig = field(default_factory=PriorConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
    composites: CompositeConfig = field(default_factory=CompositeConfig)
    union_sampling: bool = True
    """Draw a random subset of the assets for each picture; otherwise all of them, always."""
    alone_share: Part = 0.0
    """Share of the pictures that are of one asset alone; the others are of a random subset, one asset or more. 0 as published.
    Without effect where there is no union sampling."""
    flip_probability: Part = 0.5
    placements: Count = 0
    """Shifted copies of the picture per asset: a token then learns its asset, not where it stood; 0 as published."""
    locality_weight: NotNegative = 0.0
    """Weight of keeping to the prediction without the assets' tokens outside the masks; 0 as published."""
    locality_every: AtLeastOne = 1
    """Every so many steps the locality term is computed, and then weighs as much as all of them: the same on average, cheaper."""
    locality_max_timestep: Count = 1000
    """Locality applies to draws whose timestep (of 1000) is below this: above, noise hides where the masks are."""
    masked_loss_by_area: bool = False
    """Divide the masked loss by the mask's area instead of the picture's."""
    weight_decay: NotNegative = 1e-2
    pictures: AtLeastOne = 1
    """Pictures in each step, each with its own subset of the assets; a phase's draws are divided among them, one for each at
    least. 1 as published."""
    adam_betas: Annotated[tuple[float, float], Within(0, 1, below=True)] = (0.9, 0.99)
    max_grad_norm: NotNegative = 1.0
    resolution: AtLeastOne | None = None
    """Pixels of a square's side; None takes the model's own."""
    aspect: Literal["square", "photo"] = "square"
    """'photo': learn at the photo's own shape, in as many pixels as the square has (SDXL's buckets, Podell et al., arXiv
    2307.01952, section 2.3); 'square': padded to a square, as published."""
    crop_conditioning: bool = False
    """Tell a UNet that was trained with crop coordinates (the same, section 2.2) how far a shifted copy was cropped; see
    `placements`."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """'no', 'fp16' or 'bf16': the frozen base's dtype; LoRA and rows stay fp32."""
    gradient_checkpointing: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, phase in (("embedding", self.embedding), ("lora", self.lora)):
            if phase.draws < self.pictures:
                raise InputError(f"LearnConfig.pictures is {self.pictures}, and {name}.draws {phase.draws}: expected one draw a "
                                 "picture at least; take fewer pictures or more draws")  # fmt: skip


@dataclass(frozen=True)
class GuidanceConfig(Checked):
    """Box guidance: moving the latents until each asset's attention lies in its box (method, section 2)."""

    enabled: bool = True
    steps: Count = 15
    """Denoising steps, from the first, that are guided; bounded masks come from the boxes until then."""
    max_iterations: Count = 5
    loss_threshold: NotNegative = 0.2
    """A picture whose normalized loss (per subject) is below this moves no more in that step."""
    step_size_start: NotNegative = 8.0
    step_size_end: NotNegative = 2.4
    cross_weight: NotNegative = 1.5
    self_weight: NotNegative = 0.5
    blocks: tuple[str, ...] = ("mid_block", "up_blocks")
    levels: Annotated[tuple[int, ...], Within(1)] = (4, 8)
    """As in `AttentionTerms`; of Stable Diffusion's blocks, the middle one and the up block after it."""


@dataclass(frozen=True)
class RefinementConfig(Checked):
    """Refining the boxes to the things' own shapes by clustering self-attention (Bounded Attention, section 4.3)."""

    enabled: bool = True
    every_steps: AtLeastOne = 5
    clusters_per_box: AtLeastOne = 3
    min_cover: Part = 0.2
    blocks: tuple[str, ...] = ("up_blocks",)
    levels: Annotated[tuple[int, ...], Within(1)] = (4,)


@dataclass(frozen=True)
class SynthesisConfig(Checked):
    """All that decides what `synthesize` does, besides prompt, boxes and seed."""

    steps: Steps = 50
    guidance_scale: NotNegative = 7.5
    scheduler: Literal["ddim", "dpm", "unipc", "euler", "own"] = "ddim"
    """'own': the one that the base model's folder names."""
    timestep_spacing: Literal["own", "leading", "linspace", "trailing"] = "own"
    """Where the steps lie on the training schedule (Lin et al., arXiv 2305.08891, table 2); 'own' as the base model's scheduler
    has it. Checkpoints distilled to a few steps want 'trailing', which begins at pure noise."""
    negative_prompt: str = ""
    width: AtLeastOne | None = None
    """Pixels; None takes the model's own resolution."""
    height: AtLeastOne | None = None
    lora_scale: float = 1.0
    bounded: bool = True
    """Box-bounded attention masks at every layer; without them boxes only guide."""
    lora: Literal["everywhere", "boxes"] = "everywhere"
    """Where the bundle's LoRA acts: in the whole picture, or in its assets' boxes alone. Of several bundles it is always the
    boxes."""
    own_text: bool = True
    """Each of several assets in boxes reads the prompt as if it spoke of that asset alone; needs `bounded`."""
    contrast_scale: Contrast = 0.0
    """How strongly each of several assets in boxes is led away from what the words of the others would draw there; needs
    `own_text`. 0 goes without; otherwise a step has one more pass of the UNet, over the conditional rows alone."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    refinement: RefinementConfig = field(default_factory=RefinementConfig)


@dataclass(frozen=True)
class EditConfig(Checked):
    """All that decides what `edit` does, besides picture, mask, prompt and seed (method, section 5)."""

    steps: Steps = 50
    guidance_scale: NotNegative = 7.5
    negative_prompt: str = ""
    lora_scale: float = 1.0
    blending_start_percentage: Annotated[float, Within(0, 1, below=True)] = 0.25
    """The part of the schedule, from its noisy end, that is left out. 0 runs all of it; late starts keep more of the place."""
    start: Literal["noise", "image"] = "noise"
    """Inside the mask: 'noise', or 'image' (the source noised to the start's level), for scribbles and alterations."""
    background: Literal["pixel", "poisson", "optimization", "none"] = "pixel"
    """How the part outside the mask is brought back: 'pixel', 'poisson', 'optimization' or 'none'."""
    optimize: Literal["weights", "latents"] = "weights"
    """What 'optimization' tunes: the decoder's 'weights' or the 'latents'."""
    reconstruction_steps: Count = 75
    mask_dilation: Count = 0
    """Latent pixels by which the mask is larger at the start; it shrinks to the true mask on the way. Plain words then fill the
    mask: what it holds does not look at its surroundings, which it would otherwise continue."""
    bounded: bool = True
    """Box-bounded attention: an asset keeps to its box, plain words to the mask."""
    box_inset: Annotated[float, Within(0, 0.25)] = 0.0
    """Of the mask's longer side: how far inside the mask's box an asset's own ends, at each side, where none is given. Things
    reach over their boxes, and what reaches over the mask is cut away."""
    own_text: bool = True
    """As in `SynthesisConfig`."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)


Drawing = TypeVar("Drawing", SynthesisConfig, EditConfig)


def with_steps(config: Drawing, steps: int | None) -> Drawing:
    """The same with another number of denoising steps, of which as large a part is guided; None leaves it as it is."""
    if steps is None or steps == config.steps:
        return config
    guided = -(-config.guidance.steps * steps // config.steps)  # rounded up
    return replace(config, steps=steps, guidance=replace(config.guidance, steps=guided))


#: Settings that earlier versions wrote into bundles and that nothing reads.
RETIRED = {"full_unet"}

# --- plain data ---------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
    """Plain data for JSON."""
    return asdict(config)


def from_dict(kind: type[T], data: Mapping[str, Any], where: str = "config", native_latents: int = 64) -> T:
    """The inverse of `to_dict`.

    `native_latents` is the side of the base model's latents at its own resolution, by which older settings are translated.
    Raises InputError for keys that do not exist, so that a typo is never ignored, and for values that do not fit their fields.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where} is {repr(data)[:80]}, expected an object")
    hints = field_types(kind)
    if "levels" in hints and "map_sizes" in data:
        data = _with_levels(data, where, native_latents)
    unknown = sorted(str(key)[:50] for key in set(data) - set(hints) - RETIRED)
    if unknown:
        raise InputError(f"{where} has unknown keys {unknown[:10]}; known are {sorted(hints)}")
    values = {}
    for key, value in data.items():
        if key in RETIRED:
            continue
        if is_dataclass(hints[key]):
            value = from_dict(hints[key], value, f"{where}.{key}", native_latents)
        elif isinstance(value, list):
            value = tuple(value)
        values[key] = value
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{where} cannot be used: {error}") from None


def _with_levels(data: Mapping[str, Any], where: str, native_latents: int) -> dict[str, Any]:
    """Settings saved before attention sites were chosen by level: `map_sizes` were heights at the model's own resolution."""
    sizes = data["map_sizes"]
    if not isinstance(sizes, list | tuple) or not all(type(m) is int and m > 0 for m in sizes):
        raise InputError(f"{where}.map_sizes is {str(sizes)[:50]}, expected a list of positive whole numbers")
    levels = sorted({max(1, native_latents // m) for m in sizes})
    return {**{k: v for k, v in data.items() if k != "map_sizes"}, "levels": levels}
