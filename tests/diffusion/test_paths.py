"""Noise paths against diffusers' schedulers and the papers' formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from everydream.diffusion.paths import BETA_SCHEDULES, NoisePath, zero_terminal_snr
from everydream.errors import ConfigError

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
ALL = torch.arange(1000)


def latents_and_noise(n: int = 1000) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, 3, 2, generator=rng), torch.randn(n, 4, 3, 2, generator=rng)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    ("reference", "schedule"),
    [(DDPMScheduler, name) for name in BETA_SCHEDULES]
    + [(DDIMScheduler, name) for name in BETA_SCHEDULES if name != "sigmoid"],  # diffusers' DDIM has none
)
def test_add_noise_and_velocity_equal_diffusers_to_the_bit(
    reference: type[DDPMScheduler], schedule: str, zero_snr: bool
) -> None:
    config = {**STABLE_DIFFUSION, "beta_schedule": schedule}
    theirs = reference(**config, rescale_betas_zero_snr=zero_snr)
    ours = NoisePath.from_scheduler_config(config, zero_terminal_snr=zero_snr)
    x0, noise = latents_and_noise()
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(ours.add_noise(x0, noise, ALL), theirs.add_noise(x0, noise, ALL))
    assert torch.equal(ours.velocity(x0, noise, ALL), theirs.get_velocity(x0, noise, ALL))


def float64_sqrt_alpha_bar() -> np.ndarray:
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.sqrt(np.cumprod(1 - betas))


def test_tables_equal_the_formula_in_float64() -> None:
    path = NoisePath.from_scheduler_config(STABLE_DIFFUSION)
    np.testing.assert_allclose(path.alphas_cumprod.sqrt().double(), float64_sqrt_alpha_bar(), rtol=2e-5)


def test_zero_terminal_snr_is_lin_2023_algorithm_1() -> None:
    root = float64_sqrt_alpha_bar()
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    path = NoisePath.from_scheduler_config(STABLE_DIFFUSION, zero_terminal_snr=True)
    np.testing.assert_allclose(path.alphas_cumprod.sqrt().double(), expected, atol=1e-6)
    assert path.alphas_cumprod[-1] == 0
    assert path.snr(torch.tensor([999])) == 0
    plain = NoisePath.from_scheduler_config(STABLE_DIFFUSION)
    assert abs(path.alphas_cumprod[0] - plain.alphas_cumprod[0]) < 1e-6


def test_at_zero_terminal_snr_the_input_is_noise_and_the_velocity_the_picture() -> None:
    path = NoisePath.from_scheduler_config(STABLE_DIFFUSION, zero_terminal_snr=True)
    x0, noise = latents_and_noise(1)
    last = torch.tensor([999])
    assert torch.equal(path.add_noise(x0, noise, last), noise)
    assert torch.equal(path.velocity(x0, noise, last), -x0)


def test_zero_terminal_snr_of_the_model_itself_holds() -> None:
    asked = NoisePath.from_scheduler_config(STABLE_DIFFUSION, zero_terminal_snr=True)
    own = NoisePath.from_scheduler_config({**STABLE_DIFFUSION, "rescale_betas_zero_snr": True})
    assert torch.equal(own.alphas_cumprod, asked.alphas_cumprod)


def test_zero_terminal_snr_leaves_its_argument() -> None:
    betas = BETA_SCHEDULES["linear"](0.0001, 0.02, 10)
    before = betas.clone()
    zero_terminal_snr(betas)
    assert torch.equal(betas, before)


def test_snr_equals_diffusers_and_the_formula() -> None:
    path = NoisePath.from_scheduler_config(STABLE_DIFFUSION)
    torch.testing.assert_close(path.snr(ALL), compute_snr(DDPMScheduler(**STABLE_DIFFUSION), ALL), rtol=1e-5, atol=0)
    alpha_bar = float64_sqrt_alpha_bar() ** 2
    np.testing.assert_allclose(path.snr(ALL).double(), alpha_bar / (1 - alpha_bar), rtol=2e-4)


def test_picture_and_noise_come_back_from_input_and_velocity() -> None:
    """x₀ = √ᾱ·x_t − √(1−ᾱ)·v and ε = √(1−ᾱ)·x_t + √ᾱ·v: Salimans & Ho 2022, appendix D."""
    path = NoisePath.from_scheduler_config(STABLE_DIFFUSION, zero_terminal_snr=True)
    x0, noise = latents_and_noise()
    x_t, v = path.add_noise(x0, noise, ALL), path.velocity(x0, noise, ALL)
    a, s = path.signal_and_noise(ALL)
    torch.testing.assert_close(a * x_t - s * v, x0, rtol=0, atol=2e-6)
    torch.testing.assert_close(s * x_t + a * v, noise, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", [NoisePath.add_noise, NoisePath.velocity])
def test_bfloat16_under_autocast_loses_no_noise_at_timesteps_0_and_1(
    method: Callable[[NoisePath, Tensor, Tensor, Tensor], Tensor],
) -> None:
    path = NoisePath.from_scheduler_config(STABLE_DIFFUSION)
    assert (path.alphas_cumprod[:2].bfloat16() == 1).all(), "what the float32 tables are there to avoid"
    x0, noise = (x.bfloat16() for x in latents_and_noise(2))
    t = torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method(path, x0, noise, t)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, method(path, x0.float(), noise.float(), t))


def test_trained_betas_win() -> None:
    path = NoisePath.from_scheduler_config({**STABLE_DIFFUSION, "trained_betas": [0.5, 0.5]})
    assert path.alphas_cumprod.tolist() == [0.5, 0.25]
    assert path.num_train_timesteps == 2


def test_an_unknown_beta_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="scaled_linear"):
        NoisePath.from_scheduler_config({"beta_schedule": "cubic"})
