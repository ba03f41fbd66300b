"""The drawn world: the same seed gives the same picture, and the ground truth is what was drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFilter

from mifo.data.instance import load_instance
from mifo.toybox.architecture import MAX_TOKENS, build_tokenizer
from mifo.toybox.draw import BACKGROUNDS, CLASSES, COLORS, PATTERNS
from mifo.toybox.examples import EXAMPLES, write_example
from mifo.toybox.world import Scene, Thing, draw_scene, mask_box, random_caption, random_scene


def test_the_world_is_as_large_as_promised():
    assert len(CLASSES) >= 8 and len(COLORS) == 12 and len(PATTERNS) == 4 and len(BACKGROUNDS) >= 7


@pytest.mark.parametrize("seed", [0, 7, 123])
def test_a_seed_fixes_the_scene_and_every_pixel(seed):
    first, second = draw_scene(random_scene(seed)), draw_scene(random_scene(seed))
    assert first.scene == second.scene
    assert first.image.tobytes() == second.image.tobytes()
    assert [m.tobytes() for m in first.masks] == [m.tobytes() for m in second.masks]


def test_masks_lie_where_the_boxes_say():
    for seed in range(40):
        drawing = draw_scene(random_scene(seed))
        for thing, mask in zip(drawing.scene.things, drawing.masks, strict=True):
            found = mask_box(mask)
            assert found is not None
            # the star's and the balloon's thin ends do not reach their box: up to 4 of 64 pixels
            assert np.abs(np.array(found) - np.array(thing.box)).max() <= 4 / 64


def test_a_mask_covers_its_thing_and_nothing_else():
    """Drawing the scene without the thing changes the pixels of its mask and no others."""
    scene = Scene((Thing("car", "red", "white", "striped", (0.2, 0.3, 0.7, 0.63)),), "plain", 3)
    with_thing, without = draw_scene(scene), draw_scene(Scene((), "plain", 3))
    changed = np.abs(np.asarray(with_thing.image, int) - np.asarray(without.image, int)).sum(2) > 60
    mask = np.asarray(with_thing.masks[0]) > 0
    with_rim = np.asarray(with_thing.masks[0].filter(ImageFilter.MaxFilter(3))) > 0  # pixels covered by less than half
    assert not (changed & ~with_rim).any()
    assert (changed & mask).sum() >= 0.85 * mask.sum()  # the wheel hubs are nearly as grey as the background


def test_pattern_and_colours_show_in_the_pixels():
    def colors_of(pattern: str) -> set[tuple[int, ...]]:
        scene = Scene((Thing("mug", "red", "white", pattern, (0.1, 0.1, 0.9, 0.84)),), "night", 1)
        pixels = np.asarray(draw_scene(scene, 128).image).reshape(-1, 3)
        return {name for name, rgb in COLORS.items() if (np.abs(pixels.astype(int) - rgb).max(1) < 8).sum() > 100}  # type: ignore[misc]

    assert "red" in colors_of("plain") and "white" not in colors_of("plain")
    for pattern in ("striped", "dotted", "checkered"):
        assert {"red", "white"} <= colors_of(pattern)


def test_captions_say_all_some_or_nothing():
    scene = random_scene(5, count=2)
    assert scene.caption().startswith("a photo of a")
    said = {random_caption(scene, np.random.default_rng(k)) for k in range(200)}
    assert "" in said and scene.caption() in said and len(said) > 5


def test_every_full_caption_fits_the_text_encoder_and_each_word_is_one_token(tmp_path: Path):
    tokenizer = build_tokenizer(tmp_path)
    for seed in range(300):
        caption = random_scene(seed).caption()
        assert len(tokenizer.tokenize(caption)) == len(caption.split())
        assert len(tokenizer(caption).input_ids) <= MAX_TOKENS


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_examples_in_the_checkout_are_what_the_script_writes(name, tmp_path: Path):
    write_example(name, tmp_path / name)
    fresh = load_instance(tmp_path / name)
    committed = load_instance(Path(__file__).parents[2] / "example" / name)
    assert fresh.image.tobytes() == committed.image.tobytes()
    assert [m.tobytes() for m in fresh.masks] == [m.tobytes() for m in committed.masks]
    assert fresh.words == committed.words and len(fresh.masks) == len(EXAMPLES[name].things)
