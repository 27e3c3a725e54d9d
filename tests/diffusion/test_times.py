from __future__ import annotations

import pickle

import numpy as np
import pytest

from everydream.diffusion.times import TimeSampler
from everydream.draws import generator


def test_times_are_uniform_over_the_range_with_its_start_and_without_its_end() -> None:
    sampler = TimeSampler(200, 210, 1000)
    counts = np.bincount([sampler(generator(0, "t", i)) for i in range(10_000)])
    assert not counts[:200].any() and len(counts) == 210
    chi_squared = ((counts[200:] - 1000) ** 2 / 1000).sum()
    assert chi_squared < 27.9  # 9 degrees of freedom: exceeded once in a thousand


def test_the_whole_range_reaches_both_ends() -> None:
    drawn = {TimeSampler(0, 3, 3)(generator(0, "t", i)) for i in range(100)}
    assert drawn == {0, 1, 2}


def test_a_time_is_a_plain_int_and_a_function_of_its_generator() -> None:
    sampler = pickle.loads(pickle.dumps(TimeSampler(0, 1000, 1000)))
    assert type(sampler(generator(1, "t"))) is int
    assert sampler(generator(1, "t")) == TimeSampler(0, 1000, 1000)(generator(1, "t"))


@pytest.mark.parametrize(("start", "end"), [(5, 5), (-1, 10), (0, 1001)])
def test_a_range_lies_within_the_path(start: int, end: int) -> None:
    with pytest.raises(AssertionError):
        TimeSampler(start, end, 1000)
