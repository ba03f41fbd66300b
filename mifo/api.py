"""The Python API: eight functions, which `import mifo` offers.

    from mifo import load_base_model, load_instance, learn, synthesize, edit
    base = load_base_model("sd2.1", device="cuda")
    photo = load_instance("my_photos/desk")
    bundle = learn(photo, base, output="Model_ours/desk")
    result = synthesize(base, bundle, "a photo of <asset0> and <asset2>", boxes=[[0, 0.2, 0.5, 0.9], [0.5, 0.2, 1, 0.9]])
    result.save("output/first")
    edit(base, bundle, "street.jpg", "mask.png", "a photo of <asset2>").save("output/edits")

Settings come from the base model's family, and the assets' words from the bundle; a bundle is attached for as long as a call
lasts. Every function raises `mifo.errors.InputError` for input that is wrong: one message with what was given, what was
expected, what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .boxes import Boxes
from .bundle.instance_copy import kept_crops, kept_instance
from .bundle.several import Several, lend
from .bundle.store import Bundle, find_bundle
from .bundle.store import load_bundle as read_bundle
from .config import EditConfig, LearnConfig, MemoryConfig, SynthesisConfig
from .data.instance import Instance, with_background, without_background
from .data.instance import load_instance as read_instance
from .editing.edit import Edit, EditRequest
from .editing.edit import edit as run_edit
from .editing.frame import BoolArray
from .editing.output import save_edit
from .editing.source_image import SourceImage, load_edit_mask, load_source_image
from .errors import InputError
from .evaluation.backend import Backend
from .evaluation.cases import Case, CaseImage, mask_aspects, read_cases
from .evaluation.choose import make_backend
from .evaluation.report import save_evaluation, table
from .evaluation.run import Evaluation
from .evaluation.run import evaluate as run_evaluate
from .io.outputs import check_apart
from .learning.callbacks import CheckpointJudge
from .learning.checkpoints import Checkpointing
from .learning.learn import learn as run_learn
from .learning.relearn import relearn_config, start_from
from .learning.trainer import Callback, Progress
from .model.base import BaseModel
from .model.device import choose_device, choose_dtype, precision_name
from .model.load_base import load_base_model as read_base_model
from .planning.planner import Plan, Settings, make_plan, read_model
from .presets import edit_preset, learn_preset, synthesis_preset
from .prompts import BACKGROUND_TOKEN
from .synthesis.resumable import Keep, draw_now
from .synthesis.synthesize import Synthesis, save_synthesis
from .synthesis.synthesize import synthesize as run_synthesize

PathLike = str | Path
#: One, several for one picture, or none.
Bundles = Bundle | Sequence[Bundle] | Several | None
Closed = Mapping[str, str | Path | None]
#: (steps done, steps in all)
OnProgress = Callable[[int, int], None]


# --- what goes in -------------------------------------------------------------------------------


def load_base_model(name: str = "toybox", device: str = "", precision: str = "auto",
                    memory: MemoryConfig | None = None) -> BaseModel:  # fmt: skip
    """A frozen Stable Diffusion 1.x, 2.x or XL.

    `name`: 'toybox' (small, ships with the package), 'sd1.5', 'sd2.1', 'sdxl', a hub id, a folder in diffusers' layout, or a
    `.safetensors` checkpoint. `device`: a GPU where there is one, by default. `precision`: 'auto', 'no' (fp32), 'fp16' or
    'bf16'. `memory`: what is given up for less of it; `plan(...).settings.memory` has what a budget needs.
    """
    chosen = choose_device(device)
    return read_base_model(str(name), chosen, choose_dtype(precision, chosen), memory or MemoryConfig())


def load_instance(folder: PathLike, background: bool = False, mask_orientation: str = "auto") -> Instance:
    """A photo and its masks: a folder with `img.{png,jpg,jpeg,webp}`, `mask0.png`, `mask1.png`, ... and, if you like,
    `words.txt`.

    `background`: learn `<background>` too, all that is outside the masks. `mask_orientation`: for photos that EXIF turns,
    whether masks are drawn on the 'upright' picture, on the pixels as 'stored', or 'auto': as they fit.
    """
    instance = read_instance(Path(folder), mask_orientation)
    return with_background(instance) if background else instance


def load_bundle(folder: PathLike) -> Bundle:
    """What `learn` wrote: a folder, or a name under `Model_ours`. It is read whole; later changes of the folder change
    nothing."""
    return read_bundle(find_bundle(str(folder), Path("Model_ours")))


# --- the jobs -----------------------------------------------------------------------------------


def learn(instance: Instance, base: BaseModel, output: PathLike, config: LearnConfig | None = None, *, seed: int | None = None,
          words: Sequence[str | None] | None = None, overwrite: bool = False, resume: bool | None = None,
          checkpoint_every: int = 50, judge: CheckpointJudge | None = None, keep_base_path: bool = False,
          on_progress: Callable[[Progress], None] | None = None, callbacks: Sequence[Callback] = (),
          into: Bundle | None = None, only: Sequence[str] = ()) -> Bundle:  # fmt: skip
    """Learns each masked thing of `instance` as its own token, `<asset0>`, `<asset1>`, ...: token embeddings, then LoRA
    (MIFO, arXiv 2511.00542, section 3). Writes the bundle to `output`, whole or not at all.

    `config`: by default that of the base model's family, `mifo.presets.learn_preset`; its precision is always the base model's.
    `words`: one per asset to start from. `overwrite`: replace a bundle of another photo there. `resume`: go on from an
    interrupted run's checkpoint (True), start over and forget it (False), or raise InputError where there is one of this very
    run (None). `checkpoint_every`: steps; 0 keeps no state. `judge`: scores checkpoints where `config.keep` is enabled, as
    `mifo.evaluation.checkpoints.checkpoint_judge` makes one. `keep_base_path`: write into the bundle where a local base lies.
    `callbacks`: called beside the training loop, as `mifo.learning.tracking.Tracker` is.

    `into`, `only`: learns the assets `only` ("asset1", ...) again, or for the first time, into the bundle `into`, whose other
    assets stay as they are; in two fifths of the steps, unless `config` says otherwise. If it stands in `output` it is replaced.
    """
    folder = Path(output)
    start = start_from(into, only, instance) if into is not None else None
    if start is None and only:
        raise InputError(f"only {', '.join(only)} would be learned, but into which bundle? Give into=, or leave only= out")
    if start is not None and Path(os.path.realpath(folder)) == Path(os.path.realpath(start.bundle.folder)):
        overwrite = True  # that is what was asked for
    check_apart(folder, folder, {}, {**_closed(base, Several()), "the instance": instance.source}, "output")
    preset = learn_preset(base.family, assets=instance.count)
    preset = relearn_config(preset, start.bundle) if start else preset
    chosen = replace(config or preset, mixed_precision=precision_name(base.dtype))  # type: ignore[arg-type]
    if seed is not None:
        chosen = replace(chosen, seed=seed)
    return run_learn(instance, base, chosen, folder, on_progress or (lambda progress: None), words,
                     Checkpointing(checkpoint_every, resume=resume), judge, overwrite, keep_base_path, callbacks,
                     start)  # fmt: skip


@dataclass(frozen=True)
class SynthesisResult:
    """Pictures and all that made them."""

    synthesis: Synthesis
    facts: dict[str, Any]
    closed: Closed = field(default_factory=dict, repr=False)
    """Folders in which nothing is written, by what they are: the bundle, the base model."""

    @property
    def images(self) -> list[Image.Image]:
        """RGB; picture k has seed `seed + k`."""
        return self.synthesis.images

    def save(self, folder: PathLike, overwrite: bool = False) -> list[Path]:
        """PNGs with their recipe in the metadata, a contact sheet and `synthesis.json`; the folder appears whole, or not at
        all.

        Raises InputError where the folder has anything in it, or lies in the bundle or the base model; with `overwrite` an
        earlier synthesis is replaced.
        """
        check_apart(Path(folder), Path(folder), {}, self.closed, "folder")
        return save_synthesis(self.synthesis, Path(folder), self.facts, overwrite)


def synthesize(base: BaseModel, bundle: Bundles, prompt: str, boxes: Boxes | None = None, *, num_images: int = 1,
               seed: int = 0, config: SynthesisConfig | None = None, aliases: Mapping[str, str] | None = None,
               background_lora: str | None = None, on_progress: OnProgress | None = None) -> SynthesisResult:  # fmt: skip
    """Draws `num_images` pictures of `prompt`, each asset kept to its box by bounded attention and guidance (Bounded Attention,
    arXiv 2403.16990, section 4). Without `boxes` the prompt is drawn as it is; without a bundle, by the base model alone.

    `boxes`: [x0, y0, x1, y1], from 0 to 1, one per asset in the prompt's order, or by token. `config`: by default that of the
    base model's family, `mifo.presets.synthesis_preset`.

    Of several bundles, a list, the prompt names assets as `<desk.asset0>`; `<asset0>` is the first bundle's. Each asset then
    needs a box, within which its own bundle's LoRA acts, and no other's. `aliases`: own words, {"cat": "shelf.asset1"} for
    `<cat>`. `background_lora`: the bundle whose LoRA acts outside all boxes; by default none does.
    """
    chosen = config or synthesis_preset(base.family)
    _check_count(num_images)
    several = Several.of(bundle, aliases)
    within, by_place = several.within(prompt), several.acts_by_place(chosen.lora, boxes is not None, background_lora)
    layout = several.layout(boxes, within, by_place)
    with lend(base, several, chosen.lora_scale, by_place, background_lora):
        drawn = run_synthesize(base, within, layout, several.tokens, chosen, seed, num_images, on_progress)
    asked = replace(drawn, prompt=several.outside(within), layout=several.layout_outside(drawn.layout))
    return synthesis_result(asked, base, several, **_background(background_lora))


def synthesis_result(synthesis: Synthesis, base: BaseModel, bundle: Bundles, **facts: Any) -> SynthesisResult:
    """For pictures that were drawn by other means, such as the best of several seeds; `facts` go into the record."""
    several = Several.of(bundle)
    return SynthesisResult(synthesis, {**_facts(base, several), **facts}, _closed(base, several))


@dataclass(frozen=True)
class EditResult:
    """Candidates, best first."""

    edit: Edit
    source: SourceImage
    facts: dict[str, Any]
    inputs: Closed = field(default_factory=dict, repr=False)
    closed: Closed = field(default_factory=dict, repr=False)

    @property
    def images(self) -> list[Image.Image]:
        """The whole picture, once for each candidate, RGB in sRGB."""
        return [self.edit.edited_image(k) for k in range(len(self.edit.candidates))]

    @property
    def scores(self) -> list[dict[str, float]]:
        """Of each candidate: 'prompt', and 'asset' where the prompt names one."""
        return [candidate.scores for candidate in self.edit.candidates]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the picture and its mask could not keep, or how they were read."""
        return (*self.source.notes, *self.edit.notes)

    def save(self, folder: PathLike, overwrite: bool = False) -> list[Path]:
        """`edit00.png` (the best) and so on in the picture's own colour profile, a contact sheet and `edit.json`; whole, or not
        at all. Raises InputError as `SynthesisResult.save` does."""
        check_apart(Path(folder), Path(folder), self.inputs, self.closed, "folder")
        return save_edit(self.edit, self.source, Path(folder), self.facts, overwrite)


