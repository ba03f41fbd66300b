"""More fuzz targets: what lies in folders beside pictures and bundles, and entries of folders that are no files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from _scratch_files import base_folder, bundle_folder, instance_folder, scratch, with_file
from PIL import Image

from mifo.bundle.instance_copy import kept_crops, kept_instance
from mifo.bundle.store import base_of_bundle, load_bundle
from mifo.config import LearnConfig, from_dict, to_dict
from mifo.data.instance import load_instance
from mifo.editing.source_image import load_edit_mask
from mifo.errors import InputError
from mifo.evaluation.cases import read_cases
from mifo.io.manifest import MANIFEST, Manifest, is_ours, read_manifest, remove_ours
from mifo.io.tensor_file import Damaged, read_header, read_state, write_state
from mifo.learning.checkpoints import latest
from mifo.learning.prior import _read_cache
from mifo.model.base_config import check_configs, read_configs
from mifo.model.base_weights import check_files, variant_of, weight_files
from mifo.model.load_base import has_layout
from mifo.presets import learn_preset
from mifo.synthesis.variations import read_prompts

TOKENS = ("<asset0>", "<asset1>")
SHAPE = (1, 2, 3, 3)
KINDS = 7


def checkpoint(data: bytes) -> None:
    """The newest state of an interrupted run, which `learn --resume` reads; a job's kept pictures have the same form."""
    path = scratch() / ".checkpoints" / "cups" / "00000001.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    found = latest(scratch() / "cups")
    try:
        read_state(path)
        assert found == read_header(path)
    except Damaged:
        raise InputError("damaged") from None


def prior_cache(data: bytes) -> None:
    path = scratch() / "prior.safetensors"
    path.write_bytes(data)
    latents = _read_cache(path, "key", SHAPE)
    if latents is None:
        raise InputError("it is drawn again")
    assert latents.shape == SHAPE and torch.isfinite(latents).all()


def prompts_file(data: bytes) -> None:
    path = scratch() / "prompts.txt"
    path.write_bytes(data)
    assert all(read_prompts(path, TOKENS)) and all(case.prompt for case in read_cases(path, None, TOKENS, []))


def edit_mask(data: bytes) -> None:
    path = scratch() / "edit_mask.png"
    path.write_bytes(data)
    photo = Image.new("RGB", (96, 64))
    for resize in (False, True):
        mask, _ = load_edit_mask(path, photo, "photo.png", resize=resize)
        assert mask.shape == (64, 96) and mask.any()


def manifest(data: bytes) -> None:
    """A folder of results with any manifest: what is not as it says, and what lies outside, is never removed."""
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        parent = Path(name)
        folder = parent / "results"
        folder.mkdir()
        for path in (parent / "mine.txt", folder / "a.txt", folder / "mine.txt"):
            path.write_text(path.name)
        (folder / MANIFEST).write_bytes(data)
        ours = is_ours(folder)
        known = read_manifest(folder)
        remove_ours(folder)
        assert (parent / "mine.txt").read_text() == "mine.txt"
        listed = known.files if known else {}
        assert ours or (folder / "mine.txt").exists() or "mine.txt" in listed
        assert folder.exists() or ours
        if known is None:
            raise InputError("nobody can tell what is ours")


def configuration(data: bytes) -> None:
    """What a bundle says of how it was learned."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("no JSON") from None
    to_dict(from_dict(LearnConfig, record))


def _use_base(folder: Path) -> None:
    assert has_layout(folder)
    check_files(folder)
    check_configs(read_configs(folder), folder)
    for part in ("text_encoder", "vae", "unet"):
        assert weight_files(folder, part, variant_of(folder, part))


def base_config(data: bytes) -> None:
    with_file(base_folder(), "unet/config.json", data, _use_base)


def scheduler_config(data: bytes) -> None:
    with_file(base_folder(), "scheduler/scheduler_config.json", data, _use_base)


def shard_index(data: bytes) -> None:
    weights = base_folder() / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(aside := scratch() / "weights")
    try:
        with_file(base_folder(), "unet/diffusion_pytorch_model.safetensors.index.json", data, _use_base)
    finally:
        aside.rename(weights)


def entries(data: bytes) -> None:
    """A bundle and an instance some of whose entries are pipes, folders, links, sparse files: two bytes name an entry and its
    kind. The bundle's own files, and others that must not be read."""
    with tempfile.TemporaryDirectory(dir=scratch()) as name:
        bundle, instance = Path(name) / "bundle", Path(name) / "instance"
        shutil.copytree(bundle_folder(), bundle, copy_function=os.link)
        shutil.copytree(instance_folder(), instance, copy_function=os.link)
        for which, kind in list(zip(data[::2], data[1::2], strict=False))[:8]:
            paths = _entries_of(bundle, instance)
            _put(paths[which % len(paths)], kind % KINDS)
        refused = None
        for use in (lambda: _use_bundle(bundle), lambda: load_instance(instance)):
            try:
                use()
            except InputError as error:
                refused = error
        if refused:
            raise refused


