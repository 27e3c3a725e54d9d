"""Pictures that tests make."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from everydream.draws import generator


def smooth(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, channels] without sharp edges, so that resampling has one right answer."""
    low = generator(seed, "smooth").integers(0, 256, (4, 5, channels), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(low[:, :, channel]).resize((width, height), Image.Resampling.BICUBIC))
            for channel in range(channels)
        ],
        axis=2,
    )


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(smooth(width, height, seed=seed))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jpeg(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    return encoded(picture(width, height, seed), "JPEG")


def png(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    return encoded(picture(width, height, seed), "PNG")
