"""Pixels: the crop that was asked for, upright, on the right colour, within the memory that was promised."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from everydream.data.pictures import read_mask, read_pixels
from everydream.data.problems import Unfit
from tests.data.pictures import encoded, picture, smooth, write

WHITE = (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_crop_is_that_of_the_upright_picture(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    path = write(tmp_path, "a", encoded(picture(120, 90), kind, exif=exif.tobytes(), **options))
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored) if kind != "TIFF" else stored.copy()
    assert upright.size == ((120, 90) if orientation < 5 else (90, 120))
    crop = (7, 11, 57, 81)
    expected = np.asarray(upright.crop(crop).resize((25, 35), Image.Resampling.LANCZOS), dtype=int)
    got = read_pixels(path, upright.size, crop, (25, 35))
    # The resampling filter sees beyond the crop's border here, so the border may differ by a little.
    assert np.abs(got.astype(int) - expected)[2:-2, 2:-2].max() <= 2


def test_the_full_picture_at_its_own_size_is_itself(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    path = write(tmp_path, "a.png", encoded(Image.fromarray(pixels), "PNG"))
    assert np.array_equal(read_pixels(path, (64, 48), (0, 0, 64, 48), (64, 48)), pixels)
    assert np.array_equal(read_pixels(path, (64, 48), (8, 0, 56, 48), (48, 48)), pixels[:, 8:56])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_jpeg_decoded_small_looks_the_same(tmp_path: Path, progressive: bool, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(picture(1003, 803), "JPEG", quality=95, progressive=progressive, exif=exif.tobytes())
    path = write(tmp_path, "a.jpg", content)
    with Image.open(path) as stored:
        full = ImageOps.exif_transpose(stored)
    width, height = full.size  # neither can be divided by 2, 4 or 8: the last pixels of the small one are parts
    crop = (101, 50, width - 50, height - 101)
    expected = np.asarray(full.resize((64, 64), Image.Resampling.LANCZOS, box=crop), dtype=int)
    assert np.abs(read_pixels(path, full.size, crop, (64, 64)).astype(int) - expected).max() <= 3


def on_colour(rgba: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    alpha = rgba[:, :, 3:] / 255.0
    return rgba[:, :, :3] * alpha + np.array(colour) * (1 - alpha)


@pytest.mark.parametrize("colour", [WHITE, (0, 0, 0), (10, 200, 90)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_colour_behind(tmp_path: Path, mode: str, colour: tuple[int, int, int]) -> None:
    rgba = np.dstack([smooth(40, 600), np.linspace(0, 255, 40 * 600).reshape(600, 40).astype(np.uint8)])
    image = Image.fromarray(rgba).convert(mode) if mode != "P" else Image.fromarray(rgba).quantize(64)
    expected = on_colour(np.asarray(image.convert("RGBA"), dtype=float), colour)
    path = write(tmp_path, "a.png", encoded(image, "PNG"))
    got = read_pixels(path, (40, 600), (0, 0, 40, 600), (40, 600), colour)
    assert np.abs(got - expected).max() <= 1.01


def test_a_transparent_colour_is_transparent(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), (255, 0, 0))
    path = write(tmp_path, "a.png", encoded(image, "PNG", transparency=(255, 0, 0)))
    assert (read_pixels(path, (20, 20), (0, 0, 20, 20), (20, 20), (1, 2, 3)) == (1, 2, 3)).all()


def test_sixteen_bits_become_eight_and_are_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 40 * 300).reshape(300, 40).astype(np.uint16)
    path = write(tmp_path, "a.png", encoded(Image.fromarray(ramp), "PNG"))
    got = read_pixels(path, (40, 300), (0, 0, 40, 300), (40, 300))
    assert np.abs(got.astype(float) - ramp[:, :, None] / 257).max() <= 0.5


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P", "YCbCr"])
def test_other_modes_are_shown_as_rgb(tmp_path: Path, mode: str) -> None:
    image = picture().convert(mode)
    path = write(tmp_path, "a.tif", encoded(image, "TIFF"))
    got = read_pixels(path, (40, 30), (0, 0, 40, 30), (40, 30))
    assert np.array_equal(got, np.asarray(image.convert("RGB")))


def test_a_file_that_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.png", encoded(picture(), "PNG"))
    with pytest.raises(Unfit, match="changed"):
        read_pixels(path, (41, 30), (0, 0, 30, 30), (32, 32))
    path.unlink()
    with pytest.raises(Unfit, match="cannot be read"):
        read_pixels(path, (40, 30), (0, 0, 30, 30), (32, 32))


def test_a_mask_is_the_share_of_white_in_each_cell(tmp_path: Path) -> None:
    mask = np.zeros((100, 200), dtype=np.uint8)
    mask[:, 50:150] = 255
    path = write(tmp_path, "a.mask.png", encoded(Image.fromarray(mask), "PNG"))
    # The picture is twice as large as its mask; the crop is its left square.
    got = read_mask(path, (400, 200), (0, 0, 200, 200), (4, 4))
    assert np.allclose(got, [[0, 0, 1, 1]] * 4)


MEMORY = """
import sys
from pathlib import Path
from everydream.data.pictures import read_pixels
from everydream.data.verify import verify

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

path, small = Path(sys.argv[1]), Path(sys.argv[2])
read_pixels(small, (64, 64), (0, 0, 64, 64), (32, 32))
verify(small)
before = peak()
facts = verify(path)
checked = peak() - before
size = (facts.width, facts.height)
read_pixels(path, size, (0, 0, min(size), min(size)), (512, 512))
pixels = size[0] * size[1]
print(checked / pixels, (peak() - before) / pixels)
"""

LARGE = {
    "palette and transparency": lambda: encoded(Image.new("P", (5000, 4000)), "PNG", transparency=0),
    "gray and alpha": lambda: encoded(Image.new("LA", (5000, 4000)), "PNG", compress_level=1),
    "alpha": lambda: encoded(Image.new("RGBA", (5000, 4000), (9, 8, 7, 100)), "PNG", compress_level=1),
    "a transparent colour": lambda: encoded(
        Image.new("RGB", (5000, 4000)), "PNG", compress_level=1, transparency=(0, 0, 0)
    ),
    "16 bits": lambda: encoded(Image.new("I;16", (5000, 4000)), "PNG", compress_level=1),
    "progressive jpeg": lambda: encoded(Image.new("RGB", (5000, 4000)), "JPEG", progressive=True, subsampling=0),
    "tiff, turned": lambda: encoded(Image.new("RGB", (5000, 4000)), "TIFF", compression="tiff_lzw", exif=_turned()),
}


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", LARGE)
def test_a_picture_costs_at_most_eight_bytes_a_pixel(tmp_path: Path, name: str) -> None:
    large = write(tmp_path, "large", LARGE[name]())
    small = write(tmp_path, "small", encoded(picture(64, 64), "PNG"))
    done = subprocess.run([sys.executable, "-c", MEMORY, large, small], capture_output=True, text=True, check=True)
    checked, read = map(float, done.stdout.split())
    assert 0.05 < max(checked, read) <= 8.3, (checked, read)  # the rest: buffers and the 512×512 result
