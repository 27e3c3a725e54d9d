"""Picture files: the pixels of one crop at one size.

    file → (draft) → stored pixels → flat (alpha on a colour) → crop and resize in one pass → upright → uint8 HWC

Crops are (x0, y0, x1, y1) in the upright picture's pixels, that is after its EXIF orientation. Memory: the decoded
picture (Pillow: 4 bytes a pixel) and at most one copy of it, so 8 bytes a pixel; WebP and AVIF decoders take twice
that, so their pixels count double against the limit. Nothing here sets LOAD_TRUNCATED_IMAGES.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import (  # imported for their decoders, and here: Pillow's own lookup of them is not made for threads
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    WebPImagePlugin,  # noqa: F401
)

from everydream.data.problems import Unfit

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
UNREADABLE = frozenset(
    {".heic", ".heics", ".heif", ".heifs", ".hif", ".avifs", ".apng", ".jxl", ".jp2", ".j2k", ".jpx", ".jxr", ".wdp",
     ".svg", ".psd", ".psb", ".xcf", ".kra", ".ora", ".tga", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".pam", ".pfm",
     ".xbm", ".xpm", ".dib", ".dds", ".exr", ".hdr", ".qoi", ".mpo",
     ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".srw", ".orf", ".rw2", ".rwl", ".pef",
     ".raf", ".3fr", ".fff", ".erf", ".dcr", ".kdc", ".mrw", ".x3f", ".iiq"}
)  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MASK = ".mask.png"  # <name>.mask.png weighs the loss of <name>.*

# Modes that Pillow turns into 8-bit RGB without guessing a range. 32-bit integers and floats have none.
MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr"})
MODES_16 = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own limit warns at 89 and stops at 179 megapixels wherever they come from; ours is a setting (verify.py).
Image.MAX_IMAGE_PIXELS = None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow warns of odd metadata, which is harmless here. Not thread-safe: enter it outside of thread pools."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def orientation_of(picture: Image.Image) -> int:
    """EXIF orientation 1 to 8; to be asked after load() (PNG may store it last, TIFF is turned by Pillow)."""
    try:
        value = int(picture.getexif().get(0x0112, 1))
    except Exception:  # broken EXIF: the picture is shown as stored, as viewers do
        return 1
    return value if 1 <= value <= 8 else 1


def _stored_box(box: Sequence[float], orientation: int, upright: Size) -> tuple[float, float, float, float]:
    """The box of the stored picture that becomes `box` once the picture is upright."""
    x0, y0, x1, y1 = box
    width, height = upright
    if orientation in (2, 3, 6, 7):
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation >= 5 else (x0, y0, x1, y1)


def read_pixels(
    path: Path, upright: Size, crop: Box, size: Size, alpha_color: tuple[int, int, int] = (255, 255, 255)
) -> np.ndarray:
    """uint8 [height, width, 3]: `crop` of the upright picture, resized to `size` (width, height).

    Raises Unfit where the file no longer is what the gate saw.
    """
    return np.asarray(_read(path, upright, crop, size, alpha_color, Image.Resampling.LANCZOS).convert("RGB"))


def read_mask(path: Path, upright: Size, crop: Box, size: Size) -> np.ndarray:
    """float32 [height, width] in 0..1: what share of each of `size`'s cells is white; `crop` and `upright` are the
    picture's, the mask may have another resolution."""
    mask = _read(path, upright, crop, size, (0, 0, 0), Image.Resampling.BOX, same_size=False)
    return np.asarray(mask.convert("L"), dtype=np.float32) / 255.0


def _read(
    path: Path,
    upright: Size,
    crop: Box,
    size: Size,
    alpha_color: tuple[int, int, int],
    resample: Image.Resampling,
    same_size: bool = True,
) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as picture:
            shrink = _load(picture, crop, size)
            orientation = 1 if picture.format == "TIFF" else orientation_of(picture)
            pixels = flat(picture, alpha_color)
            if pixels is not picture:
                picture.close()  # frees its pixels
        width, height = pixels.size
        full = upright if orientation < 5 else (upright[1], upright[0])  # as it is stored, not scaled down
        if same_size and abs(width * shrink - full[0]) + abs(height * shrink - full[1]) > 2 * shrink - 2:
            raise Unfit("it changed while the program ran", "leave the data alone during a run, and start again")
        # A scaled-down JPEG's last row and column may be parts of pixels; a mask has a resolution of its own.
        x, y = (1 / shrink, 1 / shrink) if same_size else (width / full[0], height / full[1])
        x0, y0, x1, y1 = _stored_box(crop, orientation, upright)
        box = (x0 * x, y0 * y, min(x1 * x, width), min(y1 * y, height))
        target = size if orientation < 5 else (size[1], size[0])
        # Large pictures are first reduced by whole factors, which shows nowhere (Pillow's manual); masks stay exact.
        small = pixels.resize(target, resample, box, reducing_gap=3.0 if same_size else None)
        return small.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else small
    except Unfit:
        raise
    except Exception as error:
        raise Unfit(f"cannot be read ({type(error).__name__}: {error})", "check the file and the disk") from None


def _load(picture: Image.Image, crop: Box, size: Size) -> int:
    """Decode; a JPEG already scaled down where at least twice the wanted resolution is left. Returns by how much."""
    width = picture.size[0]
    if picture.format in ("JPEG", "MPO"):
        spare = min((crop[2] - crop[0]) / max(size), (crop[3] - crop[1]) / max(size)) / 2
        if spare >= 2:
            picture.draft(picture.mode, (int(picture.size[0] / spare), int(picture.size[1] / spare)))
    shrink = max(1, round(width / picture.size[0]))
    picture.load()
    return shrink


_STRIP_PIXELS = 1 << 17  # converted at once, so that a conversion costs no copy of the picture but its result
_TO_8_BITS = [round(value / 257) for value in range(1 << 16)]


def flat(picture: Image.Image, alpha_color: tuple[int, int, int]) -> Image.Image:
    """L, RGB, CMYK or YCbCr without transparency; the picture itself where it is that already."""
    if picture.mode in MODES_16:
        return _in_strips(picture, "L", lambda strip: strip.convert("I").point(_TO_8_BITS, "L"), None)
    if picture.has_transparency_data:
        return _in_strips(picture, "RGB", lambda strip: strip.convert("RGBA"), alpha_color)
    if picture.mode in ("P", "1", "RGBX"):
        mode = "L" if picture.mode == "1" else "RGB"
        return _in_strips(picture, mode, lambda strip: strip.convert(mode), None)
    return picture


def _in_strips(
    picture: Image.Image,
    mode: str,
    convert: Callable[[Image.Image], Image.Image],
    background: tuple[int, int, int] | None,
) -> Image.Image:
    width, height = picture.size
    rows = max(1, _STRIP_PIXELS // width)
    result = Image.new(mode, picture.size, background or 0)
    for top in range(0, height, rows):
        strip = convert(picture.crop((0, top, width, min(height, top + rows))))
        result.paste(strip, (0, top), strip if background else None)
    return result