def edit(base: BaseModel, bundle: Bundles, image: PathLike | Image.Image | SourceImage, mask: PathLike | BoolArray,
         prompt: str, boxes: Boxes | None = None, *,
         num_images: int = 1, seed: int = 0, config: EditConfig | None = None, metadata: str = "safe",
         mask_orientation: str = "auto", aliases: Mapping[str, str] | None = None, background_lora: str | None = None,
         on_progress: OnProgress | None = None) -> EditResult:  # fmt: skip
    """Draws `prompt` into the white part of `mask`, a file of the size of the file `image`; every other byte of the picture
    stays (Blended Latent Diffusion, arXiv 2206.02779). Candidates come best first.

    `image` may be an image of Pillow, or what `mifo.editing.source_image.load_source_image` read, and `mask` an array (H, W),
    True where the picture may change.

    `boxes`: where each asset stands, in fractions of the whole picture, if the prompt has several. `metadata`: what of the
    photo's is kept, 'safe' (no places, serial numbers, owners, thumbnails), 'keep' or 'strip'. `config`: by default that of the
    base model's family, `mifo.presets.edit_preset`. Several bundles: as in `synthesize`.
    """
    _check_count(num_images)
    chosen = config or edit_preset(base.family)
    source = _source_image(image, metadata)
    white, notes = _edit_mask(mask, source, image, mask_orientation)
    files = {name: path for name, path in (("image", image), ("mask", mask)) if isinstance(path, Path | str)}
    read = replace(source, notes=(*source.notes, *notes))
    several = Several.of(bundle, aliases)
    within, by_place = several.within(prompt), several.acts_by_place("everywhere", boxes is not None, background_lora)
    crops = {several.token_of(each, token): crop for each in several.bundles
             for token, crop in kept_crops(each.folder, each.tokens, each.instance).items()
             if token != BACKGROUND_TOKEN or each is several.first}  # fmt: skip
    request = EditRequest(source.image, white, within, several.tokens, several.layout(boxes, within, by_place=False), crops)
    with lend(base, several, chosen.lora_scale, by_place, background_lora):
        drawn = run_edit(base, request, chosen, seed, num_images, on_progress)
    asked = replace(drawn, prompt=several.outside(within), layout=several.layout_outside(drawn.layout))
    facts = {**_facts(base, several), **_background(background_lora)}
    return EditResult(asked, read, facts, files, _closed(base, several))


