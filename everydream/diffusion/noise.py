"""What a picture is mixed with. numpy only, one picture at a time: it runs in the data workers, and a picture's noise
must not depend on the pictures beside it.

Shapes: C latent channels, H × W latent pixels, L tokens, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class NoiseSampler:
    """Noise ε for one picture: white, or pyramid (unit variance at each pixel), plus offset noise (adds ratio²).

    The white part is drawn first, so that a ratio or a discount never changes it.
    """

    zero_frequency_ratio: float = 0.0
    pyramid_discount: float = 0.0

    def __post_init__(self) -> None:
        assert self.zero_frequency_ratio >= 0, self
        assert 0 <= self.pyramid_discount <= 1, self

    def __call__(self, rng: np.random.Generator, shape_CHW: tuple[int, int, int]) -> Array:
        noise_CHW = rng.standard_normal(shape_CHW, dtype=np.float32)
        if self.pyramid_discount:
            noise_CHW = _pyramid(rng, noise_CHW, self.pyramid_discount)
        if self.zero_frequency_ratio:
            noise_CHW = _offset(rng, noise_CHW, self.zero_frequency_ratio)
        return noise_CHW


def _offset(rng: np.random.Generator, noise_CHW: Array, ratio: float) -> Array:
    """ε + ratio·δ, δ ~ N(0, 1) one number a channel: N. Guttenberg 2023, "Diffusion with offset noise"
    (crosslabs.org/blog/diffusion-with-offset-noise). As there, not scaled back: each pixel's variance is 1 + ratio²."""
    offset_C11 = rng.standard_normal((noise_CHW.shape[0], 1, 1), dtype=np.float32)
    return noise_CHW + np.float32(ratio) * offset_C11


def _pyramid(rng: np.random.Generator, noise_CHW: Array, discount: float) -> Array:
    """Σᵢ discountⁱ·Uᵢ(zᵢ) / √(Σᵢ discount²ⁱ): J. Whitaker 2023, "Multi-resolution noise for diffusion model training"
    (wandb.ai/johnowhitaker/multires_noise). z₀ is the white noise given, zᵢ white noise smaller than zᵢ₋₁ by a random
    factor of 2 to 4, down to a side of 1; U enlarges it bilinearly.

    The report divides by the standard deviation measured over the batch, which ties a picture to its neighbours and
    leaves out the very shift in brightness that the method is for. Here each pixel has a variance of exactly 1 in
    expectation: the rows of U have unit norm.
    """
    channels, height, width = noise_CHW.shape
    total, weight, shrink = noise_CHW, 1.0, 1.0
    variance, h, w = 1.0, height, width
    while min(h, w) > 1:
        shrink *= rng.uniform(2, 4)
        weight *= discount
        h, w = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse_Chw = rng.standard_normal((channels, h, w), dtype=np.float32)
        total = total + np.float32(weight) * (_enlarge(height, h) @ coarse_Chw @ _enlarge(width, w).T)
        variance += weight**2
    return total / np.float32(variance**0.5)


def _enlarge(size: int, coarse: int) -> Array:
    """Bilinear interpolation from `coarse` to `size` points as a matrix, size × coarse, pixel centres aligned as in
    torch's align_corners=False. Each row is scaled to norm 1, so that white noise keeps its variance at each point."""
    position = np.clip((np.arange(size) + 0.5) * coarse / size - 0.5, 0, coarse - 1)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, coarse - 1)
    matrix = np.zeros((size, coarse))
    rows = np.arange(size)
    matrix[rows, low] += 1 - (position - low)
    matrix[rows, high] += position - low
    return (matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class EmbeddingPerturbation:
    """Noise added to a text embedding, N(0, scale/√D) for each number: "CEP", Chen et al. 2024, "Slight corruption in
    pre-training data makes better diffusion models" (arXiv:2405.20494); their γ is `scale`, about 1. A token's noise
    has a norm of about `scale` at any embedding width D."""

    scale: float

    def __call__(self, rng: np.random.Generator, shape_LD: tuple[int, int]) -> Array:
        return np.float32(self.scale / shape_LD[-1] ** 0.5) * rng.standard_normal(shape_LD, dtype=np.float32)
