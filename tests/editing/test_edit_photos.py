"""Editing photos as cameras make them: turned by EXIF, in a wide colour space, with private metadata, of many megapixels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from _photos import ORIENTATION, as_stored, icc_profile, to_srgb, turned
from _tiny import mifo, tiny_bundle_folder
from PIL import Image, ImageDraw

from mifo.config import EditConfig, GuidanceConfig
from mifo.editing.blending import clone
from mifo.editing.edit import EditRequest, edit
from mifo.editing.frame import make_frame
from mifo.editing.source_image import load_edit_mask, load_source_image
from mifo.errors import InputError
from mifo.evaluation.run import measure_edit

if TYPE_CHECKING:
    from mifo.model.base import BaseModel

SIZE = (120, 120)
BOX = (14, 10, 60, 44)
MAKE, ARTIST, DATE, EXIF_IFD, GPS_IFD = 0x010F, 0x013B, 0x9003, 0x8769, 0x8825
SERIAL, OWNER, MAKER_NOTE, EXPOSURE = 0xA431, 0xA430, 0x927C, 0x829A
SECRETS = (b"SN-12345", b"Jane Doe", b"MAKERNOTE", b"thumbnail of the unedited photo", b"/home/jane")


def photo() -> Image.Image:
    noise = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC, (0, 0, 30, 30))
    ImageDraw.Draw(image).ellipse(BOX, fill="gold")
    return image


def shape() -> Image.Image:
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).ellipse(BOX, fill=255)
    return mask


INSIDE = np.asarray(shape()) > 0


# --- colours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p3", "prophoto"])
def test_an_edit_is_saved_in_the_photos_own_profile_and_the_rest_keeps_its_numbers(tmp_path: Path, name: str):
    profile = icc_profile(name)
    photo().save(tmp_path / "img.png", icc_profile=profile)
    picture = load_source_image(tmp_path / "img.png")
    before = np.asarray(Image.open(tmp_path / "img.png"))
    assert np.abs(np.asarray(picture.image)[INSIDE] - to_srgb(before, name)[INSIDE]).max() <= 1.5
    drawn = np.array(picture.image)
    drawn[INSIDE] = (146, 96, 100)
    picture.save(tmp_path / "out.png", Image.fromarray(drawn), INSIDE)
    stored = Image.open(tmp_path / "out.png")
    after = np.asarray(stored)
    assert stored.info["icc_profile"] == profile and np.array_equal(after[~INSIDE], before[~INSIDE])
    assert np.abs(to_srgb(after, name)[INSIDE] - (146, 96, 100)).max() <= 2, "drawn as asked for, in the photo's own numbers"


def test_a_wide_photo_with_transparency_keeps_both(tmp_path: Path):
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    image.save(tmp_path / "img.png", icc_profile=icc_profile("p3"))
    picture = load_source_image(tmp_path / "img.png")
    drawn = np.array(picture.image)
    drawn[INSIDE] = (146, 96, 100)
    picture.save(tmp_path / "out.png", Image.fromarray(drawn), INSIDE)
    after = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.array_equal(after[~INSIDE], np.asarray(image)[~INSIDE]) and (after[INSIDE][:, 3] == 255).all()
    assert np.abs(to_srgb(after[..., :3], "p3")[INSIDE] - (146, 96, 100)).max() <= 2


def test_profiles_that_the_result_cannot_keep_are_converted_and_named(tmp_path: Path):
    grey = Image.fromarray(np.full(SIZE, 60, np.uint8))
    grey.save(tmp_path / "grey.png", icc_profile=icc_profile("grey", b"GRAY"))
    photo().save(tmp_path / "broken.png", icc_profile=b"nonsense" * 40)
    for name, said, colour in (("grey", "is grey; the result is RGB, in sRGB", (77, 77, 77)),
                               ("broken", "colour profile that cannot be read", photo().getpixel((99, 99)))):  # fmt: skip
        picture = load_source_image(tmp_path / f"{name}.png")
        assert len(picture.notes) == 1 and said in picture.notes[0]
        picture.save(tmp_path / "out.png", picture.image, INSIDE)
        stored = Image.open(tmp_path / "out.png")
        assert "icc_profile" not in stored.info and stored.getpixel((99, 99)) == colour


# --- turns and islands --------------------------------------------------------------------------


@pytest.mark.parametrize("drawn", ["upright", "stored"])
@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_a_turned_square_photo_is_edited_where_its_mask_was_drawn(tmp_path: Path, orientation: int, drawn: str):
    as_stored(photo(), orientation).save(tmp_path / "img.png", exif=turned(orientation))
    (as_stored(shape(), orientation) if drawn == "stored" else shape()).save(tmp_path / "mask.png")
    picture = load_source_image(tmp_path / "img.png")
    mask, notes = load_edit_mask(tmp_path / "mask.png", picture.image, "img.png", orientation=picture.orientation)
    assert np.array_equal(mask, INSIDE) and any("by the edges in img.png" in note for note in notes)
    assert any(f"EXIF orientation {orientation}" in note for note in picture.notes)


def test_where_the_edges_do_not_tell_edit_asks(tmp_path: Path):
    as_stored(Image.new("RGB", SIZE, "grey"), 3).save(tmp_path / "img.png", exif=turned(3))
    shape().save(tmp_path / "mask.png")
    command = ["edit", tiny_bundle_folder(), "--init-image", tmp_path / "img.png", "--mask", tmp_path / "mask.png", "--prompt",
               "a photo of <asset1>", "--steps", 1, "--no-guidance", "--output-path", tmp_path / "out"]  # fmt: skip
    assert "--mask-orientation" in mifo(*command, exit_code=2).stderr and not (tmp_path / "out").exists()
    mifo(*command, "--mask-orientation", "stored")
    changed = (np.asarray(Image.open(tmp_path / "out" / "edit00.png")) != (128, 128, 128)).any(-1)
    assert changed.any() and not changed[~INSIDE[::-1, ::-1]].any()


@pytest.mark.parametrize("drawn", ["upright", "stored"])
def test_evaluate_measures_an_edit_of_a_turned_photo_where_it_was_made(tmp_path: Path, drawn: str):
    as_stored(photo(), 3).save(tmp_path / "img.png", exif=turned(3), icc_profile=icc_profile("p3"))
    cut = photo()
    cut.putalpha(as_stored(shape(), 3) if drawn == "stored" else shape())  # its shape is in the transparency
    cut.save(tmp_path / "mask.png")
    picture = load_source_image(tmp_path / "img.png")
    after = np.array(picture.image)
    after[INSIDE] = 9
    picture.save(tmp_path / "out.png", Image.fromarray(after), INSIDE)
    found = measure_edit(tmp_path / "img.png", tmp_path / "out.png", tmp_path / "mask.png")
    assert found == {"largest_difference": 0, "changed_pixels": 0, "outside_pixels": int((~INSIDE).sum())}


def test_a_mask_lying_on_its_side_is_scaled_lying_on_its_side(tmp_path: Path):
    wide = Image.new("RGB", (160, 120), "grey")
    mask = Image.new("L", (160, 120))
    mask.paste(255, (10, 10, 60, 40))
    as_stored(mask, 6).resize((60, 80)).save(tmp_path / "mask.png")
    read, _ = load_edit_mask(tmp_path / "mask.png", wide, "img.png", resize=True, orientation=6)
    assert (read != (np.asarray(mask) > 0)).mean() < 0.02


def test_one_stray_pixel_does_not_make_the_crop_the_whole_photo(toybox_random_base: BaseModel):
    picture = Image.effect_noise((1000, 800), 40).convert("RGB")
    mask = np.zeros((800, 1000), bool)
    mask[100:200, 100:200] = True
    clean = make_frame(mask, toybox_random_base.resolution)
    mask[790, 990] = True
    config = EditConfig(steps=1, guidance_scale=1.0, guidance=GuidanceConfig(enabled=False))
    result = edit(toybox_random_base, EditRequest(picture, mask, "a photo of a red car"), config)
    assert result.frame == clean and not result.mask[790, 990]
    assert "the mask has a tiny island far from its body (1 pixel at (990, 790)); what is there is not edited" in result.notes
    assert np.array_equal(np.asarray(result.edited_image(0))[790, 990], np.asarray(picture)[790, 990])


# --- metadata -----------------------------------------------------------------------------------


def write_camera_photo(path: Path) -> Path:
    exif = turned(3)
    exif[MAKE], exif[ARTIST] = "Maker", "Jane Doe"
    details = exif.get_ifd(EXIF_IFD)
    details |= {DATE: "2026:01:02 03:04:05", SERIAL: "SN-12345", OWNER: "Jane Doe", MAKER_NOTE: b"MAKERNOTE", EXPOSURE: 0.01}
    exif.get_ifd(GPS_IFD).update({1: "N", 2: (52.0, 31.0, 12.0), 3: "E", 4: (13.0, 24.0, 18.0)})
    data = bytearray(exif.tobytes())
    data += b"thumbnail of the unedited photo"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="3" creator="Jane Doe" path="/home/jane/a.raw"/></x:xmpmeta>'
    as_stored(photo(), 3).save(path, exif=bytes(data), quality=95, xmp=xmp, icc_profile=icc_profile("p3"))
    return path


def saved(path: Path, metadata: str) -> tuple[bytes, Image.Image]:
    picture = load_source_image(path, metadata)
    out = path.parent / f"{metadata}.png"
    picture.save(out, picture.image, INSIDE)
    return out.read_bytes(), Image.open(out)


def test_an_edit_says_when_and_with_what_but_not_who_and_where(tmp_path: Path):
    path = write_camera_photo(tmp_path / "img.jpg")
    content, stored = saved(path, "safe")
    exif = stored.getexif()
    details = exif.get_ifd(EXIF_IFD)
    assert exif[MAKE] == "Maker" and details[DATE] == "2026:01:02 03:04:05" and float(details[EXPOSURE]) == 0.01
    assert exif.get(ORIENTATION, 1) == 1 and stored.info["icc_profile"] == icc_profile("p3")
    assert not exif.get_ifd(GPS_IFD) and not [s for s in SECRETS if s in content]
    (note,) = [n for n in load_source_image(path).notes if "stay out" in n]
    assert all(w in note for w in ("artist", "serial number", "owner", "maker note", "position (GPS)", "XMP", "--metadata keep"))


def test_all_of_it_is_kept_or_none_of_it_when_asked(tmp_path: Path):
    path = write_camera_photo(tmp_path / "img.jpg")
    content, stored = saved(path, "keep")
    assert all(s in content for s in SECRETS), "byte for byte: offsets inside the maker note stay right"
    assert stored.getexif()[ORIENTATION] == 1 and stored.getexif().get_ifd(GPS_IFD)[1] == "N"
    assert b'tiff:Orientation="1"' in content
    content, stored = saved(path, "strip")
    assert not stored.getexif() and not [s for s in (*SECRETS, b"Maker", b"2026:") if s in content]
    assert stored.info["icc_profile"] == icc_profile("p3"), "the numbers mean nothing without it"


def test_the_option_reaches_the_file(tmp_path: Path):
    write_camera_photo(tmp_path / "img.jpg")
    shape().save(tmp_path / "mask.png")
    command = ["edit", tiny_bundle_folder(), "--init-image", tmp_path / "img.jpg", "--mask", tmp_path / "mask.png", "--prompt",
               "a photo of <asset1>", "--steps", 1, "--no-guidance", "--json"]  # fmt: skip
    before = np.asarray(Image.open(tmp_path / "img.jpg"))[::-1, ::-1]
    for more, has_date, has_owner in (([], True, False), (["--metadata", "keep"], True, True),
                                      (["--metadata", "strip"], False, False)):  # fmt: skip
        out = tmp_path / f"out{len(more)}{has_owner}"
        result = mifo(*command, "--output-path", out, *more)
        (path,) = json.loads(result.stdout)["images"]
        assert (b"2026:01:02" in Path(path).read_bytes()) == has_date and (b"Jane Doe" in Path(path).read_bytes()) == has_owner
        assert "note: " in result.stderr and "stored upside down" in result.stderr
        after = np.asarray(Image.open(path))
        assert np.array_equal(after[~INSIDE], before[~INSIDE]), "the stored numbers, upright"


def test_damaged_exif_data_is_left_out_and_noted(tmp_path: Path):
    photo().save(tmp_path / "img.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 40)
    for metadata in ("safe", "keep", "strip"):
        saved(tmp_path / "img.png", metadata)
    with pytest.raises(InputError, match="no picture"):
        load_source_image(tmp_path / "gone.png", "keep")


# --- many megapixels ----------------------------------------------------------------------------


def test_cloning_on_the_masks_box_is_cloning_on_the_whole_picture():
    rng = np.random.default_rng(0)
    source, drawn = (cv2.resize(rng.integers(0, 256, (20, 26, 3), dtype=np.uint8), (416, 320), interpolation=cv2.INTER_CUBIC)
                     for _ in range(2))  # fmt: skip
    mask = np.zeros((320, 416), np.uint8)
    cv2.ellipse(mask, (190, 150), (70, 50), 20, 0, 360, 255, -1)
    x, y, width, height = cv2.boundingRect(mask)
    center = (x + width // 2, y + height // 2)
    whole = cv2.seamlessClone(drawn, source, mask.copy(), center, cv2.NORMAL_CLONE)  # OpenCV writes into the mask it is given
    cloned = clone(source, drawn.astype(np.float32), mask > 0)
    assert np.abs(cloned.astype(int) - whole)[mask > 0].max() <= 1 and np.array_equal(cloned[mask == 0], source[mask == 0])


def test_a_large_clone_comes_close_to_the_full_solution(monkeypatch: pytest.MonkeyPatch):
    yy, xx = np.mgrid[:300, :400]
    source = np.stack([60 + yy / 5, 80 + xx / 8, 100 + 20 * np.sin(xx / 60)], -1).astype(np.uint8)
    drawn = np.clip(source[::-1].astype(np.float32) + 40 + 15 * np.sin(yy / 25)[..., None], 0, 255)
    mask = (yy - 150) ** 2 / 120**2 + (xx - 200) ** 2 / 170**2 < 1
    full = clone(source, drawn, mask).astype(int)
    monkeypatch.setattr("mifo.editing.blending.MAX_CLONED", 20_000)
    small = clone(source, drawn, mask).astype(int)
    assert np.array_equal(small[~mask], source[~mask])
    assert np.abs(small - full).max() <= 6 and np.abs(small - full).mean() < 1


MEASURE = """
import resource, sys
import numpy as np
from mifo.editing.blending import clone
side = int(sys.argv[1])
ramp = np.linspace(0, 255, side).astype(np.uint8)
source = np.ascontiguousarray(np.broadcast_to(ramp[:, None, None], (side, side, 3)))
drawn = np.ascontiguousarray(source[::-1]).astype(np.float32)
mask = np.zeros((side, side), bool)
mask[10:-10, 10:-10] = True
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
clone(source, drawn, mask)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


def test_the_memory_of_cloning_does_not_grow_with_the_picture():
    """A mask over 36 megapixels took 190 bytes a pixel, 6.4 GiB; its solver now sees a limited number of pixels, made few here,
    and what grows are the result (6 bytes a pixel with its copy), the shift of one channel (4 + 4) and masks: 25 in all."""
    code = MEASURE.replace("side = int", "import mifo.editing.blending; mifo.editing.blending.MAX_CLONED = 250_000\nside = int")
    found = float(subprocess.run([sys.executable, "-c", code, "1600"], capture_output=True, text=True, check=True).stdout)
    assert found < (250_000 * 230 + 2_560_000 * 25) / 2**30, f"{found:.2f} GiB"
