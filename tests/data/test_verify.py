"""The gate finds every file that cannot be trained on before step 1, and says what to do."""

from __future__ import annotations

import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from everydream.data.pictures import quiet_pillow, read_pixels
from everydream.data.problems import Unfit
from everydream.data.verify import verify
from tests.data.pictures import encoded, jpeg, picture, png, smooth, write

WHOLE = {
    "baseline.jpg": lambda: jpeg(),
    "progressive.jpg": lambda: encoded(picture(), "JPEG", progressive=True, subsampling=0),
    "restarts.jpg": lambda: encoded(picture(), "JPEG", restart_marker_blocks=2),
    "exif.jpg": lambda: encoded(picture(), "JPEG", exif=_exif(3), comment=b"\xff\xd9 in a comment"),
    "plain.png": lambda: png(),
    "palette.png": lambda: encoded(picture().convert("P"), "PNG"),
    "lossy.webp": lambda: encoded(picture(), "WEBP"),
    "lossless.webp": lambda: encoded(picture(), "WEBP", lossless=True),
    "extended.webp": lambda: encoded(picture(), "WEBP", exif=_exif(1)),
}


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def refused(path: Path, **limits: float) -> Unfit:
    with pytest.raises(Unfit) as caught:
        verify(path, **limits)
    assert caught.value.reason and caught.value.advice
    return caught.value


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    content = WHOLE[name]()
    assert verify(write(tmp_path, name, content)).width == 40
    lengths = {*range(1, 64), *range(64, len(content), 7), *range(max(1, len(content) - 40), len(content))}
    for length in lengths:
        refused(write(tmp_path, name, content[:length]))


def test_what_phones_append_is_no_damage(tmp_path: Path) -> None:
    verify(write(tmp_path, "motion.jpg", jpeg() + b"\0\0ftypmp4\xff\xda\xff\xd8 and more"))
    verify(write(tmp_path, "more.png", png() + b"trailing"))


def test_a_flipped_bit_in_png_data_is_refused(tmp_path: Path) -> None:
    content = bytearray(png())
    content[content.index(b"IDAT") + 20] ^= 4
    assert "checksum" in refused(write(tmp_path, "a.png", bytes(content))).reason


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "0 bytes"),
        (b"<!DOCTYPE html><html>not found</html>", "DOCTYPE"),
        (b"\0" * 3000, "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
        (b"GIF89a", "not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 40, ""),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    assert reason in refused(write(tmp_path, "a.jpg", content)).reason


def test_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    assert verify(write(tmp_path, "a.jpg", png())).format == "PNG"


def _bomb(width: int, height: int) -> bytes:
    """A PNG of little more than its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def _webp_header(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def test_bombs_are_refused_from_the_header(tmp_path: Path) -> None:
    assert "over 100 megapixels" in refused(write(tmp_path, "a.png", _bomb(20_000, 20_000))).reason
    assert "side is over 32,768" in refused(write(tmp_path, "b.png", _bomb(100_000, 20))).reason
    assert "over 0.5 megapixels" in refused(write(tmp_path, "c.png", _bomb(1000, 1000)), max_megapixels=0.5).reason
    assert "counts 2 times" in refused(write(tmp_path, "d.webp", _webp_header(16_000, 16_000))).reason
    # libwebp allocates when a file is opened: that must not be reached.
    lossy = bytearray(encoded(picture(), "WEBP"))
    lossy[26:30] = struct.pack("<HH", 16_000, 16_000)
    assert "megapixels" in refused(write(tmp_path, "e.webp", bytes(lossy))).reason
    lossless = bytearray(encoded(picture(), "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 15_999 | 15_999 << 14)
    assert "16000×16000" in refused(write(tmp_path, "f.webp", bytes(lossless))).reason


def test_a_sliver_is_refused(tmp_path: Path) -> None:
    assert "under 16" in refused(write(tmp_path, "a.png", encoded(Image.new("L", (1, 30_000)), "PNG"))).reason


@pytest.mark.parametrize(
    "mode, kind",
    [
        *((mode, "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *((mode, "TIFF") for mode in ("L", "RGB", "RGBA", "CMYK", "YCbCr")),
        *((mode, "JPEG") for mode in ("L", "RGB", "CMYK")),
        *((mode, "BMP") for mode in ("1", "L", "P", "RGB")),
        ("P", "GIF"),
        ("RGBA", "WEBP"),
        ("RGB", "AVIF"),
    ],
)
def test_every_mode_that_has_a_range_is_accepted(tmp_path: Path, mode: str, kind: str) -> None:
    image = (
        Image.fromarray(smooth(40, 30)[:, :, 0].astype(np.uint16) * 257) if mode == "I;16" else picture().convert(mode)
    )
    facts = verify(write(tmp_path, "a", encoded(image, kind)))
    assert (facts.width, facts.height, facts.format) == (40, 30, kind)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_range_are_refused(tmp_path: Path, mode: str) -> None:
    assert "no defined range" in refused(write(tmp_path, "a.tif", encoded(picture().convert(mode), "TIFF"))).reason


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(tmp_path: Path, kind: str) -> None:
    frames = [picture(seed=seed) for seed in range(3)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert "3 frames or pages" in refused(write(tmp_path, "a", content)).reason


def test_a_camera_preview_behind_a_jpeg_is_no_animation(tmp_path: Path) -> None:
    content = encoded(picture(), "MPO", save_all=True, append_images=[picture(20, 16)])
    assert verify(write(tmp_path, "a.jpg", content)).width == 40


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_the_upright_picture(tmp_path: Path, kind: str, orientation: int) -> None:
    facts = verify(write(tmp_path, "a", encoded(picture(), kind, exif=_exif(orientation))))
    assert (facts.width, facts.height) == ((40, 30) if orientation < 5 else (30, 40))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", _exif(8)[:-9], _exif(77), b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_broken_exif_means_as_stored(tmp_path: Path, exif: bytes) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the caller's duty: quiet_pillow() cannot be entered in threads
        facts = verify(write(tmp_path, "a.jpg", encoded(picture(), "JPEG", exif=exif)))
    assert (facts.width, facts.height) == (40, 30)


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would block for ever
    assert "regular" in refused(tmp_path / "pipe.jpg").reason
    (tmp_path / "folder.jpg").mkdir()
    assert "regular" in refused(tmp_path / "folder.jpg").reason


def test_content_is_the_digest_of_the_bytes(tmp_path: Path) -> None:
    one, same, other = (verify(write(tmp_path, name, jpeg(seed=seed))) for name, seed in [("a", 0), ("b", 0), ("c", 1)])
    assert one == same and one.content != other.content


def test_a_damaged_file_is_refused_or_can_be_read(tmp_path: Path) -> None:
    rng = random.Random(3)
    outcomes = set()
    for name, make in WHOLE.items():
        content = make()
        for _ in range(25):
            damaged = bytearray(content)
            for _ in range(rng.choice([1, 2, 9])):
                at = rng.randrange(len(damaged))
                damaged[at : at + rng.choice([0, 1, 3])] = rng.randbytes(rng.choice([0, 1, 2]))
            path = write(tmp_path, name, bytes(damaged))
            with quiet_pillow():
                try:
                    facts = verify(path)
                except Unfit:
                    outcomes.add("refused")
                    continue
                size = (facts.width, facts.height)
                assert read_pixels(path, size, (0, 0, *size), (32, 32)).shape == (32, 32, 3)
                outcomes.add("read")
    assert outcomes == {"refused", "read"}
