"""Several bundles in one picture: their assets under names of their own, each with its own LoRA in its own box.

    <desk.asset0>, <shelf.asset1>     an asset of the bundle of that name; <asset0> alone is the first bundle's
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..boxes import Box, Layout
from ..errors import InputError, did_you_mean
from ..model.base import BaseModel
from ..model.embedding import use_assets
from ..model.local_lora import LentBundle, lend_by_place
from ..prompts import BACKGROUND_TOKEN, add_asset_tokens, asset_token, things_among
from .store import Bundle, check_fits

NAMED = re.compile(r"<\s*([^<>\s.][^<>\s]*)\.(asset[0-9]+|background)\s*>", re.IGNORECASE)
PLAIN = re.compile(r"<(asset[0-9]+)>", re.IGNORECASE)
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
RESERVED = re.compile(r"asset[0-9]*|background", re.IGNORECASE)


@dataclass(frozen=True)
class Several:
    """Bundles that are used together. Within one picture asset k of all of them together is `<assetK>`, in their order."""

    bundles: tuple[Bundle, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """A word of one's own -> "shelf.asset1" """

    def __post_init__(self) -> None:
        """Raises InputError for names that are given twice, bundles on different bases, and aliases that are none."""
        names = [bundle.name for bundle in self.bundles]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two bundles are called '{twice[0]}'; give each once, or rename one of them")
        first = self.bundles[0]
        for other in self.bundles[1:]:
            if other.base_fingerprint != first.base_fingerprint:
                raise InputError(
                    f"'{first.name}' was learned on {first.base_name} (fingerprint {first.base_fingerprint[:10]}), and "
                    f"'{other.name}' on {other.base_name} ({other.base_fingerprint[:10]}); bundles in one picture need the same "
                    "base model: learn one of them again")  # fmt: skip
        for word, meant in self.aliases.items():
            if not ALIAS.fullmatch(word) or RESERVED.fullmatch(word):
                raise InputError(f"--as gives the word {word[:50]!r}; a word has letters, digits, '-' and '_', begins with a "
                                 "letter, and is neither asset nor background")  # fmt: skip
            self._find(f"<{meant}>")

    # --- names ----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return "+".join(bundle.name for bundle in self.bundles)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The assets' own names within a picture, and the first bundle's background."""
        things = [asset_token(k) for k in range(sum(len(things_among(bundle.tokens)) for bundle in self.bundles))]
        return (*things, *([BACKGROUND_TOKEN] if BACKGROUND_TOKEN in self.bundles[0].tokens else []))

    @property
    def owners(self) -> dict[str, int]:
        """Asset -> number of its bundle."""
        counts = [len(things_among(bundle.tokens)) for bundle in self.bundles]
        owners = [number for number, count in enumerate(counts) for _ in range(count)]
        return {**{asset_token(k): owner for k, owner in enumerate(owners)}, BACKGROUND_TOKEN: 0}

    def full_name(self, token: str) -> str:
        """`<asset3>` -> `<shelf.asset1>`."""
        if token == BACKGROUND_TOKEN:
            return f"<{self.bundles[0].name}.background>"
        number, first = int(token.removeprefix("<asset").removesuffix(">")), 0
        for bundle in self.bundles:
            count = len(things_among(bundle.tokens))
            if number < first + count:
                return f"<{bundle.name}.asset{number - first}>"
            first += count
        raise InputError(f"there is no asset {token} in {self.name}")

    def within(self, text: str) -> str:
        """A prompt, with every name replaced by that within the picture. Raises InputError for an asset that no bundle has."""
        for word, meant in self.aliases.items():
            text = re.sub(rf"<\s*{re.escape(word)}\s*>", f"<{meant}>", text)
        text = PLAIN.sub(lambda m: self._find(f"<{self.bundles[0].name}.{m[1]}>"), text)  # before any name becomes a plain one
        return NAMED.sub(lambda m: self._find(m[0]), text) if "." in text else text

    def outside(self, text: str) -> str:
        """The inverse: what a person reads and gives again."""
        return PLAIN.sub(lambda m: self.full_name(m[0].lower()), text)

    def layout_outside(self, layout: Layout | None) -> Layout | None:
        return None if layout is None else Layout(tuple(self.full_name(t) for t in layout.tokens), layout.boxes)

    def _find(self, name: str) -> str:
        matched = NAMED.fullmatch(name)
        names = [bundle.name for bundle in self.bundles]
        if matched is None:
            raise InputError(f"{name[:80]} names no asset; write it as <{names[-1]}.asset0>")
        asked, asset = matched[1], matched[2].lower()
        if asked not in names:
            raise InputError(f"{name[:80]} is of the bundle '{asked[:50]}', but the bundles are {', '.join(names)}"
                             f"{did_you_mean(asked, names)}")  # fmt: skip
        number = names.index(asked)
        own = things_among(self.bundles[number].tokens)
        if asset == "background":
            if number == 0 and BACKGROUND_TOKEN in self.bundles[0].tokens:
                return BACKGROUND_TOKEN
            raise InputError(f"{name[:80]}: a picture has one background, that of the first bundle, if it was learned")
        if f"<{asset}>" not in own:
            raise InputError(f"{name[:80]} does not exist: '{asked}' has {', '.join(own)}")
        before = sum(len(things_among(bundle.tokens)) for bundle in self.bundles[:number])
        return asset_token(before + own.index(f"<{asset}>"))

    def number_of(self, name: str | None) -> int | None:
        """Of the bundle that a name means. Raises InputError."""
        names = [bundle.name for bundle in self.bundles]
        if name is None:
            return None
        if name not in names:
            guess = did_you_mean(name, names)
            raise InputError(f"--background-lora is '{name[:80]}', but the bundles are {', '.join(names)}{guess}")
        return names.index(name)


