"""Instance folders as users make them: from phones, from paint programs, with all their mistakes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from _tiny import write_instance
from PIL import Image, ImageDraw

from mifo.data.instance import Instance, bucket, fit, fit_instance, load_instance
from mifo.errors import InputError

SIZE = (64, 48)
ORIENTATION = 0x0112
COLOURS = ("red", "lime", "blue", "yellow")


def square(corner: tuple[int, int], side: int = 12, size: tuple[int, int] = SIZE) -> Image.Image:
    """A mask: one white square."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), fill=255)
    return mask


def quarters(size: tuple[int, int]) -> Image.Image:
    """Red, lime, blue, yellow: row by row."""
    image = Image.new("RGB", size)
    width, height = size[0] // 2, size[1] // 2
    for i, colour in enumerate(COLOURS):
        image.paste(colour, (i % 2 * width, i // 2 * height, (i % 2 + 1) * width, (i // 2 + 1) * height))
    return image


def pixels(image: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(image)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A right instance of two assets; the tests below spoil it."""
    folder = tmp_path / "two_cups"
    folder.mkdir()
    quarters(SIZE).save(folder / "img.png")
    square((4, 4)).save(folder / "mask0.png")
    square((40, 20)).save(folder / "mask1.png")
    return folder


def test_a_right_folder(folder: Path) -> None:
    instance = load_instance(folder)
    assert (instance.name, instance.count, instance.source) == ("two_cups", 2, folder)
    assert instance.tokens == ("<asset0>", "<asset1>")
    assert instance.words is None
    assert instance.warnings == ()
    assert instance.image.mode == "RGB"
    np.testing.assert_array_equal(pixels(instance.image), pixels(quarters(SIZE)))
    assert [mask.mode for mask in instance.masks] == ["L", "L"]
    np.testing.assert_array_equal(pixels(instance.masks[1]), pixels(square((40, 20))))


def test_the_name_does_not_depend_on_how_the_folder_is_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_instance(Path(".")).name == "two_cups"


def test_masks_come_in_numeric_order(folder: Path) -> None:
    for number in range(12):
        square((number * 4, 2), side=3).save(folder / f"mask{number}.png")
    instance = load_instance(folder)
    assert instance.count == 12
    assert [mask.getbbox()[0] for mask in instance.masks] == [number * 4 for number in range(12)]  # type: ignore[index]


@pytest.mark.parametrize("name", ["img.jpg", "img.JPEG", "IMG.JPG", "img.webp", "Img.Png"])
def test_image_names(folder: Path, name: str) -> None:
    (folder / "img.png").unlink()
    quarters(SIZE).save(folder / name, quality=95)
    (folder / ".DS_Store").write_bytes(b"x")
    assert load_instance(folder).image.size == SIZE


def test_upper_case_masks(folder: Path) -> None:
    (folder / "mask1.png").rename(folder / "MASK1.PNG")
    assert load_instance(folder).count == 2


def test_a_twelve_megapixel_phone_photo_loads_upright(folder: Path) -> None:
    upright = quarters((3000, 4000))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera stored it lying on its left side
    (folder / "img.png").unlink()
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "img.jpg", exif=exif, quality=80)
    for i in range(2):
        square((200 + 1500 * i, 300), side=500, size=(3000, 4000)).save(folder / f"mask{i}.png", compress_level=1)
    image = load_instance(folder).image
    assert image.size == (3000, 4000)
    for i, colour in enumerate(COLOURS):
        there = image.getpixel((750 + i % 2 * 1500, 1000 + i // 2 * 2000))
        expected = upright.getpixel((750 + i % 2 * 1500, 1000 + i // 2 * 2000))
        assert np.allclose(there, expected, atol=12), f"the {colour} quarter is {there}"  # type: ignore[arg-type]


def test_a_mask_that_fits_a_photo_turned_is_explained(folder: Path) -> None:
    quarters(SIZE).transpose(Image.Transpose.ROTATE_90).save(folder / "img.png")
    with pytest.raises(InputError, match=r"mask0.png is 64x48 but img\.png is 48x64") as error:
        load_instance(folder)
    assert "EXIF" not in str(error.value)


def test_an_exif_orientation_of_a_mask_is_applied(folder: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    square((4, 4)).save(folder / "mask0.png", exif=exif)
    assert load_instance(folder).masks[0].getbbox() == (48, 32, 60, 44)


def greys_16_bit(image: Image.Image) -> Image.Image:
    return Image.fromarray(pixels(image.convert("L")).astype(np.uint16) * 257)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_any_mode_becomes_rgb(folder: Path, mode: str) -> None:
    (folder / "img.png").unlink()
    image = quarters(SIZE).convert(mode)
    image.save(folder / ("img.jpg" if mode == "CMYK" else "img.png"))
    loaded = load_instance(folder).image
    assert loaded.mode == "RGB"
    assert np.abs(pixels(loaded).astype(int) - pixels(image.convert("RGB"))).mean() < 4


def test_16_bit_greys_keep_their_shades(folder: Path) -> None:
    grey = Image.linear_gradient("L").resize(SIZE)
    greys_16_bit(grey).save(folder / "img.png")
    with Image.open(folder / "img.png") as stored:
        assert stored.mode == "I;16"
    np.testing.assert_array_equal(pixels(load_instance(folder).image)[..., 0], pixels(grey))


def test_transparency_lies_over_white(folder: Path) -> None:
    image = quarters(SIZE).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 10, 10))
    image.paste((0, 0, 0, 128), (10, 0, 20, 10))
    image.save(folder / "img.png")
    loaded = load_instance(folder).image
    assert loaded.getpixel((5, 5)) == (255, 255, 255)
    assert loaded.getpixel((15, 5)) == (127, 127, 127)
    assert loaded.getpixel((5, 15)) == (255, 0, 0)


def test_a_transparent_palette_colour_lies_over_white(folder: Path) -> None:
    image = quarters(SIZE).quantize(4)
    image.save(folder / "img.png", transparency=image.getpixel((0, 0)))
    loaded = load_instance(folder).image
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((63, 0)) == (0, 255, 0)


@pytest.mark.parametrize("name", ["img.webp", "img.png"])
def test_of_an_animation_the_first_frame_counts(folder: Path, name: str) -> None:
    (folder / "img.png").unlink()
    frames = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    frames[0].save(folder / name, save_all=True, append_images=frames[1:], lossless=True)
    assert load_instance(folder).image.getpixel((9, 9)) == (255, 0, 0)


def painted_into_alpha(mask: Image.Image, colour: str) -> Image.Image:
    image = Image.new("RGBA", mask.size, colour)
    image.putalpha(mask)
    return image


def palette_mask(mask: Image.Image) -> Image.Image:
    """Index 0 is white and index 1 black, so that indices and brightness disagree."""
    image = mask.point(lambda value: 0 if value else 1).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    return image


BRIGHTER = [128 + value // 2 for value in range(256)]
MASK_KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "1-bit": lambda mask: mask.convert("1"),
    "16-bit": greys_16_bit,
    "RGB": lambda mask: mask.convert("RGB"),
    "opaque RGBA": lambda mask: mask.convert("RGBA"),
    "palette": palette_mask,
    "soft grey": lambda mask: mask.point(lambda value: 128 if value else 127),
    "soft 16-bit": lambda mask: Image.fromarray(np.where(pixels(mask) > 0, 32768, 32767).astype(np.uint16)),
    "white in alpha": lambda mask: painted_into_alpha(mask, "white"),
    "black in alpha": lambda mask: painted_into_alpha(mask, "black"),
    "white on transparent": lambda mask: Image.merge("RGBA", (mask, mask, mask, mask)),
    "painted on a larger opaque patch": lambda mask: Image.merge("LA", (mask, square((2, 2), side=30))),
    "grey and alpha": lambda mask: Image.merge("LA", (mask, Image.new("L", mask.size, 255))),
    "photo cut out by alpha": lambda mask: Image.merge("LA", (Image.effect_noise(mask.size, 9).point(BRIGHTER), mask)),
}  # fmt: skip


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_any_mode_of_mask(folder: Path, kind: str) -> None:
    expected = square((4, 4))
    MASK_KINDS[kind](expected).save(folder / "mask0.png")
    np.testing.assert_array_equal(pixels(load_instance(folder).masks[0]), pixels(expected))


@pytest.mark.parametrize(
    "content", [b"a red cup\nblue ball", b"a red cup\r\n blue ball \r\n\r\n", b"\xef\xbb\xbfa red cup\nblue ball\n"]
)
def test_words(folder: Path, content: bytes) -> None:
    (folder / "words.txt").write_bytes(content)
    assert load_instance(folder).words == ("a red cup", "blue ball")


def test_overlapping_masks_are_warned_about(folder: Path) -> None:
    square((4, 10)).save(folder / "mask2.png")  # shares 12x6 of 12x12 with mask0: just half
    assert load_instance(folder).warnings == ()
    square((4, 6), side=10).save(folder / "mask2.png")
    (warning,) = load_instance(folder).warnings
    assert "mask0.png and mask2.png share 100% of the smaller one" in warning


def test_files_that_look_like_masks_but_are_ignored_are_warned_about(folder: Path) -> None:
    square((4, 4)).save(folder / "mask_2.png")
    (folder / "mask2.jpg").write_bytes(b"")
    first, second = load_instance(folder).warnings
    assert "mask2.jpg is ignored" in first
    assert "mask_2.png is ignored" in second


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and ends where its pixels should begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checked = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 1 << 20) + b"IDAT"


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


noise = Image.effect_noise(SIZE, 90)
ONE, WHITE = Image.new("L", SIZE, 1), Image.new("L", SIZE, 255)
# What to write (None: delete), and what the message must say
MISTAKES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no image": ({"img.png": None}, "has no image .* put the photo there as img.jpg"),
    "another name": ({"img.png": None, "photo.jpg": b"", "notes.txt": b""}, "it has photo.jpg; save the photo as img"),
    "another format": ({"img.png": None, "img.heic": b""}, "it has img.heic; save the photo as img.jpg"),
    "two images": ({"img.jpg": b""}, r"several images \(img.jpg, img.png\)"),
    "two images, by case": ({"IMG.PNG": b""}, r"several images \(IMG.PNG, img.png\)"),
    "no masks": ({"mask0.png": None, "mask1.png": None}, "has no masks: mask0.png"),
    "masks as JPEG": ({"mask0.png": None, "mask1.png": None, "mask0.jpg": b""}, "It has mask0.jpg; save each as mask"),
    "counted from 1": ({"mask0.png": None}, "has mask1.png but no mask0.png; number the masks from 0"),
    "a gap": ({"mask3.png": b""}, "has mask3.png but no mask2.png"),
    "a number twice": ({"mask01.png": b""}, r"two masks number 1 \(mask01.png, mask1.png\)"),
    "a mask of another size": ({"mask1.png": encoded(square((4, 4), size=(48, 32)))},
                               "mask1.png is 48x32 but img.png is 64x48; save the mask at the image's size"),
    "an empty mask": ({"mask1.png": encoded(Image.new("L", SIZE))}, "mask1.png is empty: its brightest pixel is 0 of"),
    "zeros and ones": ({"mask1.png": encoded(ONE)}, "mask1.png is empty: its brightest pixel is 1 of 255; paint"),
    "a full mask": ({"mask1.png": encoded(WHITE)}, "mask1.png covers the whole image"),
    "an empty RGBA mask": ({"mask1.png": encoded(Image.new("RGBA", SIZE, "black"))}, "mask1.png is empty"),
    "a fully transparent mask": ({"mask1.png": encoded(Image.new("RGBA", SIZE))}, "mask1.png is empty"),
    "an empty file": ({"img.png": b""}, "img.png is not an image"),
    "no image at all": ({"img.png": b"<html>404</html>"}, "img.png is not an image that can be read"),
    "PostScript": ({"img.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n\n"}, "is not an image"),
    "a cut mask": ({"mask1.png": encoded(noise)[:900]}, "mask1.png cannot be read .* cut short"),
    "a cut PNG": ({"img.png": encoded(noise)[:900]}, "img.png cannot be read .* cut short"),
    "a cut JPEG": ({"img.png": encoded(noise, "JPEG")[:900]}, "img.png cannot be read .*truncated"),
    "a cut WebP": ({"img.png": encoded(noise, "WEBP")[:900]}, "img.png (cannot|is not an image that can) be read"),
    "one pixel": ({"img.png": encoded(Image.new("RGB", (1, 1)))}, "img.png is 1x1 pixels, but each side needs"),
    "a strip": ({"img.png": encoded(Image.new("RGB", (500, 15)))}, "img.png is 500x15 pixels"),
    "45 megapixels without data": ({"img.png": png_header(9_000, 5_000)}, "img.png cannot be read"),
    "49 megapixels without data": ({"img.png": png_header(9_800, 5_000)}, "img.png cannot be read"),
    "95 megapixels": ({"img.png": png_header(10_000, 9_500)}, "img.png has 95 megapixels, but at most 50"),
    "a bomb": ({"img.png": png_header(60_000, 60_000)}, "img.png has far too many megapixels"),
    "a bomb of a mask": ({"mask0.png": png_header(60_000, 60_000)}, "mask0.png has far too many megapixels"),
    "one word for two masks": ({"words.txt": b"cup\n"}, "words.txt has 1 lines but there are 2 masks"),
    "three words": ({"words.txt": b"cup\nball\ntoy"}, "words.txt has 3 lines"),
    "no words": ({"words.txt": b"\n\n"}, "words.txt has 0 lines"),
    "an empty line": ({"words.txt": b"cup\n\nball"}, "words.txt: line 2 is empty"),
    "words in UTF-16": ({"words.txt": "cup\nball".encode("utf-16")}, "words.txt is not UTF-8"),
    "a control character": ({"words.txt": b"cup\nba\x07ll"}, "words.txt: line 2 has the control character U\\+0007"),
    "a novel": ({"words.txt": b"cup\n" * 50_000}, "words.txt cannot be read .*at most 64 KiB are read"),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("files", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_explained(folder: Path, files: dict[str, bytes | None], message: str) -> None:
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_instance(folder)


def test_a_missing_folder_names_the_instances_beside_it(folder: Path) -> None:
    (folder.parent / "notes").mkdir()
    with pytest.raises(InputError, match=r"no folder .*two_cup; instances beside it: .*two_cups\.$") as error:
        load_instance(folder.parent / "two_cup")
    assert "notes" not in str(error.value)


def test_other_places_that_are_no_folder(folder: Path) -> None:
    with pytest.raises(InputError, match=r"img.png is a file; give the folder"):
        load_instance(folder / "img.png")
    for path in (folder / "a" / "b", folder / ("x" * 5000), Path("nul\0l")):
        with pytest.raises(InputError, match="There is no folder"):
            load_instance(path)


@pytest.mark.parametrize("name", ["img.png", "mask1.png", "words.txt"])
def test_what_cannot_be_opened_is_explained_and_not_skipped(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder / "gone")
    with pytest.raises(InputError, match=rf"{name} cannot be read \(No such file"):
        load_instance(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(InputError, match=rf"{name} cannot be read"):
        load_instance(folder)


def test_a_folder_without_permission_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        load_instance(folder)


@pytest.mark.parametrize(("size", "content"), [((64, 48), (0, 4, 32, 28)), ((48, 64), (4, 0, 28, 32))])
def test_fit_scales_and_pads_but_never_squashes(size: tuple[int, int], content: tuple[int, ...]) -> None:
    fitted = fit(Image.new("RGB", size, "red"), 32, (0, 0, 255), Image.Resampling.LANCZOS)
    assert fitted.size == (32, 32)
    red = pixels(fitted)[..., 0]
    assert Image.fromarray(red).getbbox() == content
    assert red[content[1] : content[3], content[0] : content[2]].min() == 255


def test_fit_enlarges_what_is_small_and_keeps_a_hairline() -> None:
    assert fit(Image.new("L", (20, 10), 9), 80, 0, Image.Resampling.BOX).getbbox() == (0, 20, 80, 60)
    assert fit(Image.new("L", (5000, 20), 9), 64, 0, Image.Resampling.BOX).getbbox() == (0, 31, 64, 32)


def test_a_fitted_instance(folder: Path) -> None:
    fitted = fit_instance(load_instance(folder), 32)
    assert fitted.image.size == fitted.valid.size == (32, 32)
    assert fitted.image.mode == "RGB"
    assert fitted.valid.getbbox() == (0, 4, 32, 28)
    assert fitted.masks[0].getbbox() == (2, 6, 8, 12)  # 12 pixels at (4, 4), halved, below 4 rows of padding
    assert fitted.masks[1].getbbox() == (20, 14, 26, 20)
    assert set(np.unique(pixels(fitted.masks[0]))) == {0, 255}
    mean = pixels(quarters(SIZE)).reshape(-1, 3).mean(axis=0)
    assert np.allclose(fitted.image.getpixel((5, 1)), mean, atol=1)  # type: ignore[arg-type]
    assert fitted.image.getpixel((5, 10)) == (255, 0, 0)


@pytest.mark.parametrize(("filled", "inside"), [(31, False), (32, True)])
def test_half_a_pixel_of_mask_is_enough(filled: int, inside: bool) -> None:
    """One 8x8 block becomes one pixel."""
    block = np.zeros((128, 128), dtype=np.uint8)
    block[64:72, 64:72] = 255  # a whole block, so that the mask never vanishes
    block[:8, :8] = np.where(np.arange(64).reshape(8, 8) < filled, 255, 0)
    instance = Instance("x", Image.new("RGB", (128, 128)), (Image.fromarray(block),), None, Path("x"))
    fitted = pixels(fit_instance(instance, 16).masks[0])
    assert bool(fitted[0, 0]) is inside
    assert fitted[8, 8] == 255


def test_a_mask_that_vanishes_is_explained(folder: Path) -> None:
    square((30, 30), side=1).save(folder / "mask1.png")
    instance = load_instance(folder)
    assert fit_instance(instance, 64).masks[1].getbbox() is not None
    with pytest.raises(InputError, match=r"mask1.png covers 1 pixels of 64x48 and none at 16x16"):
        fit_instance(instance, 16)


@pytest.mark.parametrize(("size", "expected"), [
    ((1000, 1000), (1024, 1024)), ((4000, 3000), (1152, 896)), ((3000, 4000), (896, 1152)), ((1920, 1080), (1344, 768)),
    ((10_000, 100), (4096, 256)),
])  # fmt: skip
def test_buckets_are_those_that_sdxl_was_trained_with(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Podell et al., arXiv 2307.01952, appendix I, for a photo's usual shapes; the last is as wide as it gets."""
    assert bucket(size, 1024, 64) == expected


def test_an_instance_is_fitted_into_a_bucket_without_being_squashed(tmp_path: Path) -> None:
    instance = load_instance(write_instance(tmp_path / "cups"))  # 96 x 64
    fitted = fit_instance(instance, (160, 96))
    assert fitted.image.size == (160, 96)
    assert np.asarray(fitted.valid).any(0).sum() == 144 and np.asarray(fitted.valid).any(1).all()
    assert all(np.asarray(mask).any() for mask in fitted.masks)