@dataclass(frozen=True)
class EvaluationResult:
    """What was measured; `record` is what `evaluation.json` holds, with each number's definition and interval."""

    evaluation: Evaluation
    drawn: bool = True
    """The pictures were drawn for it, so `save` writes them too."""
    closed: Closed = field(default_factory=dict, repr=False)

    @property
    def record(self) -> dict[str, Any]:
        return self.evaluation.record

    def save(self, folder: PathLike, overwrite: bool = False) -> dict[str, str]:
        """`evaluation.json`, a contact sheet, the pictures that were drawn for it, and charts where matplotlib is installed (the
        extra `plots`); returns the paths by kind. Raises InputError as `SynthesisResult.save` does."""
        check_apart(Path(folder), Path(folder), {}, self.closed, "folder")
        return save_evaluation(self.evaluation, Path(folder), self.drawn, overwrite)

    def __str__(self) -> str:
        """The table that the command prints."""
        return table(self.record)


class NothingDrawnError(InputError):
    """Not one picture could be drawn, so there is nothing to measure."""


def evaluate(base: BaseModel, bundle: Bundle, *, instance: Instance | None = None,
             prompts: PathLike | Sequence[Case] | None = None, images: Sequence[CaseImage] | None = None,
             samples: int = 4, seed: int = 0, config: SynthesisConfig | None = None, backend: Backend | str = "auto",
             on_progress: OnProgress | None = None, keep: Keep = draw_now) -> EvaluationResult:  # fmt: skip
    """Measures identity, leakage, layout, prompt fit and drift on `samples` pictures of each prompt.

    `prompts`: a text file, one a line, or cases (a prompt and its boxes) such as `mifo.evaluation.cases.read_cases` gives; by
    default each asset alone and all of them in boxes. `images`: measure these instead of drawing, as
    `mifo.evaluation.cases.read_images` gives them. `instance`: what the bundle was learned from, by default its own copy.
    `backend`: 'toybox' (knows what was drawn), 'photo' (DINOv2, CLIP and a detector) or 'auto'. `keep`: keeps finished pictures
    for a run that is interrupted, as `mifo.synthesis.resumable.open_job` does. Raises InputError; of them NothingDrawnError
    where no picture could be drawn.
    """
    _check_count(samples, "samples")
    source = without_background(instance or kept_instance(bundle.folder, bundle.tokens, bundle.instance))
    measured_by = make_backend(backend, base.family, source, str(base.device)) if isinstance(backend, str) else backend
    if prompts is None or isinstance(prompts, str | Path):
        prompts = read_cases(Path(prompts) if prompts else None, None, source.tokens, mask_aspects(source))
    found = run_evaluate(base, bundle, source, measured_by, config or synthesis_preset(base.family), prompts, images, seed,
                         samples, on_progress or (lambda done, total: None), keep)  # fmt: skip
    if found is None:
        raise NothingDrawnError("no picture could be drawn, so nothing was measured")
    return EvaluationResult(found, images is None, _closed(base, Several.of(bundle)))


