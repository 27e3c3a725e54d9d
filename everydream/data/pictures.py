"""Picture files: complete or not, how large, and their pixels for one crop.

    file → (draft) → stored pixels → flat (alpha on a colour) → crop and resize in one pass → upright → uint8 HWC

Crops are (x0, y0, x1, y1) in the upright picture's pixels, that is after its EXIF orientation. Memory: the decoded
picture (Pillow: 4 bytes a pixel) and at most one copy of it, so 8 bytes a pixel; WebP and AVIF decoders take twice
that, so their pixels count double against the limit. Nothing here sets LOAD_TRUNCATED_IMAGES.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from everydream.data.problems import Unfit

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
UNREADABLE = frozenset({".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".xcf", ".dng", ".cr2", ".nef", ".arw"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
MASK = ".mask.png"  # <name>.mask.png weighs the loss of <name>.*
MAX_SIDE = 32_768
MIN_SIDE = 16
COST = {"WEBP": 2, "AVIF": 2}  # memory of the decoder, in units of 8 bytes a pixel; measured

_REPLACE = "save it again as an 8-bit RGB JPEG or PNG"
_DAMAGED = "replace it with a good copy or remove it"
# Modes that Pillow turns into 8-bit RGB without guessing a range. 32-bit integers and floats have none.
_MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "PA", "RGBX", "CMYK", "YCbCr"})
_MODES_16 = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow's own limit warns at 89 and stops at 179 megapixels wherever they come from; ours is a setting, checked below.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What the gate learned: upright size, format, and a digest of the file's bytes."""

    width: int
    height: int
    format: str
    content: str
    peak: int = 255  # the brightest value of a mask


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow warns of odd metadata, which is harmless here. Not thread-safe: enter it outside of thread pools."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def digest_of(path: Path) -> str:
    """blake2b of the bytes, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path, max_megapixels: float = 100.0) -> PictureFacts:
    """Decode the picture completely once. Raises Unfit with the reason and what to do."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Unfit("not a regular file", "replace it with a picture or remove it")
    if not status.st_size:
        raise Unfit("the file is empty (0 bytes)", _DAMAGED)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _refuse_webp_bomb(data, max_megapixels)
        size, kind, peak = _decode(path, max_megapixels, data)
    return PictureFacts(*size, kind, digest_of(path), peak)


def refuse_size(size: Size, kind: str, max_megapixels: float) -> None:
    """Raises Unfit where a picture of this size costs more memory than allowed, or is too small to train on."""
    width, height = size
    cost = COST.get(kind, 1)
    allowed = max_megapixels / cost
    if width > MAX_SIDE or height > MAX_SIDE:
        raise Unfit(f"{width}×{height} pixels: a side is over {MAX_SIDE:,}", "make it smaller")
    if width * height > allowed * 1e6:
        note = f" ({kind} counts {cost} times: its decoder takes more memory)" if cost > 1 else ""
        raise Unfit(
            f"{width}×{height} pixels: over {allowed:g} megapixels{note}",
            "make it smaller or raise max_image_megapixels",
        )
    if min(size) < MIN_SIDE:
        raise Unfit(f"{width}×{height} pixels: a side is under {MIN_SIDE}", "replace or remove it")


