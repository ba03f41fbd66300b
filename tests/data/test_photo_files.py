"""Photos and masks as cameras and editors make them: turned by EXIF, in other colours than sRGB, cut out, in 16 bits."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from _photos import ORIENTATION, as_stored, icc_profile, jpeg_with_segments, to_srgb, turned
from _tiny import mifo
from PIL import Image, ImageDraw

from mifo.data.instance import Instance, load_instance
from mifo.data.mask_check import check_masks
from mifo.data.mask_file import without_islands
from mifo.data.mask_orientation import fitting_reading
from mifo.data.mask_sizes import MaskSizes
from mifo.errors import InputError
from mifo.io.image_file import load_image

SQUARE, WIDE = (120, 120), (160, 120)
SIZES = MaskSizes(64, 16, (16, 8))
SHAPES = ((14, 10, 60, 44), (70, 60, 104, 104))  # no turn puts one of them onto itself, or onto the other


def scene(size: tuple[int, int]) -> Image.Image:
    """Two coloured ellipses on a background with some texture."""
    noise = Image.effect_noise((size[0] // 2, size[1] // 2), 20).resize(size)
    image = Image.merge("RGB", (noise, noise, noise.point(lambda v: min(255, v + 30))))
    for box, colour in zip(SHAPES, ("firebrick", "gold"), strict=True):
        ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def shape_masks(size: tuple[int, int]) -> list[Image.Image]:
    masks = []
    for box in SHAPES:
        masks.append(Image.new("L", size))
        ImageDraw.Draw(masks[-1]).ellipse(box, fill=255)
    return masks


def write_photo(folder: Path, size: tuple[int, int] = SQUARE, orientation: int = 1, drawn: str = "upright",
                image: Image.Image | None = None) -> Path:  # fmt: skip
    """An instance whose photo its camera stored turned, with masks drawn on the upright picture or on the stored pixels."""
    folder.mkdir(parents=True)
    photo = image or scene(size)
    as_stored(photo, orientation).save(folder / "img.jpg", quality=97, exif=turned(orientation))
    for i, mask in enumerate(shape_masks(size)):
        (as_stored(mask, orientation) if drawn == "stored" else mask).save(folder / f"mask{i}.png")
    return folder


def is_right(instance: Instance, size: tuple[int, int]) -> bool:
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(instance.masks, shape_masks(size), strict=True))


# --- turned by EXIF -----------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", ["upright", "stored"])
@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_masks_fit_a_turned_photo_however_they_were_drawn(tmp_path: Path, orientation: int, size: tuple[int, int], drawn: str):
    instance = load_instance(write_photo(tmp_path / "cups", size, orientation, drawn))
    assert instance.image.size == size and is_right(instance, size)
    said = " ".join(instance.notes)
    assert f"EXIF orientation {orientation}" in said and "was turned upright" in said
    assert ("as drawn on its stored pixels" in said) == (drawn == "stored")
    by_edges = size == SQUARE or orientation < 5
    assert ("by the edges in img.jpg" in said) == by_edges
    assert load_instance(write_photo(tmp_path / "asked", size, orientation, drawn), drawn).notes != ()


def test_an_upright_photo_says_nothing(tmp_path: Path):
    assert load_instance(write_photo(tmp_path / "cups")).notes == ()


def test_where_the_picture_does_not_tell_the_user_is_asked(tmp_path: Path):
    folder = write_photo(tmp_path / "cups", SQUARE, 3, image=Image.effect_noise(SQUARE, 60).convert("RGB"))
    with pytest.raises(InputError, match=r"img.jpg is stored upside down \(EXIF orientation 3\), and mask0.png, mask1.png may be "
                       r"drawn .*--mask-orientation upright or --mask-orientation stored"):  # fmt: skip
        load_instance(folder)
    assert is_right(load_instance(folder, "upright"), SQUARE)
    other = load_instance(folder, "stored")
    assert np.array_equal(np.asarray(other.masks[0]), np.asarray(shape_masks(SQUARE)[0])[::-1, ::-1])
    mifo("check", folder, "--output-path", tmp_path / "a.png", exit_code=2)
    said = mifo("check", folder, "--mask-orientation", "stored", "--output-path", tmp_path / "a.png").stdout
    assert "note: mask0.png, mask1.png: turned with img.jpg" in said and "nothing looks wrong" in said


def test_a_size_that_fits_one_way_only_is_not_turned_the_other(tmp_path: Path):
    folder = write_photo(tmp_path / "cups", WIDE, 6, "stored")
    with pytest.raises(InputError, match=r"--mask-orientation is upright, but .*mask0.png is 120x160 and fits the other way"):
        load_instance(folder, "upright")


def test_a_mask_that_says_its_own_turn_needs_no_edges(tmp_path: Path):
    folder = write_photo(tmp_path / "cups", SQUARE, 3, image=Image.new("RGB", SQUARE, "grey"))
    for i, mask in enumerate(shape_masks(SQUARE)):
        as_stored(mask, 3).save(folder / f"mask{i}.png", exif=turned(3))
    assert is_right(load_instance(folder), SQUARE)


def test_a_careless_outline_is_enough_and_texture_is_not():
    image = scene(SQUARE)
    careless = Image.new("L", SQUARE)
    ImageDraw.Draw(careless).ellipse((12, 9, 63, 46), fill=255)
    drawn = np.asarray(careless) > 0
    assert fitting_reading(image, [drawn], 3) == "upright" and fitting_reading(image, [drawn[::-1, ::-1]], 3) == "stored"
    blob = np.zeros(SQUARE, bool)
    blob[80:110, 10:40] = True  # on nothing
    assert fitting_reading(image, [blob], 2) is None


# --- colours ------------------------------------------------------------------------------------

COLOURS = np.array([[146, 96, 100], [60, 160, 90], [200, 180, 60], [128, 128, 128], [90, 110, 170], [20, 30, 25]], np.uint8)


def patches(colours: np.ndarray) -> Image.Image:
    return Image.fromarray(np.repeat(np.repeat(colours[None], 24, 0), 24, 1))


@pytest.mark.parametrize("name", ["p3", "prophoto"])
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_a_photos_colours_are_srgb_by_its_profile(tmp_path: Path, name: str, suffix: str):
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    path = tmp_path / f"img.{suffix}"
    patches(COLOURS).save(path, icc_profile=icc_profile(name), **options)
    with Image.open(path) as stored:
        own = np.asarray(stored)[12, 12::24]
    error = np.abs(np.asarray(load_image(path))[12, 12::24] - to_srgb(own, name))
    assert error.max() <= 1.5, error
    shape = Image.new("L", (144, 24))
    shape.paste(255, (0, 0, 24, 24))
    shape.save(tmp_path / "mask0.png")
    assert np.array_equal(np.asarray(load_instance(tmp_path).image), np.asarray(load_image(path)))


def test_srgb_and_broken_profiles_leave_the_numbers_alone(tmp_path: Path):
    image = patches(COLOURS)
    image.save(tmp_path / "img.png", icc_profile=icc_profile("srgb"))
    Image.new("L", (144, 24)).save(tmp_path / "mask0.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "img.png")), np.asarray(image))
    shape = Image.new("L", (144, 24))
    shape.paste(255, (0, 0, 24, 24))
    shape.save(tmp_path / "mask0.png")
    for profile in (b"nonsense" * 40, icc_profile("p3")[:300], icc_profile("grey", b"GRAY")):
        image.save(tmp_path / "img.png", icc_profile=profile)
        instance = load_instance(tmp_path)
        assert np.array_equal(np.asarray(instance.image), np.asarray(image))
        assert len(instance.notes) == 1 and "colour profile that cannot be read" in instance.notes[0]


def test_grey_and_transparent_pictures_have_profiles_too(tmp_path: Path):
    grey = Image.fromarray(np.full((24, 24), 60, np.uint8))
    grey.save(tmp_path / "grey.png", icc_profile=icc_profile("grey", b"GRAY"))
    assert load_image(tmp_path / "grey.png").getpixel((3, 3)) == (77, 77, 77)  # 60 under a gamma of 1.8
    clear = patches(COLOURS).convert("RGBA")
    clear.putpixel((0, 0), (9, 9, 9, 0))
    clear.save(tmp_path / "clear.png", icc_profile=icc_profile("p3"))
    loaded = np.asarray(load_image(tmp_path / "clear.png"))
    assert tuple(loaded[0, 0]) == (255, 255, 255)
    assert np.abs(loaded[12, 12] - to_srgb(COLOURS[0], "p3")).max() <= 1.5


# --- masks --------------------------------------------------------------------------------------


@pytest.fixture
def cups(tmp_path: Path) -> Path:
    return write_photo(tmp_path / "cups")


def check(folder: Path) -> tuple[str, str]:
    report = check_masks(load_instance(folder), SIZES)
    return "\n".join(report.notes), "\n".join(report.warnings)


@pytest.mark.parametrize("soft", [False, True])
def test_a_cut_out_is_read_by_its_transparency(cups: Path, soft: bool):
    """A dark thing with a few bright spots, cut out: by brightness it would be its spots."""
    alpha = shape_masks(SQUARE)[0]
    cut = Image.merge("RGB", [Image.effect_noise(SQUARE, 60).point(lambda v: v // 3) for _ in range(3)])
    ImageDraw.Draw(cut).rectangle((30, 20, 40, 28), fill="white")
    if soft:
        alpha = alpha.resize((60, 60)).resize(SQUARE, Image.Resampling.BILINEAR)
    cut.putalpha(alpha)
    cut.save(cups / "mask0.png")
    expected = np.where(np.asarray(alpha) >= 128, 255, 0)
    assert np.array_equal(np.asarray(load_instance(cups).masks[0]), expected)
    assert "mask0.png has its shape in the transparency" in check(cups)[0]


def test_a_mask_painted_black_and_white_on_a_layer_is_read_by_brightness(cups: Path):
    painted = shape_masks(SQUARE)[0].convert("RGBA")
    painted.paste((0, 0, 0, 0), (110, 0, 120, 120))  # the layer is smaller than the canvas
    painted.save(cups / "mask0.png")
    assert is_right(load_instance(cups), SQUARE) and "shape is in its colours" in check(cups)[0]


@pytest.mark.parametrize("levels", [(0, 255), (0, 1), (0, 4095), (0, 65535), (10, 300)])
def test_16_bit_masks_are_read_by_their_own_maximum(cups: Path, levels: tuple[int, int]):
    inside = np.asarray(shape_masks(SQUARE)[0]) > 0
    Image.fromarray(np.where(inside, levels[1], levels[0]).astype(np.uint16)).save(cups / "mask0.png")
    assert is_right(load_instance(cups), SQUARE)
    assert (f"two levels, {levels[0]} and {levels[1]} of 65535" in check(cups)[0]) == (levels[1] < 65535)


def test_zeros_and_ones_and_dark_classes_are_masks_too(cups: Path):
    inside = np.asarray(shape_masks(SQUARE)[0]) > 0
    Image.fromarray(inside.astype(np.uint8)).save(cups / "mask0.png")
    classes = Image.fromarray((np.asarray(shape_masks(SQUARE)[1]) > 0).astype(np.uint8))
    classes.putpalette([0, 0, 0, 128, 0, 0])  # of a data set: its first class is dark red
    classes.save(cups / "mask1.png")
    assert is_right(load_instance(cups), SQUARE) and "two levels, 0 and 1 of 255" in check(cups)[0]


def test_8_bit_greys_in_16_bits_keep_their_half(cups: Path):
    soft = np.asarray(shape_masks(SQUARE)[0].resize((30, 30)).resize(SQUARE, Image.Resampling.BICUBIC)).astype(np.uint16)
    soft[20:24, 20:40] = np.linspace(0, 255, 20)
    Image.fromarray(np.where(soft > 254, 254, soft).astype(np.uint16)).save(cups / "mask0.png")
    assert np.array_equal(np.asarray(load_instance(cups).masks[0]) > 0, soft >= 128)


def test_several_dark_levels_stay_an_error(cups: Path):
    levels = np.zeros(SQUARE, np.uint8)
    levels[:40], levels[40:80] = 1, 2
    Image.fromarray(levels).save(cups / "mask0.png")
    with pytest.raises(InputError, match=r"mask0\.png is empty: its brightest pixel is 2 of 255"):
        load_instance(cups)


def test_stray_pixels_are_named_and_rough_edges_are_not(cups: Path):
    mask = shape_masks(SQUARE)[1]
    mask.putpixel((68, 62), 255)  # beside the thing
    mask.save(cups / "mask1.png")
    assert check(cups)[1] == ""
    mask.putpixel((3, 5), 255)
    mask.save(cups / "mask1.png")
    assert "mask1.png has a tiny island far from its body (1 pixel at (3, 5)); erase" in check(cups)[1]


def test_islands_are_few_pixels_far_away():
    mask = np.zeros((600, 800), bool)
    mask[200:400, 300:500] = True
    assert without_islands(mask) == (mask, ())
    mask[210:220, 700:710] = True  # 100 of 40,000 pixels, 200 pixels away
    mask[0, 0] = True
    kept, islands = without_islands(mask)
    assert kept.sum() == 40_000 and [(i.box, i.pixels) for i in islands] == [((700, 210, 710, 220), 100), ((0, 0, 1, 1), 1)]
    mask[210:230, 700:720] = True  # 1 %: meant
    kept, islands = without_islands(mask)
    assert kept.sum() == 40_400 and len(islands) == 1
    dots = np.zeros((300, 300), bool)
    dots[::10, ::10] = True
    assert without_islands(dots)[1] == (), "specks all over have no body"


# --- what systems leave behind ------------------------------------------------------------------


def test_system_files_and_folders_are_skipped(tmp_path: Path):
    write_photo(tmp_path / "all" / "cups")
    for name in ("__MACOSX", ".hidden", "$RECYCLE.BIN", "@eaDir"):
        (tmp_path / "all" / name).mkdir()
    for name in ("._img.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", "._mask0.png"):
        (tmp_path / "all" / "cups" / name).write_bytes(b"x")
        (tmp_path / "all" / name).write_bytes(b"x")
    (tmp_path / "all" / "cups" / "__MACOSX").mkdir()
    from mifo.cli.parts import instance_folders

    assert [p.name for p in instance_folders(None, tmp_path / "all")] == ["cups"]
    assert load_instance(tmp_path / "all" / "cups").warnings == ()


# --- metadata without end -----------------------------------------------------------------------


def refused_at_once(path: Path, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        load_image(path)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("marker, content", [(0xE1, b"Exif\0\0"), (0xE2, b"ICC_PROFILE\0\1\1"), (0xFE, b""), (0xE1, None)])
def test_a_jpeg_with_endless_metadata_is_refused_at_once(tmp_path: Path, marker: int, content: bytes | None):
    scene(SQUARE).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    parts, count = (b"", 400_000) if content is None else (content.ljust(65_533, b"\0"), 3000)  # 195 MB
    (tmp_path / "a.jpg").write_bytes(jpeg_with_segments(whole, marker, parts, count))
    refused_at_once(tmp_path / "a.jpg", "a.jpg has more than 16 MB of metadata beside its pixels; save it again without")


def test_other_formats_with_endless_metadata(tmp_path: Path):
    image = scene(SQUARE)
    image.save(tmp_path / "a.png", exif=b"Exif\0\0II*\0" + bytes(17 << 20))
    image.save(tmp_path / "a.webp", exif=b"Exif\0\0II*\0" + bytes(17 << 20))
    image.save(tmp_path / "a.gif")  # Pillow joins a long comment's blocks one by one, which can take minutes
    whole, blocks = (tmp_path / "a.gif").read_bytes(), b"".join([b"\xff" + b"x" * 255] * ((15 << 20) // 255))
    first = 13 + 3 * (2 << (whole[10] & 7))  # after the header and the global colour table
    (tmp_path / "a.gif").write_bytes(whole[:first] + b"!\xfe" + blocks + b"\0" + whole[first:])
    for suffix, limit in (("png", 16), ("webp", 16), ("gif", 1)):
        refused_at_once(tmp_path / f"a.{suffix}", f"more than {limit} MB of metadata")


def test_exif_entries_that_share_their_bytes_are_refused(tmp_path: Path):
    """5,000 entries that each claim the same 60,000 bytes: 300 MB once they are read."""
    entries = b"".join(tag.to_bytes(2, "little") + b"\1\0" + (60_000).to_bytes(4, "little") + bytes(4) for tag in range(5000))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + (5000).to_bytes(2, "little") + entries
    for suffix in ("jpg", "png", "webp"):
        scene(SQUARE).save(tmp_path / f"a.{suffix}", exif=exif)
        refused_at_once(tmp_path / f"a.{suffix}", "damaged EXIF data")


def test_a_cameras_megabytes_of_metadata_are_read(tmp_path: Path):
    image = scene(SQUARE)
    image.save(tmp_path / "a.jpg", exif=turned(6))
    (tmp_path / "a.jpg").write_bytes(jpeg_with_segments((tmp_path / "a.jpg").read_bytes(), 0xE2, b"MPF\0".ljust(60_000), 100))
    assert load_image(tmp_path / "a.jpg").size == SQUARE
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.getexif()[ORIENTATION] == 6
