"""LoRA and textual-inversion files of other programs become a bundle.

diffusers' own converters read the names (its own and kohya's); what a bundle cannot hold is refused by name. Every layer's scale
(alpha / rank) is multiplied into its weights, and smaller ranks are filled up with zeros, so that one rank and one alpha hold
for a whole part; both change nothing that is drawn.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from peft import LoraConfig

from ..errors import InputError
from ..io.read_files import read_regular
from ..model.base import BaseModel
from ..model.embedding import initial_vectors
from ..model.lora import KNOWN_TARGETS, Adapter, filled_adapter, remove_adapter
from ..presets import learn_preset
from ..prompts import asset_token
from .files import check_tensors
from .published import METADATA_KEY
from .store import Bundle, save_bundle

MOST_BYTES = 1 << 31
OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "oft_": "OFT",
               "lora_mid": "LoRA with a middle matrix", "diff_b": "biases"}  # fmt: skip


@dataclass
class Imported:
    """What was found in the files."""

    lora: dict[str, Adapter] = field(default_factory=dict)
    embeddings: list[torch.Tensor] = field(default_factory=list)
    """One (sum of widths,) for each textual-inversion file, in order."""
    notes: list[str] = field(default_factory=list)


def import_files(files: Sequence[Path], base: BaseModel, output: Path, words: Sequence[str] = (), overwrite: bool = False,
                 keep_base_path: bool = False) -> tuple[Bundle, list[str]]:  # fmt: skip
    """A bundle at `output` from at most one LoRA file and any number of textual inversions, `.safetensors` all; and notes on what
    it cannot know.

    A textual inversion becomes the next asset. `words` are what the files were trained with: one entry an asset. Without textual
    inversions an asset is the mean of its words' embeddings; in a prompt the words may also be written out. Raises InputError
    for files that are damaged, not made for this base model, or of a kind that a bundle cannot hold.
    """
    found = Imported()
    for path in files:
        _read(path, base, found)
    count = max(len(found.embeddings), len(words))
    if not count:
        raise InputError("without a textual inversion nothing says what an asset is; give the words that the LoRA was trained "
                         "with, such as --words 'red toy car'")  # fmt: skip
    if len(words) not in (0, count):
        raise InputError(f"--words has {len(words)} entries for {count} textual inversions; give one each, with commas between")
    starts = initial_vectors(base.text_encoders, base.tokenizer, [word or None for word in words] or [None] * count, noise=0)
    for index, vector in enumerate(found.embeddings):
        starts[index] = vector
    for index, word in list(enumerate(words))[len(found.embeddings) :]:
        pieces = len(base.tokenizer(word, add_special_tokens=False).input_ids)
        if pieces > 1:
            found.notes.append(f"'{word}' is {pieces} tokens and {asset_token(index)} their mean; in a prompt you may also write "
                               "the words themselves")  # fmt: skip
    if not found.lora:
        found.notes.append("the files have no LoRA: what is drawn rests on the embeddings alone")
    tokens = tuple(asset_token(index) for index in range(count))
    with ExitStack() as stack:
        models = {}
        for name, adapter in found.lora.items():
            models[name] = filled_adapter(base.parts[base.layout.adapters[name]], adapter, files[0])
            stack.callback(remove_adapter, models[name])
        metadata = {"imported": [path.name for path in files]}
        bundle = save_bundle(output, base, tokens, tuple(words) or None, starts, models, learn_preset(base.family), metadata,
                             overwrite=overwrite, keep_base_path=keep_base_path)  # fmt: skip
    return bundle, found.notes


def _read(path: Path, base: BaseModel, found: Imported) -> None:
    if path.suffix.lower() != ".safetensors":
        raise InputError(f"{path} is no .safetensors file; .pt, .bin and .ckpt files can run code when they are read, so convert "
                         "it with a program that you trust")  # fmt: skip
    try:
        content = read_regular(path, MOST_BYTES)
    except FileNotFoundError:
        raise InputError(f"There is no file {path}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    tensors = check_tensors(content, path, "get the file again")
    try:
        vectors = _embedding(tensors, base, path)
        if vectors is not None:
            found.embeddings.append(vectors)
        elif found.lora:
            raise InputError(f"{path} is a second LoRA, but a bundle holds one; import it by itself")
        else:
            found.lora = _lora(tensors, _metadata(content), base, path)
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # shapes, kinds, names
        raise InputError(f"{path} is no LoRA and no textual inversion that can be read ({type(error).__name__}: {error}); get "
                         "the file again") from None  # fmt: skip


# --- textual inversion --------------------------------------------------------------------------


def _embedding(tensors: Mapping[str, torch.Tensor], base: BaseModel, path: Path) -> torch.Tensor | None:
    """(sum of widths,); None for a file of another kind."""
    two = ("clip_l", "clip_g")
    if set(tensors) == set(two):
        parts = [tensors[name] for name in two]
    elif len(tensors) == 1 and next(iter(tensors.values())).ndim in (1, 2):
        parts = list(tensors.values())
    else:
        return None
    rows = [part.float().reshape(-1, part.shape[-1]) for part in parts]
    widths = [row.shape[1] for row in rows]
    if widths != base.text_widths:
        raise InputError(f"{path} has embeddings of {' and '.join(map(str, widths))} numbers, but {base.public_name} takes "
                         f"{' and '.join(map(str, base.text_widths))}: it was made for another family of models")  # fmt: skip
    if any(len(row) != 1 for row in rows):
        raise InputError(f"{path} has {max(map(len, rows))} vectors for one word, but an asset has one; train it with one")
    return torch.cat([row[0] for row in rows])


# --- LoRA ---------------------------------------------------------------------------------------


def _lora(tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], base: BaseModel, path: Path) -> dict[str, Adapter]:
    for sign, kind in OTHER_KINDS.items():
        if any(sign in name for name in tensors):
            raise InputError(f"{path} is {kind}, which a bundle cannot hold; only plain LoRA can be imported")
    try:
        kind = getattr(diffusers, base.layout.pipeline)
        named, alphas = kind.lora_state_dict(dict(tensors), unet_config=base.unet.config)[:2]
    except Exception as error:  # diffusers raises whatever a name leads to that it does not know
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"{path} is no LoRA for {base.layout.title} that diffusers can read ({first})") from None
    by_part: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, weight in named.items():
        part, _, rest = name.partition(".")
        by_part[part][rest] = weight
    adapters = {part: name for name, part in base.layout.adapters.items()}
    if stray := sorted(set(by_part) - set(adapters)):
        raise InputError(f"{path} has weights for {', '.join(stray)[:100]}, but {base.public_name} ({base.layout.title}) has no "
                         "such part: it is no LoRA, or one for another family of models")  # fmt: skip
    found = {}
    for part, weights in by_part.items():
        convert = convert_unet_state_dict_to_peft if part == "unet" else convert_state_dict_to_peft
        if not all(".lora_A." in name or ".lora_B." in name for name in weights):
            weights = convert(weights)
        own = {name.removeprefix(f"{part}."): alpha for name, alpha in (alphas or {}).items() if name.startswith(f"{part}.")}
        stated = {name.removeprefix(f"{part}."): value for name, value in facts.items() if name.startswith(f"{part}.")}
        found[adapters[part]] = _adapter(weights, own, stated, base.parts[part], part, path)
    if not found:
        raise InputError(f"{path} holds neither LoRA nor a textual inversion")
    return found


def _metadata(content: bytes) -> dict[str, Any]:
    """What diffusers says of rank and alpha, if anything. Raises ValueError, TypeError or AttributeError for anything else."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts: dict[str, Any] = json.loads(header.get("__metadata__", {}).get(METADATA_KEY, "{}"))
    return dict(facts.items())


