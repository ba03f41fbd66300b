"""Contrast: each asset in a box is led away from what the words of the others would draw there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _tiny import load_base, mifo, tiny_bundle_folder

from mifo import api
from mifo.attention.bounded import BoundedAttention, ForwardPass, bound_attention
from mifo.attention.sites import attention_sites
from mifo.boxes import Box, Layout
from mifo.bundle.store import attach, load_bundle
from mifo.config import SynthesisConfig
from mifo.errors import InputError
from mifo.model.base import BaseModel
from mifo.model.prompt_embeds import joined, predict
from mifo.prompts import tokenize_prompt
from mifo.sampling.contrast import Contrast, make_contrast
from mifo.sampling.layout_control import layout_control, read_texts
from mifo.synthesis.synthesize import synthesize

PROMPT = "a photo of <asset0> and <asset1>"
BOXES = (Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1))
LAYOUT = Layout(("<asset0>", "<asset1>"), BOXES)
CORNERS = "[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]"
CONFIG = SynthesisConfig(steps=4, guidance_scale=3.0, contrast_scale=1.5)


@pytest.fixture(scope="module")
def base() -> Iterator[BaseModel]:
    loaded = load_base()
    with attach(loaded, load_bundle(tiny_bundle_folder())):
        yield loaded


def controlled(base: BaseModel, layout: Layout, images: int = 1) -> tuple[BoundedAttention, Any, Contrast | None]:
    """The control of a drawing pass, its texts, and its contrast."""
    tokens = list(layout.tokens)
    prompt, negative = tokenize_prompt(base.tokenizer, PROMPT, tokens), tokenize_prompt(base.tokenizer, "", [])
    side = base.native_latents
    control = layout_control(base, CONFIG, prompt, layout, (side, side), images)
    assert control is not None
    texts = read_texts(base, control, prompt.input_ids, negative.input_ids)
    return control, texts, make_contrast(base, CONFIG, control, negative.input_ids)


def noise(base: BaseModel, images: int = 1) -> torch.Tensor:
    channels, side = int(base.unet.config["in_channels"]), base.native_latents
    return torch.randn((images, channels, side, side), generator=torch.Generator().manual_seed(1))


def conditional(base: BaseModel, layout: Layout, latents: torch.Tensor) -> torch.Tensor:
    control, texts, _ = controlled(base, layout, len(latents))
    control.sampling = ForwardPass(len(latents), unconditional=False)
    control.end()
    with torch.no_grad(), bound_attention(base.unet, control):
        return predict(base.unet, latents, torch.tensor(500), texts.prompt.expand(len(latents))).float()


def test_it_is_the_difference_to_what_the_words_draw_in_each_others_boxes(base: BaseModel) -> None:
    """Of two assets the others' words are each other's: as if their boxes were exchanged."""
    latents = noise(base)
    own, exchanged = (conditional(base, Layout(tokens, BOXES), latents) for tokens in (LAYOUT.tokens, LAYOUT.tokens[::-1]))
    control, _, contrast = controlled(base, LAYOUT)
    assert contrast is not None
    with torch.no_grad(), bound_attention(base.unet, control):
        added = contrast(latents, torch.tensor(500), own)
    side = base.native_latents
    inside = torch.from_numpy(np.any([box.rasterize(side, side) for box in BOXES], axis=0))
    assert added[..., ~inside].abs().max() == 0 < added[..., inside].abs().min()
    torch.testing.assert_close(added, 1.5 * inside * (own - exchanged), atol=1e-5, rtol=1e-4)


def test_each_text_of_the_others_speaks_of_them_by_turns(base: BaseModel) -> None:
    words = ("<asset0>", "<asset1>", "<background>")
    ids = [0, 11, 2, 12, 4, 13, 9]
    prompt = replace(tokenize_prompt(base.tokenizer, "a", []), input_ids=ids,
                     asset_positions={"<asset0>": (1,), "<asset1>": (3,), "<background>": (5,)})  # fmt: skip
    control = BoundedAttention(prompt, Layout(words, (*BOXES, Box(0.5, 0, 1, 0.5))), (8, 8), "cpu", own_text=True)
    assert control.texts_of_others == [ids, [0, 12, 2, 13, 4, 12, 9], [0, 11, 2, 13, 4, 11, 9], [0, 11, 2, 12, 4, 11, 9]]


def test_words_that_mean_the_same_are_led_nowhere(base: BaseModel) -> None:
    control, texts, contrast = controlled(base, LAYOUT)
    assert contrast is not None
    alike = replace(contrast, others=texts.prompt)
    with torch.no_grad(), bound_attention(base.unet, control):
        assert alike(noise(base), torch.tensor(500), conditional(base, LAYOUT, noise(base))).abs().max() < 1e-5


def test_what_a_drawing_pass_keeps_for_refinement_stays_its_own(base: BaseModel) -> None:
    control, texts, contrast = controlled(base, LAYOUT)
    assert contrast is not None
    site = next(s for s in attention_sites(base.unet) if not s.is_cross)
    both = torch.cat([noise(base)] * 2)
    control.begin(replace(control.sampling, recorded=(site,)))
    with torch.no_grad(), bound_attention(base.unet, control):
        predict(base.unet, both, torch.tensor(500), joined([texts.negative, texts.prompt]))
        before = dict(control._maps)
        contrast(noise(base), torch.tensor(500), noise(base))
    kept = control.end()
    assert list(kept) == [site.name] and torch.equal(kept[site.name], before[site.name])


def test_a_picture_is_led_in_a_batch_as_alone_with_refined_boxes_of_its_own(base: BaseModel) -> None:
    tokens = list(LAYOUT.tokens)
    config = replace(CONFIG, guidance=replace(CONFIG.guidance, steps=1, levels=(1, 2)),
                     refinement=replace(CONFIG.refinement, every_steps=1, levels=(1,)))  # fmt: skip
    together = synthesize(base, PROMPT, LAYOUT, tokens, config, 3, 2).images
    alone = [synthesize(base, PROMPT, LAYOUT, tokens, config, 3 + k).images[0] for k in range(2)]
    without = synthesize(base, PROMPT, LAYOUT, tokens, replace(config, contrast_scale=0.0), 3).images[0]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other)).max() <= 1  # rounding of the batch
    assert np.abs(np.asarray(alone[0]).astype(int) - np.asarray(without)).max() > 8


@pytest.mark.parametrize("layout", [None, Layout(("<asset0>",), (Box(0.1, 0.1, 0.9, 0.9),))])
def test_one_asset_or_none_in_a_box_has_nothing_to_be_led_away_from(base: BaseModel, layout: Layout | None) -> None:
    prompt = "a photo of <asset0>"
    images = [synthesize(base, prompt, layout, ["<asset0>", "<asset1>"], replace(CONFIG, contrast_scale=scale)).images[0]
              for scale in (0.0, 2.0)]  # fmt: skip
    assert images[0].tobytes() == images[1].tobytes()


def test_it_needs_a_text_of_each_assets_own(base: BaseModel) -> None:
    with pytest.raises(InputError, match="--no-own-text"):
        synthesize(base, PROMPT, LAYOUT, list(LAYOUT.tokens), replace(CONFIG, own_text=False))


def test_adapters_that_act_by_place_are_refused() -> None:
    loaded, bundle = load_base(), load_bundle(tiny_bundle_folder())
    with pytest.raises(InputError, match="--lora-place boxes"):
        api.synthesize(loaded, bundle, PROMPT, [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], config=replace(CONFIG, lora="boxes"))


@pytest.mark.parametrize(("more", "said"), [
    ((), "there are 0 in boxes; give --boxes"),
    (("--boxes", CORNERS, "--no-own-text"), "leave out --no-own-text"),
    (("--boxes", CORNERS, "--no-bounded", "--no-guidance"), "leave out --no-own-text and --no-bounded"),
    (("--boxes", CORNERS, "--lora-place", "boxes"), "--lora-place boxes; leave it out"),
])  # fmt: skip
def test_a_command_that_cannot_have_it_says_so_before_it_loads_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("mifo.cli.draw.load_base_of", lambda *_: pytest.fail("the model is loaded"))
    result = mifo("synthesize", tiny_bundle_folder(), "--prompt", PROMPT, *more, "--contrast-scale", "1.5", "--output-path",
                  tmp_path / "out", exit_code=2)  # fmt: skip
    assert "a contrast scale of 1.5" in result.stderr and said in result.stderr and not (tmp_path / "out").exists()


def test_a_command_asks_for_it_and_draws_the_same_again_from_the_picture(tmp_path: Path) -> None:
    arguments = ("synthesize", tiny_bundle_folder(), "--prompt", PROMPT, "--boxes", CORNERS,
                 "--steps", "4", "--no-refine", "--no-guidance")  # fmt: skip
    mifo(*arguments, "--output-path", tmp_path / "plain")
    mifo(*arguments, "--output-path", tmp_path / "led", "--contrast-scale", "2")
    plain, led = ((tmp_path / name / "000000.png").read_bytes() for name in ("plain", "led"))
    mifo("synthesize", "--again", tmp_path / "led" / "000000.png", "--output-dir", tiny_bundle_folder().parent, "--output-path",
         tmp_path / "again")  # fmt: skip
    assert led != plain and (tmp_path / "again" / "000000.png").read_bytes() == led