def plan(model: str = "sd2.1", job: str = "learn", vram_gib: float | None = None, *, resolution: int | None = None,
         assets: int = 3, num_images: int = 1, precision: str = "bf16", config: LearnConfig | None = None,
         edit: EditConfig | None = None, attention_backend: str = "sdpa") -> Plan:  # fmt: skip
    """Counts the GPU memory of `job` ('learn', 'synthesize' or 'edit') without loading any weights, and finds what to give up
    to stay within `vram_gib`. `config` and `edit`: the settings to count, by default the family's. `attention_backend`: 'sdpa' or
    'materialized', whose attention maps are held whole. `Plan.check()` raises InputError with the sum where nothing fits."""
    if job not in ("learn", "synthesize", "edit"):
        raise InputError(f"the job is {job[:50]!r}; choose learn, synthesize or edit")
    shape = read_model(str(model))
    family = shape.family
    dtype = choose_dtype(precision, "cuda")
    settings = Settings(job, shape.check_side(resolution), dtype, config or learn_preset(family), synthesis_preset(family),
                        assets, num_images, backend=attention_backend, edit=edit or edit_preset(family))  # fmt: skip
    return make_plan(shape, settings, vram_gib)


# --- parts --------------------------------------------------------------------------------------


def _facts(base: BaseModel, several: Several) -> dict[str, Any]:
    """What a record says of where its pictures come from; never a path."""
    names = [bundle.name for bundle in several.bundles]
    return {**({"bundles": names} if len(names) > 1 else {"bundle": names[0] if names else None}), **base.record()}


