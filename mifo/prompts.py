"""Asset tokens: `<asset0>`, `<asset1>`, ... and where they stand in a tokenized prompt, so that nobody counts."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import InputError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSET_PATTERN = re.compile(r"<asset[0-9]+>", re.IGNORECASE)
BACKGROUND_TOKEN = "<background>"
BACKGROUND_PATTERN = re.compile(BACKGROUND_TOKEN, re.IGNORECASE)
ALMOST_ASSET_PATTERN = re.compile(r"<\s*asset[^<>]*>", re.IGNORECASE)
BARE_ASSET_PATTERN = re.compile(r"\basset[0-9]+", re.IGNORECASE)
TAG_PATTERN = re.compile(r"<\s*(?:lora|lyco|hypernet|embedding)\s*:[^<>]*>", re.IGNORECASE)
#: `(words:1.3)`, `[words:0.5]`, `((words))` and `[[words]]` as in web UIs; `(words)1.3`, `word++` and `word--` as in compel.
WEIGHT_PATTERN = re.compile(
    r"[(\[][^()\[\]]*:\s*-?\d*\.?\d+\s*[)\]]|\({2,8}[^()]+\){2,8}|\[{2,8}[^\[\]]+\]{2,8}|\([^()]*\)-?\d*\.?\d+"
    r"|[^\s,]{1,40}?(?:\+{1,8}|(?<=[\w>)\"'])-{2,8})(?=[\s,.)]|$)"
)
NEGATIVE = "negative prompt"
MAX_CHARACTERS = 10_000  # the text encoders read 77 tokens
#: Cyrillic and Greek letters that are drawn as those of "asset".
LOOK_ALIKES = str.maketrans("аеѕɑαеτтΑАЕЕЅΤТ", "aesaaettaaeestt")
FILLERS = "\u115f\u1160\u2800"  # letters and symbols that are drawn as nothing; other forms of them decompose to these
WORD_END = "</w>"  # CLIP's byte-pair vocabulary marks the last piece of a word with it

FUNCTION_WORDS = frozenset(string.punctuation) | {
    "a", "an", "the", "this", "that", "these", "those", "its", "it", "their", "there", "'s", "and", "or", "but", "as",
    "of", "for", "with", "without", "to", "from", "by", "in", "on", "at", "into", "onto", "over", "under", "above",
    "below", "beneath", "near", "next", "front", "behind", "beside", "besides", "between", "among", "inside", "outside",
    "is", "are", "was", "were", "be", "has", "have",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the text encoder reads it. Positions index `input_ids`."""

    input_ids: list[int]
    """Padded to the tokenizer's model_max_length."""
    asset_positions: dict[str, tuple[int, ...]]
    """Asset token -> every place where it stands, ascending, never empty."""
    function_positions: tuple[int, ...]
    """Articles, prepositions and punctuation: words that no region of the image belongs to."""
    end_position: int
    """The first end-of-text token."""
    length: int
    """Tokens before the padding, start and end of text included."""


def asset_token(index: int) -> str:
    """The token of asset `index`, counted from 0."""
    return f"<asset{index}>"


def assets_in(prompt: str) -> list[str]:
    """The asset tokens in `prompt`, each once, in the order of their first appearance; `<ASSET0>` is `<asset0>`."""
    return list(dict.fromkeys(token.lower() for token in ASSET_PATTERN.findall(prompt)))


def things_among(tokens: Sequence[str]) -> tuple[str, ...]:
    """The tokens without `<background>`, which no box holds and no detector finds."""
    return tuple(token for token in tokens if token != BACKGROUND_TOKEN)


def join_assets(tokens: Sequence[str], prefix: str = "a photo of") -> str:
    """A prompt that names the assets in the order given: "a photo of <asset2> and <asset0>".

    Raises ValueError if there is none.
    """
    if not tokens:
        raise ValueError("a prompt needs at least one asset")
    return f"{prefix} {' and '.join(tokens)}".strip()


