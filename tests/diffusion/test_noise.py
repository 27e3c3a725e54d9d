from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from everydream.diffusion.noise import EmbeddingPerturbation, NoiseSampler, _enlarge
from everydream.draws import generator

SHAPE = (4, 16, 12)
KINDS = {
    "white": NoiseSampler(),
    "offset": NoiseSampler(zero_frequency_ratio=0.1),
    "pyramid": NoiseSampler(pyramid_discount=0.8),
    "both": NoiseSampler(zero_frequency_ratio=0.1, pyramid_discount=0.8),
}


def many(sampler: NoiseSampler, n: int = 4000) -> np.ndarray:
    return np.stack([sampler(generator(0, "noise", i), SHAPE) for i in range(n)])


def white(seed: int = 0) -> np.ndarray:
    return generator(seed, "noise").standard_normal(SHAPE, dtype=np.float32)


@pytest.mark.parametrize("sampler", KINDS.values(), ids=KINDS)
def test_noise_is_float32_and_a_function_of_its_generator(sampler: NoiseSampler) -> None:
    first = sampler(generator(3, "noise"), SHAPE)
    again = pickle.loads(pickle.dumps(sampler))(generator(3, "noise"), SHAPE)
    assert first.dtype == np.float32 and first.shape == SHAPE
    assert np.array_equal(first, again)
    assert not np.array_equal(first, sampler(generator(4, "noise"), SHAPE))


def test_white_noise_is_standard_normal() -> None:
    noise = many(NoiseSampler(), 500)
    assert np.array_equal(NoiseSampler()(generator(0, "noise"), SHAPE), white())
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1) < 0.01


def test_offset_noise_is_one_number_a_channel_added_to_the_same_white_noise() -> None:
    offset = NoiseSampler(zero_frequency_ratio=0.1)(generator(0, "noise"), SHAPE) - white()
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1, :1], SHAPE), atol=1e-6)
    assert len(np.unique(offset[:, 0, 0].round(5))) == SHAPE[0]


def test_offset_noise_adds_its_squared_ratio_to_the_variance() -> None:
    means = many(NoiseSampler(zero_frequency_ratio=0.5)).mean(axis=(2, 3))  # white noise leaves 1/(H·W) there
    assert means.var() == pytest.approx(0.25 + 1 / (16 * 12), rel=0.05)


def test_pyramid_noise_has_variance_1_at_every_pixel() -> None:
    variance = many(NoiseSampler(pyramid_discount=0.8)).var(axis=(0, 1))
    assert variance.shape == SHAPE[1:]
    assert variance.min() > 0.93 and variance.max() < 1.07


def test_pyramid_noise_is_stronger_in_low_frequencies() -> None:
    power = {
        name: (np.abs(np.fft.fft2(many(sampler, 300))) ** 2).mean(axis=(0, 1)) / np.prod(SHAPE[1:])
        for name, sampler in KINDS.items()
    }
    assert power["white"][0, 0] == pytest.approx(1, rel=0.15)
    assert power["pyramid"][0, 0] > 5 and power["pyramid"][8, 6] < 0.7


def test_a_small_discount_comes_near_white_noise() -> None:
    near = NoiseSampler(pyramid_discount=1e-4)(generator(0, "noise"), SHAPE)
    np.testing.assert_allclose(near, white(), atol=1e-3)


@pytest.mark.parametrize(("size", "coarse"), [(16, 7), (16, 1), (5, 5), (64, 3)])
def test_enlarging_is_bilinear_but_for_the_norm_of_its_rows(size: int, coarse: int) -> None:
    matrix = _enlarge(size, coarse)
    torchs = F.interpolate(torch.eye(coarse)[None], size=size, mode="linear", align_corners=False)[0].T.numpy()
    np.testing.assert_allclose(matrix / matrix.sum(axis=1, keepdims=True), torchs, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 1, 9), (16, 96, 32)])
def test_any_latent_shape_has_pyramid_noise(shape: tuple[int, int, int]) -> None:
    noise = KINDS["both"](generator(0, "noise"), shape)
    assert noise.shape == shape and np.isfinite(noise).all()


@pytest.mark.parametrize("width", [16, 768])
def test_an_embeddings_perturbation_has_the_scale_as_its_norm_at_any_width(width: int) -> None:
    noise = EmbeddingPerturbation(2.0)(generator(0, "perturbation"), (154, width))
    assert noise.dtype == np.float32 and noise.shape == (154, width)
    assert noise.std() == pytest.approx(2.0 / width**0.5, rel=0.05)
    assert np.linalg.norm(noise, axis=1).mean() == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(
    "wrong", [lambda: NoiseSampler(zero_frequency_ratio=-1), lambda: NoiseSampler(pyramid_discount=1.5)]
)
def test_a_sampler_checks_its_numbers(wrong: Callable[[], NoiseSampler]) -> None:
    with pytest.raises(AssertionError):
        wrong()