def _background(lora: str | None) -> dict[str, str]:
    return {"background_lora": lora} if lora else {}


def _closed(base: BaseModel, several: Several) -> Closed:
    """The folders in which nothing may be written, by what they are for people; see `outputs.check_apart`."""
    return {**{f"the bundle {bundle.name}": bundle.folder for bundle in several.bundles}, "the base model": base.location}


def _source_image(image: PathLike | Image.Image | SourceImage, metadata: str) -> SourceImage:
    if isinstance(image, Image.Image):
        return SourceImage(image.convert("RGB"), None, b"", None, ())
    return image if isinstance(image, SourceImage) else load_source_image(Path(image), metadata)


def _edit_mask(mask: PathLike | BoolArray, source: SourceImage, image: PathLike | Image.Image | SourceImage,
               drawn: str) -> tuple[BoolArray, tuple[str, ...]]:  # fmt: skip
    """(H, W), True where the picture may change, and notes on how a file was read."""
    if isinstance(mask, Path | str):
        name = Path(image).name if isinstance(image, str | Path) else "the picture"
        return load_edit_mask(Path(mask), source.image, name, orientation=source.orientation, drawn=drawn)
    white, (width, height) = np.asarray(mask), source.image.size
    if white.dtype != np.bool_ or white.shape != (height, width) or not white.any():
        given = f"an array of {white.dtype}, shape {white.shape}" + ("" if white.any() else ", empty")
        raise InputError(f"mask is {given}; expected bool, shape ({height}, {width}), True where the picture may change")
    return white, ()


def _check_count(count: int, name: str = "num_images") -> None:
    if type(count) is not int or count < 1:
        raise InputError(f"{name} is {count!r}, expected a whole number of at least 1")
