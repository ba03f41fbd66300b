"""Random weights in Stable Diffusion's real architecture, as a folder that --model-path accepts.

    python -m scripts.make_random_sd sd2.1 /tmp/sd21
    python -m scripts.make_random_sd sd1.5 /tmp/sd15_narrow --width-divisor 8

For measuring memory and speed, and for trying the commands; its pictures are noise. The tokenizer knows the toybox's words
as whole tokens and spells all others.
"""

from __future__ import annotations

import gc
import json
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

from mifo.io.files import check_writable, write_folder
from mifo.io.json_text import json_text
from mifo.model.families import Family, family_of
from mifo.model.shapes import VOCABULARY, WIDTH_DIVISORS, shape_of
from mifo.toybox.architecture import build_tokenizer
from scripts.hub_names import use_hub_names


class Shape(str, Enum):
    sd15 = "sd1.5"
    sd21 = "sd2.1"
    sd21_768 = "sd2.1-768"
    sdxl = "sdxl"


class Weights(str, Enum):
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.value]


def write_random_sd(name: str, folder: Path, width_divisor: int = 1, seed: int = 0, dtype: torch.dtype = torch.float16,
                    overwrite: bool = False) -> None:  # fmt: skip
    """Whole or absent. Holds one part at a time in memory (sd2.1's UNet: 1.6 GiB in fp16)."""
    shape = shape_of(name, width_divisor)
    family = family_of(shape["unet"])
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    with write_folder(folder, "random model", overwrite) as temporary:
        torch.set_default_dtype(dtype)  # built in the target dtype: the fp32 weights never exist
        try:
            _save(sharpen(UNet2DConditionModel(**shape["unet"])), temporary / "unet")
            _save(AutoencoderKL(**shape["vae"]), temporary / "vae")
            for text in family.texts:
                kind = getattr(transformers, text.kind)
                _save(kind(CLIPTextConfig(**shape[text.encoder])), temporary / text.encoder)
                if text.kind == "CLIPTextModel":  # one with a projection is saved as it was published
                    use_hub_names(temporary / text.encoder)
        finally:
            torch.set_default_dtype(before)
        DDIMScheduler(**shape["scheduler"]).save_pretrained(temporary / "scheduler")
        write_tokenizer(temporary / "tokenizer")
        if family.pooled:  # its second tokenizer fills up with the first entry of the vocabulary
            write_tokenizer(temporary / "tokenizer_2", padding="!")
        (temporary / "model_index.json").write_text(json_text(_index(family), indent=2) + "\n")


def _save(part: Any, folder: Path) -> None:
    part.save_pretrained(folder, safe_serialization=True)
    del part
    gc.collect()


def sharpen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Uneven attention maps; a random UNet's are flat, and their losses have hardly any gradient."""
    for name, weight in unet.named_parameters():
        if ".to_q." in name or ".to_k." in name:
            weight.data.mul_(3)
    return unet


def write_tokenizer(folder: Path, padding: str = "<|endoftext|>") -> None:
    """CLIP's vocabulary size with the toybox's words in it; the rest are entries that no text is ever spelled with."""
    with tempfile.TemporaryDirectory() as scratch:
        build_tokenizer(Path(scratch))
        known = list(json.loads((Path(scratch) / "vocab.json").read_text()))
        merges = (Path(scratch) / "merges.txt").read_text()
    words, ends = known[:-2], known[-2:]
    fillers = [f"unused{k}" for k in range(VOCABULARY - len(known))]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json_text({s: i for i, s in enumerate([*words, *fillers, *ends])}, ensure_ascii=False))
    (folder / "merges.txt").write_text(merges)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77,
                              pad_token=padding)  # fmt: skip
    tokenizer.save_pretrained(folder)


def _index(family: Family) -> dict[str, Any]:
    kinds: dict[str, Any] = {"scheduler": ["diffusers", "DDIMScheduler"], "unet": ["diffusers", "UNet2DConditionModel"],
                             "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip
    for text in family.texts:
        kinds |= {text.encoder: ["transformers", text.kind], text.tokenizer: ["transformers", "CLIPTokenizer"]}
    if family.pooled:
        return {"_class_name": family.pipeline, "force_zeros_for_empty_prompt": True, **kinds}
    return {"_class_name": family.pipeline, "feature_extractor": [None, None], "requires_safety_checker": False,
            "safety_checker": [None, None], **kinds}  # fmt: skip


def main(
    name: Annotated[Shape, typer.Argument(help="Whose shape.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    width_divisor: Annotated[int, typer.Option(help="1 is the real width; 2, 4 or 8 narrows every layer.")] = 1,
    seed: int = 0,
    dtype: Weights = Weights.fp16,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier random model there.")] = False,
) -> None:
    if width_divisor not in WIDTH_DIVISORS:
        raise typer.BadParameter(f"{width_divisor} is not one of {', '.join(map(str, WIDTH_DIVISORS))}.")
    check_writable(output.parent)
    write_random_sd(name.value, output, width_divisor, seed, dtype.dtype, overwrite)
    size = sum(p.stat().st_size for p in output.rglob("*") if p.is_file())
    print(f"{output}: {name.value}'s shape, width / {width_divisor}, random weights in {dtype.value}, {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    typer.run(main)
