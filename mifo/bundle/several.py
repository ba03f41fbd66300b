"""The bundles of one picture: none, one, or several whose assets have names of their own and their LoRA in their own boxes.

    <desk.asset0>, <shelf.asset1>     an asset of the bundle of that name; <asset0> alone is the first bundle's
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..boxes import Box, Boxes, Layout, layout_of, read_boxes
from ..errors import InputError, did_you_mean
from ..model.base import BaseModel
from ..model.embedding import use_assets
from ..model.local_lora import LentBundle, lend_by_place
from ..prompts import BACKGROUND_TOKEN, add_asset_tokens, asset_token, assets_in, things_among
from .store import Bundle, attach, check_fits

NAMED = re.compile(r"<\s*([^<>\s.][^<>]*?)\.(asset[0-9]+|background)\s*>", re.IGNORECASE)  # a bundle's name may have spaces
PLAIN = re.compile(r"<(asset[0-9]+)>", re.IGNORECASE)
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,39}")
MAX_NAME = 80  # characters
RESERVED = re.compile(r"asset[0-9]*|background", re.IGNORECASE)


@dataclass(frozen=True)
class Several:
    """Bundles that are used together. Within one picture asset k of all of them together is `<assetK>`, in their order."""

    bundles: tuple[Bundle, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    """A word of one's own -> "shelf.asset1" """

    @classmethod
    def of(cls, bundles: Bundle | Sequence[Bundle] | Several | None, aliases: Mapping[str, str] | None = None) -> Several:
        """Raises InputError as the class does."""
        if isinstance(bundles, Several):
            return bundles
        given = () if bundles is None else (bundles,) if isinstance(bundles, Bundle) else tuple(bundles)
        return cls(given, dict(aliases or {}))

    def __post_init__(self) -> None:
        """Raises InputError for names that are given twice, bundles on different bases, and aliases that are none."""
        names = [bundle.name for bundle in self.bundles]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"two bundles are called '{twice[0]}'; give each once, or rename one of them")
        if self._renames and (unnamed := [n for n in names if not NAMED.fullmatch(f"<{n}.asset0>") or n != n.strip()]):
            raise InputError(f"no prompt can name an asset of the bundle {unnamed[0]!r}: rename its folder, without '<' and '>', "
                             "a '.' at its start and white space around it")  # fmt: skip
        first = self.first
        for other in self.bundles[1:]:
            if first and other.base_fingerprint != first.base_fingerprint:
                raise InputError(
                    f"'{first.name}' was learned on {first.base_name} (fingerprint {first.base_fingerprint[:10]}), and "
                    f"'{other.name}' on {other.base_name} ({other.base_fingerprint[:10]}); bundles in one picture need the same "
                    "base model: learn one of them again")  # fmt: skip
        for word, meant in self.aliases.items():
            if not ALIAS.fullmatch(word) or RESERVED.fullmatch(word):
                raise InputError(f"--as gives the word {word[:50]!r}; a word has letters, digits, '-' and '_', begins with a "
                                 "letter, and is neither asset nor background")  # fmt: skip
            self._find(f"<{meant}>")

    @property
    def first(self) -> Bundle | None:
        """Whose assets `<asset0>` and so on are."""
        return self.bundles[0] if self.bundles else None

    def acts_by_place(self, lora: str, has_boxes: bool, background: str | None) -> bool:
        """Whether each LoRA acts in its own boxes: of several bundles always, of one where it was asked for. `lora`: as in
        `SynthesisConfig`. Raises InputError for a `background` that is none of the bundles."""
        self.number_of(background)
        return len(self.bundles) > 1 or background is not None or (bool(self.bundles) and lora == "boxes" and has_boxes)

    # --- names ----------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """For a folder of results."""
        return "+".join(bundle.name for bundle in self.bundles)[:MAX_NAME] or "none"

    @property
    def tokens(self) -> tuple[str, ...]:
        """The assets' own names within a picture, and the first bundle's background."""
        if self.first is None:
            return ()
        things = [asset_token(k) for k in range(sum(len(things_among(bundle.tokens)) for bundle in self.bundles))]
        return (*things, *([BACKGROUND_TOKEN] if BACKGROUND_TOKEN in self.first.tokens else []))

    @property
    def _renames(self) -> bool:
        """Whether people's names differ from those within a picture."""
        return len(self.bundles) > 1 or bool(self.aliases)

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

    def token_of(self, bundle: Bundle, token: str) -> str:
        """One bundle's own token as it is within the picture."""
        return self._find(f"<{bundle.name}.{token.strip('<>')}>") if self._renames else token

    def within(self, text: str) -> str:
        """A prompt, with every name replaced by that within the picture. Raises InputError for an asset that no bundle has."""
        if not self._renames:
            return text
        for word, meant in self.aliases.items():
            text = re.sub(rf"<\s*{re.escape(word)}\s*>", lambda m, meant=meant: f"<{meant}>", text)  # type: ignore[misc]
        text = PLAIN.sub(lambda m: self._find(f"<{self.bundles[0].name}.{m[1]}>"), text)  # before any name becomes a plain one
        return NAMED.sub(lambda m: self._find(m[0]), text)

    def outside(self, text: str) -> str:
        """The inverse: what a person reads and gives again. Of one bundle `<asset0>` stays as it is."""
        return PLAIN.sub(lambda m: self.full_name(m[0].lower()), text) if len(self.bundles) > 1 else text

    def layout_outside(self, layout: Layout | None) -> Layout | None:
        return None if layout is None else Layout(tuple(map(self.outside, layout.tokens)), layout.boxes)

    def layout(self, boxes: Boxes | None, prompt: str, by_place: bool) -> Layout | None:
        """The boxes of a prompt's assets, both under the picture's own names; `boxes` may name them as people do.

        `by_place`: raises InputError where an asset has no box, for whose LoRA were to act on it?
        """
        if self._renames and boxes is not None:
            plain = read_boxes(boxes) if isinstance(boxes, str | Path) else boxes
            if isinstance(plain, Layout):
                plain = Layout(tuple(map(self.within, plain.tokens)), plain.boxes)
            elif isinstance(plain, Mapping):
                plain = {self.within(_bracketed(str(token))): box for token, box in plain.items()}
            boxes = plain
        layout = layout_of(boxes, assets_in(prompt))
        missing = [self.outside(t) for t in assets_in(prompt) if layout is None or t not in layout.tokens]
        if by_place and (missing or layout is None):
            named = ", ".join(missing) or "the prompt, which names no asset,"
            raise InputError(f"{named} has no box; where LoRA acts by place every asset needs one: give --boxes with one for "
                             "each")  # fmt: skip
        return layout

    def _find(self, name: str) -> str:
        matched = NAMED.fullmatch(name)
        names = [bundle.name for bundle in self.bundles]
        if matched is None:
            raise InputError(f"{name[:80]} names no asset; write it as <{names[-1] if names else 'desk'}.asset0>")
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
def lend(base: BaseModel, several: Several, lora_scale: float = 1.0, by_place: bool = False,
         background: str | None = None) -> Iterator[BaseModel]:  # fmt: skip
    """Lends the bundles' assets and adapters to the base model; afterwards the weights are as they were. Raises InputError.

    `by_place`: adapters act where their own assets' boxes are, and that of the bundle `background` outside all of them; otherwise
    the one bundle's acts everywhere.
    """
    if several.first is None:
        yield base
    elif by_place:
        with _by_place(base, several, lora_scale, background):
            yield base
    else:
        with attach(base, several.first, lora_scale):
            yield base


@contextmanager
def _by_place(base: BaseModel, several: Several, lora_scale: float, background: str | None) -> Iterator[None]:
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
        yield


def _bracketed(token: str) -> str:
    """`desk.asset0` as `<desk.asset0>`; tokens and numbers as they are."""
    return f"<{token}>" if "." in token and not token.startswith("<") else token


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
