"""What reads input from strangers, as functions of bytes: each ends well or raises InputError, whatever the bytes are.

Used by the property tests and by scripts/robustness/fuzz.py.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from _folder_targets import FOLDER_TARGETS, folder_seeds
from _scratch_files import bundle_folder, instance_folder, scratch, with_file
from PIL import Image, ImageCms, PngImagePlugin

from mifo.boxes import parse_boxes_alone, parse_layout
from mifo.bundle.store import base_of_bundle, load_bundle
from mifo.data.instance import fit_instance, load_instance
from mifo.editing.source_image import load_source_image
from mifo.errors import InputError
from mifo.evaluation.cases import read_images
from mifo.evaluation.toybox_backend import ToyboxBackend
from mifo.io.image_file import load_image
from mifo.io.terminal import shown
from mifo.prompts import add_asset_tokens, assets_in, check_characters, check_prompt, tokenize_prompt
from mifo.toybox.judge import Judge, load_judge

TOKENS = ("<asset0>", "<asset1>")
PNG = b"\x89PNG\r\n\x1a\n"


@cache
def _tokenizer():
    from mifo.toybox.architecture import build_tokenizer

    tokenizer = build_tokenizer(scratch() / "tokenizer")
    add_asset_tokens(tokenizer, list(TOKENS))
    return tokenizer


# --- the targets --------------------------------------------------------------------------------


def boxes(data: bytes) -> None:
    refused: InputError | None = None
    path = scratch() / "boxes.json"
    path.write_bytes(data)
    for parse in (lambda: parse_layout(path, TOKENS), lambda: parse_boxes_alone(path), lambda: parse_layout(
            data.decode("utf-8", "surrogateescape"), TOKENS)):  # fmt: skip
        try:
            layout = parse()
        except InputError as error:
            refused = error
            continue
        for _, box in layout:
            assert box.rasterize(64, 64).shape == (64, 64) and 0 < box.x1 <= 1
    if refused:
        raise refused


def prompt(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    check_characters(text, "The negative prompt")
    check_prompt(text, TOKENS)
    found = tokenize_prompt(_tokenizer(), text, assets_in(text))
    assert set(found.asset_positions) == set(assets_in(text))


def image(data: bytes) -> None:
    path = scratch() / "picture"
    path.write_bytes(data)
    assert load_image(path).mode == "RGB"


def _use_instance(folder: Path) -> None:
    fit_instance(load_instance(folder), 64)


def instance_image(data: bytes) -> None:
    with_file(instance_folder(), "img.png", data, _use_instance)


def mask(data: bytes) -> None:
    with_file(instance_folder(), "mask1.png", data, _use_instance)


def words(data: bytes) -> None:
    with_file(instance_folder(), "words.txt", data, _use_instance)


def instance_names(data: bytes) -> None:
    """A folder whose files have the names in `data`, one a line; even ones are pictures."""
    folder = Path(tempfile.mkdtemp(dir=scratch()))
    try:
        for index, name in enumerate(data.split(b"\n")[:20]):
            clean = name.replace(b"/", b"").replace(b"\0", b"")[:200]
            if clean not in (b"", b".", b".."):
                source = instance_folder() / ("img.png" if index == 0 else "mask0.png")
                (folder / clean.decode("utf-8", "surrogateescape")).write_bytes(source.read_bytes() if index % 2 == 0 else data)
        _use_instance(folder)
    finally:
        shutil.rmtree(folder)


def _use_bundle(folder: Path) -> None:
    base_of_bundle(load_bundle(folder))


def bundle_json(data: bytes) -> None:
    with_file(bundle_folder(), "bundle.json", data, _use_bundle)


def adapter_config(data: bytes) -> None:
    with_file(bundle_folder(), "unet_lora/adapter_config.json", data, _use_bundle)


def rows(data: bytes) -> None:
    with_file(bundle_folder(), "assets.safetensors", data, _use_bundle)


def adapter(data: bytes) -> None:
    with_file(bundle_folder(), "text_lora/adapter_model.safetensors", data, _use_bundle)


def recipe(data: bytes) -> None:
    """What `evaluate --images` reads: a picture that says itself what was asked for."""
    folder = scratch() / "pictures"
    folder.mkdir(exist_ok=True)
    if not data.startswith(PNG):
        info = PngImagePlugin.PngInfo()
        info.add_text("mifo", data.decode("latin-1").replace("\0", " "))
        data = _png(Image.new("RGB", (16, 16)), pnginfo=info)
    (folder / "000001.png").write_bytes(data)
    assert len(read_images(folder, None, None, TOKENS)) == 1


def edit_picture(data: bytes) -> None:
    path = scratch() / "photo"
    path.write_bytes(data)
    picture = load_source_image(path)
    picture.save(scratch() / "edited.png", picture.image, np.ones(picture.image.size[::-1], bool))


@cache
def _judge() -> Judge:
    return load_judge()


def truth(data: bytes) -> None:
    """Beside the instance that a bundle keeps."""

    def use(folder: Path) -> None:
        backend = ToyboxBackend(load_instance(folder), judge=_judge())
        assert len(backend.words) == 2 and backend.among_sources().shape == (2, 2)

    with_file(instance_folder(), "truth.json", data, use)


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f
    for f in (boxes, prompt, image, instance_image, mask, words, instance_names, bundle_json, adapter_config, rows, adapter,
              recipe, edit_picture, truth, *FOLDER_TARGETS)
}


def attempt(target: str, data: bytes) -> bool:
    """True when the target took `data`, False when it refused it with a message; anything else is raised."""
    try:
        TARGETS[target](data)
    except InputError as error:
        message = shown(str(error))
        assert message and message.isprintable() and len(message) < 1100, message
        return False
    return True


# --- what is right, to start from ---------------------------------------------------------------


def _png(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


@cache
def seeds(target: str) -> tuple[bytes, ...]:
    """Inputs that are right, or nearly so."""
    if target in {f.__name__ for f in FOLDER_TARGETS}:
        return folder_seeds(target)
    picture, grey = Image.effect_noise((96, 64), 60), Image.open(instance_folder() / "mask1.png")
    info = PngImagePlugin.PngInfo()
    info.add_text("mifo", json.dumps({"prompt": "x"}), zip=True)
    info.add_itxt("note", "ü", "de", "Notiz", zip=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "turned"
    colours = picture.convert("RGB")
    profile, wide = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), Image.new("I;16", (96, 64))
    wide.putpixel((40, 30), 65535)
    pictures = (
        _png(colours, pnginfo=info, exif=exif, dpi=(72, 72)), _png(colours.convert("P")), _png(colours.convert("RGBA")),
        _png(picture.convert("I;16")), _png(colours, "JPEG", exif=exif), _png(colours, "WEBP", exif=exif), _png(colours, "GIF"),
        _png(colours, "BMP"), _png(colours, icc_profile=profile), _png(colours, "JPEG", icc_profile=profile[:200]), _png(wide),
        _png(colours, "TIFF"), _png(grey), _png(grey.convert("1")), _png(grey.convert("RGBA")),
    )  # fmt: skip
    read = (bundle_folder() / "bundle.json").read_bytes
    return {
        "boxes": (
            b"[[0.0,0.1,0.5,0.9],[0.5,0.1,1.0,0.9]]", b'{"<asset0>":[0,0,1,1],"asset1":[0,0,1e-1,1]}',
            b"[[NaN,-1,1e999,true]]", b"[" * 2000, b'{"0":[0,0,1,1],"0":[0,0,1,1]}', b"\xef\xbb\xbf[]", b"9" * 5000,
        ),
        "prompt": (
            b"a photo of <asset0> and <asset1>", "a <\u0430sset0> \u202e\u200b".encode(), b"<ASSET0>,<asset1>.",
            b"asset0 < asset1 >", b"<|endoftext|> <|startoftext|>", "\u4e00\u5f20\u7167\u7247 \u2615".encode(), b"a\0b\x1b[2J",
        ),
        "image": pictures, "instance_image": pictures, "mask": pictures, "edit_picture": pictures,
        "recipe": (
            json.dumps({"prompt": "a photo of <asset0>", "boxes": {"<asset0>": [0, 0, 1, 1]}, "seed": 1}).encode(),
            b'{"prompt":"<asset1>","boxes":null,"seed":"7"}', b"[]", b"{" * 3000, pictures[0],
        ),
        "truth": (
            json.dumps({"things": [{"class_name": "car", "main": "red", "second": "white", "pattern": "striped", "flipped": False,
                                    "box": [0, 0, 1, 1]}] * 2}).encode(),
            b'{"things":[{"class_name":[],"main":{},"second":0,"pattern":"plain","box":[0]}]}', b"[1e400]",
        ),
        "words": (b"red cup\nblue cup\n", "tasse\n\xe7ay\n".encode(), b"\xff\xfe", b"\n\n\n"),
        "instance_names": (
            b"img.png\nx\nmask0.png\ny\nmask1.png", b"img.jpg\nimg.png\nMASK00.PNG\nmask-1.png", b"mask99999999999.png",
        ),
        "bundle_json": (read(), b"{}", b"[]", b'{"schema":1}'),
        "adapter_config": ((bundle_folder() / "unet_lora" / "adapter_config.json").read_bytes(), b'{"r":2,"lora_alpha":2}'),
        "rows": ((bundle_folder() / "assets.safetensors").read_bytes(), b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 16),
        "adapter": ((bundle_folder() / "text_lora" / "adapter_model.safetensors").read_bytes(),),
    }[target]  # fmt: skip