def check_characters(text: str, what: str) -> None:
    """Raises InputError if `text` holds a control character or broken Unicode, or is longer than any model reads.

    Line breaks and tabs are white space.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{what} has {len(text)} characters, but at most {MAX_CHARACTERS} are read; shorten it.")
    for position, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise InputError(
                f"{what} has the control character U+{ord(character):04X} at position {position}; remove it."
            )


def check_prompt(prompt: str, known: Sequence[str], what: str = "prompt") -> None:
    """Raises InputError if `prompt` is empty, has control characters or a LoRA tag, or names an asset that is not in `known`.

    An asset may stand in the prompt several times. `what` names the text in messages; a negative prompt may be empty.
    """
    if not prompt.strip():
        if what == NEGATIVE:
            return
        raise InputError(f"The {what} is empty; write one such as {join_assets(known[:2] or ['<asset0>'])!r}.")
    check_characters(prompt, f"The {what}")
    exist = f"the assets that exist are {', '.join(known)}" if known else "there are no assets"
    plain = _plain(prompt)
    if any(pattern.findall(plain) != pattern.findall(prompt) for pattern in (ALMOST_ASSET_PATTERN, BARE_ASSET_PATTERN)):
        odd = _some([f"U+{ord(c):04X}" for c in prompt if not c.isascii()])
        raise InputError(
            f"The {what} has something that looks like an asset but is written with other characters ({odd}); "
            f"type its token anew ({exist})."
        )
    named = [*ALMOST_ASSET_PATTERN.findall(prompt), *BACKGROUND_PATTERN.findall(prompt)]
    unknown = [token for token in named if token.lower() not in known]
    if unknown:
        raise InputError(f"The {what} has {_some(unknown)}, but {exist}{did_you_mean(unknown[0].lower(), known) or '.'}")
    if bare := BARE_ASSET_PATTERN.search(ASSET_PATTERN.sub(" ", prompt)):
        word = bare.group().lower()[:30]
        raise InputError(f"The {what} has {word!r} without both its brackets; write <{word}> ({exist}).")
    if tags := TAG_PATTERN.findall(prompt):
        raise InputError(
            f"The {what} has {_some(tags)}, a tag of other programs; no weights are loaded from a prompt. Remove it: the "
            "bundle's own LoRA is always there, and --lora-scale sets its strength."
        )


def check_class_prompt(text: str) -> tuple[str, ...]:
    """The class prompts, separated by '|', that take turns. Raises InputError when there is none, or one names an asset."""
    prompts = tuple(p.strip() for p in text.split("|") if p.strip())
    if not prompts:
        raise InputError(f"the class prompt {text[:50]!r} is empty; write one such as 'a photo of a car'")
    for prompt in prompts:
        check_prompt(prompt, (), "class prompt")
    return prompts


def weight_notes(prompt: str, what: str = "prompt") -> list[str]:
    """What users of other programs should know: their ways to weight words are read as plain words here, one line at most."""
    found = WEIGHT_PATTERN.findall(prompt)
    return [f"the {what} has {_some(found)}: weights are not supported, and this is read as plain words"] if found else []


def _plain(text: str) -> str:
    """`text` as it looks: full-width and other forms, foreign digits, look-alike letters, no accents, nothing invisible."""
    decomposed = unicodedata.normalize("NFKD", text)
    seen = (c for c in decomposed if unicodedata.category(c) not in ("Cf", "Mn") and c not in FILLERS)
    digits = (str(unicodedata.digit(c)) if unicodedata.category(c) == "Nd" else c for c in seen)
    return "".join(digits).replace("‹", "<").replace("›", ">").translate(LOOK_ALIKES)


def _some(things: list[str]) -> str:
    """Up to five of them, each once and cut short."""
    each = list(dict.fromkeys(things))
    return ", ".join(t[:40] for t in each[:5]) + (f" and {len(each) - 5} more" if len(each) > 5 else "")


def add_asset_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Adds `tokens` to the tokenizer, in place, and returns their new ids in the same order.

    They are found wherever they stand, also glued to other text ("<asset0>,").
    Raises InputError if one is there already or given twice; the tokenizer is then unchanged.
    """
    vocabulary = tokenizer.get_vocab()
    present = [token for i, token in enumerate(tokens) if token in vocabulary or token in tokens[:i]]
    if present:
        raise InputError(
            f"The tokenizer already has {', '.join(present)}; attach each asset once, to a freshly loaded base model."
        )
    tokenizer.add_tokens(list(tokens))
    added = tokenizer.get_added_vocab()
    return [added[token] for token in tokens]