def _decode(path: Path, max_megapixels: float, data: mmap.mmap) -> tuple[Size, str, int]:
    try:
        with Image.open(path, formats=FORMATS) as picture:
            kind = picture.format or "?"
            refuse_size(picture.size, kind, max_megapixels)
            _refuse_kind(picture, kind)
            if complete := _COMPLETE.get(kind):
                complete(data)
            stored = picture.size
            if kind in ("JPEG", "MPO"):
                # All data is still read and checked, but an eighth of each side is computed: less memory, faster.
                picture.draft(picture.mode, (max(1, stored[0] // 8), max(1, stored[1] // 8)))
            picture.load()
            turned = _orientation(picture) >= 5
            # Pillow itself turns TIFF upright.
            upright = picture.size if kind == "TIFF" else (stored[1], stored[0]) if turned else stored
            peak = _peak(picture) if path.name.lower().endswith(MASK) else 255
            return upright, kind, peak
    except Unfit:
        raise
    except UnidentifiedImageError:
        begin = bytes(data[:24])
        raise Unfit(f"not a picture that can be read here (it begins with {begin!r})", _REPLACE) from None
    except MemoryError:
        raise Unfit("not enough memory to decode it", "make it smaller or lower scan_workers") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, …
        raise Unfit(f"cannot be decoded ({type(error).__name__}: {error})", _DAMAGED) from None


def _peak(mask: Image.Image) -> int:
    return int(_flat(mask, (0, 0, 0)).convert("L").getextrema()[1])  # type: ignore[arg-type]


def _refuse_kind(picture: Image.Image, kind: str) -> None:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and kind != "MPO":  # MPO: cameras store a preview or a second eye behind the picture
        raise Unfit(f"{frames} frames or pages", "save the one to train on as a still picture")
    if picture.mode not in _MODES and picture.mode not in _MODES_16:
        raise Unfit(f"pixels of mode {picture.mode} have no defined range", _REPLACE)


def _refuse_webp_bomb(data: mmap.mmap, max_megapixels: float) -> None:
    """Opening a WebP with Pillow already allocates its canvas, so the size is read here first."""
    head = bytes(data[:30])
    if len(head) < 30 or head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return
    if head[12:16] == b"VP8X":
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (value & 0x3FFF for value in struct.unpack("<HH", head[26:30]))
    refuse_size((width, height), "WEBP", max_megapixels)


# --- complete to the last byte? Decoders accept a file that lacks only its end. ---

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_TRUNCATED = "the file is cut off"


def _complete_jpeg(data: mmap.mmap) -> None:
    """Walk the markers from the start to the end-of-image marker; what stands behind it (phones append) is not ours."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker = data[found.start() + 1]
        if marker == 0xD9:
            return
        at = found.end()
        if marker not in (0x01, 0xD8):
            if at + 2 > len(data):
                break
            at += int.from_bytes(data[at : at + 2], "big")
    raise Unfit(f"{_TRUNCATED}: no end-of-image marker", _DAMAGED)


def _complete_png(data: mmap.mmap) -> None:
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if end > len(data):
            break
        if kind[:1].isupper() and _crc(data, at + 4, end - 4) != int.from_bytes(data[end - 4 : end], "big"):
            raise Unfit(f"a checksum is wrong in its {kind.decode('latin-1')} data", _DAMAGED)
        if kind == b"IEND":
            return
        at = end
    raise Unfit(f"{_TRUNCATED}: no IEND chunk", _DAMAGED)


def _crc(data: mmap.mmap, start: int, end: int) -> int:
    value = 0
    for at in range(start, end, 1 << 20):
        value = zlib.crc32(data[at : min(end, at + (1 << 20))], value)
    return value


def _complete_webp(data: mmap.mmap) -> None:
    promised = 8 + int.from_bytes(data[4:8], "little")
    if len(data) < promised:
        raise Unfit(f"{_TRUNCATED}: {len(data)} of {promised} bytes", _DAMAGED)


_COMPLETE = {"JPEG": _complete_jpeg, "MPO": _complete_jpeg, "PNG": _complete_png, "WEBP": _complete_webp}

# --- pixels ---


def _orientation(picture: Image.Image) -> int:
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
    left_right, top_bottom = (width - x1, y0, width - x0, y1), (x0, height - y1, x1, height - y0)
    if orientation in (2, 3, 6, 7):
        x0, x1 = left_right[0], left_right[2]
    if orientation in (3, 4, 7, 8):
        y0, y1 = top_bottom[1], top_bottom[3]
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
            orientation = 1 if picture.format == "TIFF" else _orientation(picture)
            flat = _flat(picture, alpha_color)
            if flat is not picture:
                picture.close()  # frees its pixels
        stored = flat.size if orientation < 5 else (flat.size[1], flat.size[0])
        if same_size and abs(stored[0] * shrink - upright[0]) + abs(stored[1] * shrink - upright[1]) > 2 * shrink - 2:
            raise Unfit("it changed while the program ran", "leave the data alone during a run, and start again")
        scaled = [value * stored[axis % 2] / upright[axis % 2] for axis, value in enumerate(crop)]
        box = _stored_box(scaled, orientation, stored)
        target = size if orientation < 5 else (size[1], size[0])
        small = flat.resize(target, resample, box, reducing_gap=3.0)
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


_STRIP = 256  # rows converted at once, so that a conversion costs no second copy of the picture
_TO_8_BITS = [round(value / 257) for value in range(1 << 16)]


def _flat(picture: Image.Image, alpha_color: tuple[int, int, int]) -> Image.Image:
    """L, RGB, CMYK or YCbCr without transparency; the picture itself where it is that already."""
    if picture.mode in _MODES_16:
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
    flat = Image.new(mode, picture.size, background or 0)
    for top in range(0, picture.size[1], _STRIP):
        strip = convert(picture.crop((0, top, picture.size[0], min(picture.size[1], top + _STRIP))))
        flat.paste(strip, (0, top), strip if background else None)
    return flat