def _adapter(weights: Mapping[str, torch.Tensor], alphas: Mapping[str, Any], stated: Mapping[str, Any], module: torch.nn.Module,
             part: str, path: Path) -> Adapter:  # fmt: skip
    """One rank and one alpha for all layers of a part, and zeros for layers of the same names that the file leaves out."""
    layers: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, weight in weights.items():
        layer, matrix, rest = name.partition(".lora_A.") if ".lora_A." in name else name.partition(".lora_B.")
        if not matrix or rest != "weight":
            raise InputError(f"{path} has {part}.{name[:100]}, which is no part of a plain LoRA")
        layers[layer][matrix.strip(".")] = weight.float()
    own = {_plain(name): (name, layer) for name, layer in module.named_modules()}
    rank = max(pair["lora_A"].shape[0] for pair in layers.values() if "lora_A" in pair) if layers else 0
    filled: dict[str, torch.Tensor] = {}
    targets = set()
    for layer, pair in layers.items():
        name, target = own.get(_plain(layer), (None, None))
        leaf = next((leaf for leaf in KNOWN_TARGETS if layer.endswith(f".{leaf}") or layer == leaf), None)
        if name is None or leaf is None or set(pair) != {"lora_A", "lora_B"}:
            raise InputError(f"{path} has LoRA for the layer {part}.{layer[:100]}, which cannot be placed in this base model")
        down, up = pair["lora_A"], pair["lora_B"]
        shape = tuple(getattr(target, "weight").shape)  # noqa: B009 - a Linear or a convolution
        if down.shape[1:] != shape[1:] or up.shape[0] != shape[0] or up.shape[1] != down.shape[0]:
            raise InputError(f"{path} has LoRA of {tuple(up.shape)} and {tuple(down.shape)} for {part}.{layer[:100]}, "
                             f"whose weight is {shape} here: it was made for another family of models")  # fmt: skip
        up = _alpha(layer, down.shape[0], alphas, stated) / down.shape[0] * up
        missing, key = rank - down.shape[0], f"base_model.model.{name}"
        filled[f"{key}.lora_A.weight"] = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
        filled[f"{key}.lora_B.weight"] = torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], 1)
        targets.add(leaf)
    for name, target in module.named_modules():
        key = f"base_model.model.{name}"
        if any(name.endswith(f".{leaf}") or name == leaf for leaf in targets) and f"{key}.lora_A.weight" not in filled:
            out, into, *kernel = getattr(target, "weight").shape  # noqa: B009
            filled[f"{key}.lora_A.weight"] = torch.zeros(rank, into, *kernel)
            filled[f"{key}.lora_B.weight"] = torch.zeros(out, rank, *([1] * len(kernel)))
    return Adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=sorted(targets), inference_mode=True), filled)


def _plain(layer: str) -> str:
    """Newer transformers have no `text_model` in a CLIPTextModel."""
    return layer.removeprefix("text_model.")


def _alpha(layer: str, rank: int, alphas: Mapping[str, Any], stated: Mapping[str, Any]) -> float:
    """A layer's own alpha where the file has one; without any it is the rank."""
    for name in (layer, layer.removeprefix("text_model."), f"text_model.{layer}"):
        for key in (f"{name}.alpha", f"{name}.lora_A.weight.alpha", name):
            if key in alphas:
                return float(alphas[key])
        if name in (stated.get("alpha_pattern") or {}):
            return float(stated["alpha_pattern"][name])
    return float(stated.get("lora_alpha", rank))