def tokenize_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, assets: Sequence[str],
                    what: str = "prompt") -> TokenizedPrompt:  # fmt: skip
    """Tokenizes `prompt` and finds `assets` (tokens added by `add_asset_tokens`), the function words and the end.

    Raises InputError if the prompt is too long for the text encoder (it is never truncated), if it holds the
    tokenizer's own start or end marker, or if one of `assets` is not in it. `what` names the text in messages.
    """
    text = ASSET_PATTERN.sub(lambda match: match.group().lower(), BACKGROUND_PATTERN.sub(BACKGROUND_TOKEN, prompt))
    encoded = tokenizer(text, padding="max_length", truncation=False, verbose=False)
    input_ids = list(encoded["input_ids"])
    length = sum(encoded["attention_mask"])  # the padding may look like the end of text, or like a "!"
    inner = input_ids[1 : length - 1]
    for marker in (tokenizer.bos_token, tokenizer.eos_token):
        if tokenizer.convert_tokens_to_ids(marker) in inner:
            raise InputError(f"The {what} has {marker!r}, a marker of the tokenizer; remove it.")
    positions = _find_assets(tokenizer, inner, assets)
    _check_length(length, tokenizer.model_max_length, positions, what)
    return TokenizedPrompt(input_ids, positions, _find_function_words(tokenizer, inner), length - 1, length)


def _find_assets(
    tokenizer: PreTrainedTokenizerBase, inner: list[int], assets: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Positions count the start token, which `inner` lacks."""
    added = tokenizer.get_added_vocab()
    positions = {a: tuple(i for i, token_id in enumerate(inner, 1) if token_id == added.get(a)) for a in assets}
    if missing := [asset for asset, found in positions.items() if not found]:
        known = [token for token in added if ASSET_PATTERN.fullmatch(token) or token == BACKGROUND_TOKEN]
        raise InputError(
            f"{', '.join(missing)} cannot be found in the prompt; "
            f"the assets that the tokenizer knows are {', '.join(known) or 'none'}."
        )
    return positions


def _check_length(length: int, limit: int, positions: dict[str, tuple[int, ...]], what: str) -> None:
    if length <= limit:
        return
    cut = [asset for asset, places in positions.items() if places[-1] >= limit - 1]  # the end takes the last place
    lost = f" {', '.join(cut)} would be cut off." if cut else ""
    raise InputError(
        f"The {what} is {length - limit} tokens too long: it has {length} with its start and end, "
        f"and the text encoder reads {limit}.{lost} Shorten it."
    )


def _find_function_words(tokenizer: PreTrainedTokenizerBase, inner: list[int]) -> tuple[int, ...]:
    """A piece of a word is no function word: "cabin" may be "cab" + "in</w>"."""
    added = set(tokenizer.get_added_vocab().values())
    found, word_starts = [], True
    for position, token_id in enumerate(inner, 1):
        piece = str(tokenizer.convert_ids_to_tokens(token_id))
        word, word_ends = piece.removesuffix(WORD_END), piece.endswith(WORD_END) or token_id in added
        if all(c in string.punctuation for c in word) or (word_starts and word_ends and word.lower() in FUNCTION_WORDS):
            found.append(position)
        word_starts = word_ends
    return tuple(found)