@contextmanager
def attach_by_place(base: BaseModel, several: Several, lora_scale: float = 1.0,
                    background: str | None = None) -> Iterator[BaseModel]:  # fmt: skip
    """Lends all bundles' assets to the base model, and each one's adapters where its assets' boxes are; afterwards the weights
    are as they were. `background`: the bundle whose adapter acts outside all boxes; by default none does. Raises InputError.
    """
    for bundle in several.bundles:
        check_fits(base, bundle)
    known = base.tokenizer.get_added_vocab()
    add_asset_tokens(base.tokenizer, [token for token in several.tokens if token not in known])
    ids = [base.tokenizer.get_added_vocab()[token] for token in several.tokens]
    rows = [bundle.token_embeddings[: len(things_among(bundle.tokens))] for bundle in several.bundles]
    if BACKGROUND_TOKEN in several.tokens:
        rows.append(several.bundles[0].token_embeddings[-1:])
    parts = base.layout.adapters
    lent = [LentBundle(b.name, b.folder, b.lora.get("unet_lora"), {parts[n]: b.lora[n] for n in b.adapters if n != "unet_lora"})
            for b in several.bundles]  # fmt: skip
    with use_assets(base.text_encoders, ids, torch.cat(rows)), \
            lend_by_place(base, lent, several.owners, several.number_of(background), lora_scale):  # fmt: skip
        yield base


def hidden_boxes(layout: Layout) -> list[tuple[str, str]]:
    """(asset, the later one in whose box it lies wholly): within the overlap the later one's LoRA acts."""
    found = []
    for k, (token, box) in enumerate(layout):
        for other, later in list(layout)[k + 1 :]:
            if _contains(later, box):
                found.append((token, other))
                break
    return found


def _contains(outer: Box, inner: Box) -> bool:
    return outer.x0 <= inner.x0 and outer.y0 <= inner.y0 and inner.x1 <= outer.x1 and inner.y1 <= outer.y1
