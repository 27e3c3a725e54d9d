"""Which timestep a picture is trained at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TimeSampler:
    """t uniform over start, …, end − 1, as in Ho et al. 2020, algorithm 1 (their 1…T is our 0…T−1).

    `end` is exclusive and may be the path's number of timesteps; 0 is nearly clean, T − 1 nearly pure noise.
    """

    start: int
    end: int
    num_train_timesteps: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.end <= self.num_train_timesteps, self

    def __call__(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.start, self.end))
