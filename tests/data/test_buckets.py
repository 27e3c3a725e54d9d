"""Sizes, the nearest of them, and the crop that fills it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everydream.data.buckets import assign, bucket_sizes, crop_box, is_small, nearest


def test_sizes_at_512_are_these() -> None:
    assert bucket_sizes(512, 64) == (
        (256, 1024), (320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (768, 320), (1024, 256)
    )  # fmt: skip


def test_sizes_at_768_are_these() -> None:
    assert [size for size in bucket_sizes(768, 64) if size[0] >= size[1]] == [
        (768, 768), (832, 704), (896, 640), (1024, 576), (1152, 512), (1280, 448), (1536, 384)
    ]  # fmt: skip


@pytest.mark.parametrize("resolution, widest", [(512, (1024, 256)), (576, (1024, 256)), (704, (1280, 320))])
def test_sizes_reach_four_to_one(resolution: int, widest: tuple[int, int]) -> None:
    assert max(bucket_sizes(resolution, 64), key=lambda size: size[0] / size[1]) == widest


@settings(max_examples=200, deadline=None)
@given(cells=st.integers(1, 40), odd=st.integers(0, 63), step=st.sampled_from([8, 16, 64]))
def test_sizes_keep_the_rules(cells: int, odd: int, step: int) -> None:
    resolution = cells * step + odd % step
    sizes = bucket_sizes(resolution, step)
    side = resolution // step * step
    assert (side, side) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution * resolution
        assert max(width, height) <= 4 * min(width, height)
        assert (height, width) in sizes
    assert len({Fraction(width, height) for width, height in sizes}) == len(sizes)  # one a shape
    assert side == step or any(width == 4 * height for width, height in sizes)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(16, 5000), height=st.integers(16, 5000))
def test_nearest_is_nearest_by_log_aspect(width: int, height: int) -> None:
    sizes = bucket_sizes(512, 64)
    chosen = nearest(width, height, sizes)

    def distance(size: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(width / height))

    assert distance(chosen) <= min(map(distance, sizes)) + 1e-8
    turned = nearest(height, width, sizes)
    assert distance(chosen) == pytest.approx(abs(math.log(turned[1] / turned[0]) - math.log(width / height)))


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(16, 3000),
    height=st.integers(16, 3000),
    size=st.sampled_from(bucket_sizes(512, 64)),
    jitter=st.sampled_from([0.0, 0.05, 0.3]),
    draws=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
)
def test_a_crop_lies_inside_has_the_shape_and_is_as_large_as_can_be(width, height, size, jitter, draws) -> None:
    x0, y0, x1, y1 = crop_box(width, height, size, jitter, draws)
    assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
    scale = min(width / size[0], height / size[1]) * (1 - jitter)
    assert abs((x1 - x0) - size[0] * scale) <= 1 and abs((y1 - y0) - size[1] * scale) <= 1
    reach = jitter * min(width, height) / 2 + 1
    assert abs((x0 + x1) / 2 - width / 2) <= reach and abs((y0 + y1) / 2 - height / 2) <= reach


def test_jitter_reaches_every_place_of_its_range() -> None:
    places = {crop_box(100, 80, (64, 64), 0.1, (at / 50, 0.5))[0] for at in range(50)}
    assert places == set(range(10, 18 + 1))


def test_a_picture_of_the_bucket_s_size_is_taken_whole() -> None:
    assert crop_box(512, 512, (512, 512)) == (0, 0, 512, 512)
    assert crop_box(700, 512, (512, 512)) == (94, 0, 606, 512)


def test_assignment_does_not_depend_on_order() -> None:
    pictures = [(f"subject/{at}", 16 + 37 * at % 900, 16 + 61 * at % 900) for at in range(60)]
    sizes = bucket_sizes(256, 64)
    assert assign(pictures, sizes) == assign(pictures[::-1], sizes)
    assert sum(map(len, assign(pictures, sizes).values())) == 60


def test_a_small_picture_is_one_that_must_grow() -> None:
    assert not is_small(512, 512, (512, 512)) and not is_small(600, 700, (512, 512))
    assert is_small(511, 700, (512, 512))