def _use_bundle(folder: Path) -> None:
    bundle = load_bundle(folder)
    base_of_bundle(bundle)
    kept_crops(folder, bundle.tokens, bundle.instance)
    kept_instance(folder, bundle.tokens, bundle.instance)


def _entries_of(bundle: Path, instance: Path) -> list[Path]:
    own = [p for folder in (bundle, instance) for p in sorted(folder.rglob("*"))]
    more = [bundle / "x.safetensors", bundle / "other" / "adapter_config.json", instance / "truth.json", instance / "words.txt",
            instance / "notes.txt", bundle / "instance" / "truth.json"]  # fmt: skip
    return [*own, *(p for p in more if p not in own)]


def _put(path: Path, kind: int) -> None:
    """Replaces what is at `path`; an impossible place stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if kind == 1:
            os.mkfifo(path)
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            path.symlink_to("/dev/zero")
        elif kind == 4:
            with path.open("wb") as file:
                file.truncate(60 << 30)
        elif kind == 5:
            path.symlink_to(path.name)  # to itself
        elif kind == 6:
            path.symlink_to(instance_folder() / "img.png")
    except (FileExistsError, NotADirectoryError, FileNotFoundError, OSError):
        return


FOLDER_TARGETS: tuple[Callable[[bytes], None], ...] = (
    edit_mask, manifest, configuration, checkpoint, prior_cache, prompts_file, base_config, scheduler_config, shard_index,
    entries,
)  # fmt: skip


@cache
def folder_seeds(target: str) -> tuple[bytes, ...]:
    """Inputs that are right, or nearly so."""
    state, cached = scratch() / "state", scratch() / "cached"
    tree = {"phase": "lora", "step": 3, "parameters": [torch.ones(2, 3)], "curve": [{"loss": 0.5}]}
    write_state(state, tree, "step 3", {"a": 1})
    write_state(cached, torch.ones(SHAPE), "prior", "key")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "part-1.safetensors", "conv_out.weight": "../part-2.safetensors"}}
    (base_folder() / "unet" / "part-1.safetensors").touch()
    right = {"weight_map": {"conv_in.weight": "part-1.safetensors"}}
    mine = hashlib.sha256(b"mine.txt").hexdigest()
    lists = [Manifest("synthesis", {name: (8, mine)}).to_bytes() for name in ("mine.txt", "../mine.txt", "/x")]
    lists.append(Manifest("synthesis", {"a.txt": (5, hashlib.sha256(b"a.txt").hexdigest()), "mine.txt": (8, mine)}).to_bytes())
    grey = (instance_folder() / "mask1.png").read_bytes()
    return {
        "edit_mask": (grey, b"\x89PNG\r\n\x1a\n", (instance_folder() / "img.png").read_bytes()),
        "manifest": (*lists, b"{}", b'{"written_by": "mifo", "kind": "x", "files": {}}'),
        "configuration": (json.dumps(to_dict(learn_preset("toybox"))).encode(), b"{}", b'{"seed": 1e400}', b"[" * 3000),
        "checkpoint": (state.read_bytes(), b"\x02\0\0\0\0\0\0\0{}", b"\xff" * 16),
        "prior_cache": (cached.read_bytes(), state.read_bytes()),
        "prompts_file": (b"a photo of {} and <asset0>\na {} in the snow <asset1>\n", b"<asset0>", b"\xff\xfe", b"\n\n"),
        "base_config": ((base_folder() / "unet" / "config.json").read_bytes(), b"{}", b"[]", b'{"sample_size": NaN}'),
        "scheduler_config": ((base_folder() / "scheduler" / "scheduler_config.json").read_bytes(), b'{"beta_end": Infinity}'),
        "shard_index": (json.dumps(right).encode(), json.dumps(index).encode(), b'{"weight_map": {"a": []}}'),
        "entries": (bytes((200, 0)), bytes((0, 1, 3, 2)), bytes(range(14)), b""),
    }[target]  # fmt: skip
