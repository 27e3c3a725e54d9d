"""Is a picture file whole, of a known kind and of a size that can be decoded? What the gate asks of every file once."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from everydream.data.pictures import FORMATS, MASK, MODES, MODES_16, Size, flat, orientation_of
from everydream.data.problems import Unfit

MAX_SIDE = 32_768
MIN_SIDE = 16
COST = {"WEBP": 2, "AVIF": 2}  # memory of the decoder, in units of 8 bytes a pixel; measured

_REPLACE = "save it again as an 8-bit RGB JPEG or PNG"
_DAMAGED = "replace it with a good copy or remove it"


@dataclass(frozen=True, slots=True)
class PictureFacts:
    """What the gate learned: upright size, format, and a digest of the file's bytes."""

    width: int
    height: int
    format: str
    content: str
    peak: int = 255  # the brightest value of a mask


def is_mask(path: Path) -> bool:
    return path.name.lower().endswith(MASK)


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
        _refuse_webp_bomb(path, data, max_megapixels)
        size, kind, peak = _decode(path, max_megapixels, data)
    return PictureFacts(*size, kind, digest_of(path), peak)


def refuse_size(path: Path, size: Size, kind: str, max_megapixels: float) -> None:
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
    if min(size) < MIN_SIDE and not is_mask(path):
        raise Unfit(f"{width}×{height} pixels: a side is under {MIN_SIDE}", "replace or remove it")


def _decode(path: Path, max_megapixels: float, data: mmap.mmap) -> tuple[Size, str, int]:
    try:
        with Image.open(path, formats=FORMATS) as picture:
            kind = picture.format or "?"
            refuse_size(path, picture.size, kind, max_megapixels)
            _refuse_kind(picture, kind)
            if complete := _COMPLETE.get(kind):
                complete(data)
            stored = picture.size
            if kind in ("JPEG", "MPO"):
                # All data is still read and checked, but an eighth of each side is computed: less memory, faster.
                picture.draft(picture.mode, (max(1, stored[0] // 8), max(1, stored[1] // 8)))
            picture.load()
            turned = orientation_of(picture) >= 5
            # Pillow itself turns TIFF upright.
            upright = picture.size if kind == "TIFF" else (stored[1], stored[0]) if turned else stored
            peak = _peak(picture) if is_mask(path) else 255
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
    return int(flat(mask, (0, 0, 0)).convert("L").getextrema()[1])  # type: ignore[arg-type]


def _refuse_kind(picture: Image.Image, kind: str) -> None:
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and kind != "MPO":  # MPO: cameras store a preview or a second eye behind the picture
        raise Unfit(f"{frames} frames or pages", "save the one to train on as a still picture")
    if picture.mode not in MODES and picture.mode not in MODES_16:
        raise Unfit(f"pixels of mode {picture.mode} have no defined range", _REPLACE)


def _refuse_webp_bomb(path: Path, data: mmap.mmap, max_megapixels: float) -> None:
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
    refuse_size(path, (width, height), "WEBP", max_megapixels)


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
