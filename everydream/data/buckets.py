"""Sizes to train at, and which picture goes where. Sizes and aspects are (width, height) and width / height."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from everydream.data.pictures import Box, Size


def bucket_sizes(resolution: int, step: int, max_aspect: float = 4.0) -> tuple[Size, ...]:
    """The (width, height) in multiples of `step` px whose area is at most resolution²: the widest for each height,
    the highest for each width, and the square; of several as long as `max_aspect` allows, the largest.

    `step` = VAE factor × UNet factor (64 px for Stable Diffusion 1 and 2).
    """
    assert resolution >= step > 0, f"resolution {resolution}, step {step}"
    cells = (resolution * resolution) // (step * step)
    side = math.isqrt(cells)
    wide, widest = {(side, side)}, 0.0
    for rows in range(side, 0, -1):
        columns = min(cells // rows, int(max_aspect * rows))
        if columns > widest * rows:
            widest = columns / rows
            wide.add((columns, rows))
    sizes = {(w * step, h * step) for columns, rows in wide for w, h in ((columns, rows), (rows, columns))}
    return tuple(sorted(sizes))


def nearest(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The size whose log aspect is nearest the picture's; of two at one distance the larger, then the wider."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1], -s[0]))


def crop_box(width: int, height: int, size: Size, jitter: float = 0.0, draws: tuple[float, float] = (0.5, 0.5)) -> Box:
    """The part of a picture that fills `size`: the largest one of its shape, in the middle.

    `jitter` (a share of the shorter side) makes the part that much smaller, and `draws` in [0, 1) move it by up to half
    of that share from the middle.
    """
    scale = min(width / size[0], height / size[1]) * (1.0 - jitter)
    crop_width = min(width, max(1, round(size[0] * scale)))
    crop_height = min(height, max(1, round(size[1] * scale)))
    reach = jitter * min(width, height)
    x0 = _start(width - crop_width, reach * (draws[0] - 0.5))
    y0 = _start(height - crop_height, reach * (draws[1] - 0.5))
    return x0, y0, x0 + crop_width, y0 + crop_height


def _start(room: int, move: float) -> int:
    return min(room, max(0, math.floor(room / 2 + move + 0.5) if move else room // 2))


def assign(pictures: Iterable[tuple[str, int, int]], sizes: Sequence[Size]) -> dict[Size, list[str]]:
    """(identity, width, height) → size → identities, sizes and identities sorted."""
    buckets: dict[Size, list[str]] = {}
    for identity, width, height in sorted(pictures):
        buckets.setdefault(nearest(width, height, sizes), []).append(identity)
    return dict(sorted(buckets.items()))


def is_small(width: int, height: int, size: Size) -> bool:
    """The picture must be enlarged to fill its bucket."""
    return width < size[0] or height < size[1]
