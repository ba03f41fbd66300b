"""Asset tokens in prompts: nobody counts positions, and nothing is cut off silently."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase

import pytest
from transformers import CLIPTokenizer

from mifo.errors import InputError
from mifo.prompts import (
    FUNCTION_WORDS,
    add_asset_tokens,
    asset_token,
    assets_in,
    check_prompt,
    join_assets,
    tokenize_prompt,
    weight_notes,
)
from mifo.toybox.architecture import MAX_TOKENS, build_tokenizer

ASSETS = [asset_token(i) for i in range(12)]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CLIPTokenizer]:
    """A fresh tokenizer that pads with the given token."""
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)

    def fresh(pad_token: str) -> CLIPTokenizer:
        return CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS, pad_token=pad_token
        )

    return fresh


@pytest.fixture(params=["<|endoftext|>", "!"], ids=["as SD 1.5", "as SD 2.1"])
def tokenizer(request: pytest.FixtureRequest, load: Callable[[str], CLIPTokenizer]) -> CLIPTokenizer:
    """Both ways to pad: with the end of text itself, and with an exclamation mark."""
    tokenizer = load(request.param)
    add_asset_tokens(tokenizer, ASSETS)
    return tokenizer


def test_new_tokens_get_new_ids(load: Callable[[str], CLIPTokenizer]) -> None:
    tokenizer = load("<|endoftext|>")
    size = len(tokenizer)
    assert add_asset_tokens(tokenizer, ["<asset1>", "<asset0>"]) == [size, size + 1]
    assert tokenizer.convert_tokens_to_ids(["<asset0>", "<asset1>"]) == [size + 1, size]
    assert len(tokenizer) == size + 2


@pytest.mark.parametrize("tokens", [["<asset7>", "<asset0>"], ["<asset7>", "<asset7>"]])
def test_a_token_is_added_once(load: Callable[[str], CLIPTokenizer], tokens: list[str]) -> None:
    tokenizer = load("<|endoftext|>")
    add_asset_tokens(tokenizer, ["<asset0>"])
    size = len(tokenizer)
    with pytest.raises(InputError, match=f"already has {tokens[1]};"):
        add_asset_tokens(tokenizer, tokens)
    assert len(tokenizer) == size


def test_assets_in_order_of_first_appearance() -> None:
    assert assets_in("<asset10> by <asset1>, <ASSET2> and <asset1>s") == ["<asset10>", "<asset1>", "<asset2>"]
    assert assets_in("asset1 < asset2 > <asset>") == []


def test_joined_assets() -> None:
    assert join_assets(["<asset2>", "<asset0>"]) == "a photo of <asset2> and <asset0>"
    assert join_assets(["<asset1>"], prefix="") == "<asset1>"
    assert assets_in(join_assets(ASSETS[::-1])) == ASSETS[::-1]
    with pytest.raises(ValueError, match="at least one"):
        join_assets([])


def test_positions_are_those_of_the_ids(tokenizer: CLIPTokenizer) -> None:
    result = tokenize_prompt(tokenizer, "a photo of <asset10> and <asset1>", ["<asset1>", "<asset10>"])
    # start a photo of <asset10> and <asset1> end
    assert result.asset_positions == {"<asset1>": (6,), "<asset10>": (4,)}
    assert result.function_positions == (1, 3, 5)
    assert result.end_position == 7
    assert result.length == 8
    assert len(result.input_ids) == MAX_TOKENS
    assert result.input_ids[4] == tokenizer.convert_tokens_to_ids("<asset10>")
    assert result.input_ids[7] == tokenizer.eos_token_id
    assert set(result.input_ids[8:]) == {tokenizer.pad_token_id}


@pytest.mark.parametrize(
    ("prompt", "position"),
    [
        ("<asset0>", 1),
        ("a toy,<asset0>,", 4),
        ("(<asset0>)", 2),
        ("a <asset0>'s toy", 2),
        ("toy<asset0>toy", 2),
        ("toy <ASSET0>.", 2),
        ("toy\n<asset0>", 2),
        ("photo photo of <asset1><asset0><asset11>", 5),
        ("zzzyx <asset0>", 6),  # an unknown word of five pieces
    ],
)
def test_an_asset_is_found_wherever_it_stands(tokenizer: CLIPTokenizer, prompt: str, position: int) -> None:
    result = tokenize_prompt(tokenizer, prompt, ["<asset0>"])
    assert result.asset_positions == {"<asset0>": (position,)}
    assert result.input_ids[position] == tokenizer.convert_tokens_to_ids("<asset0>")


def test_a_repeated_asset_has_all_its_positions(tokenizer: CLIPTokenizer) -> None:
    result = tokenize_prompt(tokenizer, "<asset0> and <asset1> and <asset0>", ["<asset0>"])
    assert result.asset_positions == {"<asset0>": (1, 5)}


def test_an_empty_prompt_can_be_tokenized_for_the_unconditional_half(tokenizer: CLIPTokenizer) -> None:
    result = tokenize_prompt(tokenizer, "", [])
    assert (result.length, result.end_position, result.function_positions) == (2, 1, ())
    assert result.input_ids[:2] == [tokenizer.bos_token_id, tokenizer.eos_token_id]


def test_function_words_are_whole_words_and_punctuation(tokenizer: CLIPTokenizer) -> None:
    prompt = "The toy, <asset0>: with AN object... zzat thing! (and)"
    result = tokenize_prompt(tokenizer, prompt, ["<asset0>"])
    pieces = tokenizer.convert_ids_to_tokens([result.input_ids[p] for p in result.function_positions])
    assert "".join(piece.removesuffix("</w>") for piece in pieces) == "the,:withan...!(and)"
    assert max(result.function_positions) < result.end_position


@pytest.mark.parametrize(
    ("word", "merges", "pieces"),
    [
        ("cabin", ["c a", "ca b", "i n</w>"], ["cab", "in</w>"]),
        ("often", ["o f", "t e", "te n</w>"], ["of", "ten</w>"]),
    ],
)
def test_a_piece_of_a_word_is_no_function_word(tmp_path: Path, word: str, merges: list[str], pieces: list[str]) -> None:
    joined = [merge.replace(" ", "") for merge in merges]
    endings = [f"{letter}</w>" for letter in ascii_lowercase]
    vocab = dict.fromkeys([*ascii_lowercase, *endings, *joined, "<|startoftext|>", "<|endoftext|>"])
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16)
    result = tokenize_prompt(tokenizer, f"{word} a", [])
    assert tokenizer.convert_ids_to_tokens(result.input_ids[1:4]) == [*pieces, "a</w>"]
    assert result.function_positions == (3,)


def test_every_function_word_is_lower_case() -> None:
    assert {word.lower() for word in FUNCTION_WORDS} == FUNCTION_WORDS


def test_the_longest_prompt_fits_and_one_more_token_does_not(tokenizer: CLIPTokenizer) -> None:
    filler = "toy " * (MAX_TOKENS - 3)
    result = tokenize_prompt(tokenizer, f"{filler}<asset0>", ["<asset0>"])
    assert result.asset_positions["<asset0>"] == (MAX_TOKENS - 2,)
    assert result.end_position == MAX_TOKENS - 1
    with pytest.raises(InputError, match="1 tokens too long: it has 41 with its start and end") as error:
        tokenize_prompt(tokenizer, f"toy {filler}<asset0>", ["<asset0>"])
    assert "<asset0> would be cut off" in str(error.value)


def test_a_long_prompt_names_only_the_assets_that_would_be_lost(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(InputError, match=r"12 tokens too long.* reads 40\. <asset1> would be cut off") as error:
        tokenize_prompt(tokenizer, f"<asset0> {'toy ' * 48}<asset1>", ["<asset0>", "<asset1>"])
    assert "<asset0>" not in str(error.value)
    with pytest.raises(InputError, match=r"reads 40\. Shorten"):
        tokenize_prompt(tokenizer, f"<asset0> {'toy ' * 48}", ["<asset0>"])


@pytest.mark.parametrize(
    ("prompt", "asset", "message"),
    [
        ("a photo of <asset1>", "<asset0>", "<asset0> cannot be found in the prompt"),
        ("a photo of <asset99>", "<asset99>", "the assets that the tokenizer knows are <asset0>, <asset1>"),
        ("<asset0> <|endoftext|> toy", "<asset0>", "has '<|endoftext|>'"),
        ("<asset0> <|startoftext|> toy", "<asset0>", "a marker of the tokenizer; remove it"),
    ],
)
def test_what_cannot_be_tokenized_is_explained(tokenizer: CLIPTokenizer, prompt: str, asset: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        tokenize_prompt(tokenizer, prompt, [asset])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "The prompt is empty; write one such as 'a photo of <asset0> and <asset1>'"),
        (" \n\t", "The prompt is empty"),
        ("a \0 photo", "U+0000 at position 2"),
        ("a \x1b[31mred", "U+001B"),
        ("caf\udce9 <asset0>", "U+DCE9"),
        ("<asset2> and <asset0>", "has <asset2>, but the assets that exist are <asset0>, <asset1>"),
        ("<asset10>", "has <asset10>, but"),
        ("<asset00>", "has <asset00>, but"),
        ("<asset 0>", "has <asset 0>, but"),
        ("<asset>", "has <asset>, but"),
        ("<asset_0>", "has <asset_0>, but"),
        ("a photo of asset0", "has 'asset0' without both its brackets; write <asset0>"),
        ("<asset0> and <asset1", "has 'asset1' without both its brackets"),
    ],
)
def test_a_wrong_prompt_is_explained(prompt: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_prompt(prompt, ["<asset0>", "<asset1>"])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "<asset0>",
        "a toy, with no asset",
        "<asset0> on <asset1>, and <asset0> again!",
        "<Asset1>'s café\nat night",
        "his assets: 3 < 4 > 2, the subasset0",
    ],
)
def test_a_right_prompt_passes(prompt: str) -> None:
    check_prompt(prompt, ["<asset0>", "<asset1>"])


def test_without_assets_the_message_says_so() -> None:
    with pytest.raises(InputError, match="there are no assets"):
        check_prompt("<asset0>", [])
    with pytest.raises(InputError, match="The prompt is empty"):
        check_prompt("", [])


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a (red:1.3) car", "(red:1.3)"),
        ("a ((red)) car", "((red))"),
        ("a [red:0.5] car", "[red:0.5]"),
        ("a red++ car", "red++"),
        ("<asset0>--, at night", "<asset0>--"),
        ("a (red car)1.3", "(red car)1.3"),
        ("( <asset0> : 1.2 )", "( <asset0> : 1.2 )"),
    ],
)
def test_weights_are_noticed(prompt: str, found: str) -> None:
    assert weight_notes(prompt) == [f"the prompt has {found}: weights are not supported, and this is read as plain words"]


@pytest.mark.parametrize("prompt", ["a photo (a toy) of <asset0>, at 12:30", "state-of-the-art, well - lit", "a [small] car (2)"])
def test_plain_words_are_no_weights(prompt: str) -> None:
    assert weight_notes(prompt) == []


def test_every_message_names_its_text(tokenizer: CLIPTokenizer) -> None:
    for what in ("negative prompt", "class prompt"):
        with pytest.raises(InputError, match=f"The {what} has <asset99>"):
            check_prompt("<asset99>", ASSETS, what)
        with pytest.raises(InputError, match=f"The {what} is .* too long"):
            tokenize_prompt(tokenizer, "a car " * 40, [], what)
        with pytest.raises(InputError, match=f"The {what} has '<.endoftext.>'"):
            tokenize_prompt(tokenizer, "<|endoftext|>", [], what)
    check_prompt("", ASSETS, "negative prompt")


def test_long_prompts_are_searched_quickly() -> None:
    start = time.monotonic()
    for text in ("(" * 10_000, "[" * 10_000, "+" * 10_000, "a-" * 5_000, "(a" * 5_000, "x" * 10_000):
        weight_notes(text)
    assert time.monotonic() - start < 2
