"""Every mode that Pillow opens is converted faithfully, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mamba.data.decode import GROUND, fit_image, read_rgb, to_rgb
from mamba.errors import DataError

RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)


def saved(tmp_path, image, ending, **options):
    file = tmp_path / f"image.{ending}"
    image.save(file, **options)
    return file


@pytest.mark.parametrize(
    "ending, pixels",
    [
        ("png", (RAMP * 257).astype(np.uint16)),
        ("tif", (RAMP * 257).astype(np.uint16)),
        ("tif", (RAMP * 257).astype(">u2")),
        ("tif", (RAMP * 257).astype(np.int32)),
        ("tif", (RAMP / 255).astype(np.float32)),
        ("pgm", (RAMP * 257).astype(np.uint16)),
        ("jp2", (RAMP * 257).astype(np.uint16)),
    ],
)
def test_deep_grey_keeps_its_levels(tmp_path, ending, pixels):
    grey = np.asarray(read_rgb(saved(tmp_path, Image.fromarray(pixels), ending)))
    assert np.abs(grey - RAMP[..., None]).max() <= 1


@pytest.mark.parametrize(
    "pixels, said",
    [
        (np.full((4, 4), 70_000, np.int32), "mode I with values from 70000 to 70000; valid are 0 to 65535"),
        (np.full((4, 4), -1, np.int32), "mode I with values from -1"),
        (np.full((4, 4), 17.5, np.float32), "mode F with values from 17.5 to 17.5; valid are 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "mode F with values from nan"),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, pixels, said):
    with pytest.raises(DataError, match=f"image.tif is not a readable image .{said}"):
        read_rgb(saved(tmp_path, Image.fromarray(pixels), "tif"))


def test_twelve_bits_and_white_is_zero():
    image = Image.fromarray(np.array([[0, 4095]], np.uint16))
    image.tag_v2 = {258: (12,)}
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255]
    image.tag_v2 = {258: (16,), 262: 0}
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, 239]


def test_transparency_is_laid_on_white(tmp_path):
    """A black drawing on a transparent page is black on white, in every mode that knows transparency."""
    drawing = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    drawing.putpixel((1, 2), (0, 0, 0, 255))
    drawing.putpixel((3, 3), (0, 0, 0, 128))
    want = np.full((4, 4, 3), GROUND[0], np.uint8)
    want[2, 1], want[3, 3] = 0, 127
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 90, 90, 90])
    palette.putpixel((1, 2), 0)
    palette = saved(tmp_path, palette, "gif", transparency=1)
    keyed = Image.new("L", (4, 4), 7)
    keyed.putpixel((1, 2), 0)
    keyed = saved(tmp_path, keyed, "png", transparency=7)
    deep = Image.fromarray(np.where(np.asarray(Image.open(keyed)) == 7, 7000, 0).astype(np.uint16))
    deep.info["transparency"] = 7000
    for mode in ("RGBA", "LA", "RGBa", "La"):
        image = drawing.convert("LA").convert(mode) if mode == "La" else drawing.convert(mode)
        assert np.abs(np.asarray(to_rgb(image)).astype(int) - want).max() <= 1, mode
    want[3, 3] = GROUND[0]
    for image in (read_rgb(palette), read_rgb(keyed), to_rgb(deep)):
        assert np.array_equal(np.asarray(image), want)


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr", "HSV", "L", "RGBX"])
def test_other_modes_keep_black_white_and_grey(mode):
    colours = np.array([[[0, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 0]]], np.uint8)
    image = Image.fromarray(colours)
    image = image.convert("P") if mode == "P" else image.convert(mode)
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - colours).max() <= 2


def test_lab(tmp_path):
    grey = Image.new("LAB", (4, 4), (128, 128, 128))
    assert np.abs(np.asarray(read_rgb(saved(tmp_path, grey, "tif"))).astype(int) - 119).max() <= 2


def test_an_unknown_mode_is_refused():
    image = Image.new("RGB", (2, 2))
    image._mode = "BGR;15"
    with pytest.raises(ValueError, match="mode BGR;15 have no conversion"):
        to_rgb(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.fromarray(np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((8, 8), np.uint8)))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores the upright image so
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = stored.getexif()
    exif[0x0112] = orientation
    got = np.asarray(read_rgb(saved(tmp_path, stored, "png", exif=exif)))
    assert np.array_equal(got[..., 0], np.asarray(upright))


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_image_of_an_animation(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if ending == "webp" else {}
    file = saved(tmp_path, frames[0], ending, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(read_rgb(file))[0, 0].tolist() == [255, 0, 0]


def test_fit():
    wide = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8)[None, :] * 50, 2, axis=0)).resize((40, 20), 0)
    wide = wide.convert("RGB")
    crop, pad, stretch = (fit_image(wide, 20, fit)[..., 0] for fit in ("crop", "pad", "stretch"))
    assert np.array_equal(crop, np.asarray(wide)[:, 10:30, 0])
    assert pad[:5].max() == 0 and pad[15:].max() == 0 and pad[10, -1] >= 145
    assert stretch[10, 0] <= 5 and stretch[10, -1] >= 145 and stretch[0, -1] >= 145
