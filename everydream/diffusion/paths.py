"""How a latent turns into noise: x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (Ho et al. 2020, "DDPM", eq. 4).

Everything is float32, whatever the model computes in: in bfloat16 ᾱ_0 and ᾱ_1 round to 1 and those timesteps get no
noise at all. The tables are computed with the operations of diffusers' schedulers, so that training and sampling agree
to the last bit.

Shapes: T timesteps, B pictures, C latent channels, H × W latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everydream.errors import ConfigError


def _linear(start: float, end: float, steps: int) -> Tensor:
    """Ho et al. 2020, section 4."""
    return torch.linspace(start, end, steps, dtype=torch.float32)


def _scaled_linear(start: float, end: float, steps: int) -> Tensor:
    """Linear in √β: Rombach et al. 2022 ("latent diffusion"), as every Stable Diffusion 1 and 2 model has it."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2


def _cosine(start: float, end: float, steps: int) -> Tensor:
    """ᾱ(t) = cos²((t + 0.008)/1.008 · π/2): Nichol & Dhariwal 2021, eq. 17; β clipped at 0.999 as they do."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor(
        [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)], dtype=torch.float32
    )


def _sigmoid(start: float, end: float, steps: int) -> Tensor:
    """Xu et al. 2022 ("GeoDiff"), as in diffusers' DDPM scheduler."""
    return torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start


BETA_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
    "sigmoid": _sigmoid,
}


def zero_terminal_snr(betas_T: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that the last timestep holds no signal: Lin et al. 2023, "Common diffusion noise schedules
    and sample steps are flawed", algorithm 1. √ᾱ at the first timestep stays."""
    root_T = (1 - betas_T).cumprod(0).sqrt()
    first, last = root_T[0].clone(), root_T[-1].clone()
    root_T = (root_T - last) * (first / (first - last))
    alphas_bar_T = root_T**2
    alphas_T = torch.cat([alphas_bar_T[:1], alphas_bar_T[1:] / alphas_bar_T[:-1]])
    return 1 - alphas_T


@dataclass(frozen=True, eq=False)
class NoisePath:
    """A variance-preserving path over discrete timesteps. All tables float32, on one device."""

    alphas_cumprod: Tensor  # T: ᾱ

    def __post_init__(self) -> None:
        assert self.alphas_cumprod.dtype == torch.float32, self.alphas_cumprod.dtype
        assert self.alphas_cumprod.dim() == 1, self.alphas_cumprod.shape

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], zero_terminal_snr: bool = False) -> NoisePath:
        """From a diffusers scheduler_config.json. Zero terminal SNR is on if asked for here or by the model itself.

        Raises ConfigError for a beta schedule that is not in BETA_SCHEDULES.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        name = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas_T = torch.tensor(config["trained_betas"], dtype=torch.float32)
        elif name in BETA_SCHEDULES:
            start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
            betas_T = BETA_SCHEDULES[name](start, end, steps)
        else:
            known = ", ".join(BETA_SCHEDULES)
            raise ConfigError(f"scheduler_config.json: beta_schedule {name!r} is not known. Use one of: {known}")
        if zero_terminal_snr or config.get("rescale_betas_zero_snr"):
            betas_T = _rescaled(betas_T)
        return cls((1.0 - betas_T).cumprod(0))

    @property
    def num_train_timesteps(self) -> int:
        return self.alphas_cumprod.shape[0]

    def to(self, device: torch.device | str) -> NoisePath:
        return NoisePath(self.alphas_cumprod.to(device))

    def signal_and_noise(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1−ᾱ_t), each B×1×1×1."""
        alpha_bar_B111 = self.alphas_cumprod[t_B].view(-1, 1, 1, 1)
        return alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε, Ho et al. 2020, eq. 4. float32 whatever comes in."""
        signal, noise = self.signal_and_noise(t_B)
        return signal * x0_BCHW.float() + noise * noise_BCHW.float()

    def velocity(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """v = √ᾱ_t·ε − √(1−ᾱ_t)·x_0: Salimans & Ho 2022, "Progressive distillation", section 4 and appendix D."""
        signal, noise = self.signal_and_noise(t_B)
        return signal * noise_BCHW.float() - noise * x0_BCHW.float()

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio ᾱ_t/(1−ᾱ_t), B: Kingma et al. 2021, "Variational diffusion models", eq. 2. Zero at the
        last timestep of a zero-terminal-SNR path."""
        alpha_bar_B = self.alphas_cumprod[t_B]
        return alpha_bar_B / (1 - alpha_bar_B)


_rescaled = zero_terminal_snr  # from_scheduler_config has an argument of that name
