"""What the Place tab makes of several bundles, without a browser."""

from __future__ import annotations

import pytest

pytest.importorskip("gradio")

from mifo.web.place_tab import Offer

OFFER = Offer(("desk", "shelf"), ("<asset0>", "<asset1>", "<background>", "<shelf.asset0>"), ("", "", "", ""))


def test_assets_are_found_in_the_prompts_order_whatever_their_bundle() -> None:
    assert OFFER.named_in("a photo of <shelf.asset0> and <ASSET0> on <background>") == ["<shelf.asset0>", "<asset0>"]
    assert OFFER.named_in("a photo of <desk.asset7>") == []


def test_a_prompt_is_checked_as_if_all_were_one_bundles() -> None:
    text = "a photo of <shelf.asset0> beside <asset1>, <background>"
    assert OFFER.numbered(text) == "a photo of <asset3> beside <asset1>, <background>"


def test_a_bundle_that_the_prompt_does_not_name_is_left_out() -> None:
    assert OFFER.used_by("a photo of <asset0>") == ("desk",)
    assert OFFER.used_by("a photo of <shelf.asset0>") == ("desk", "shelf")
