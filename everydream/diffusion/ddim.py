"""DDIM: from noise to latents in few steps, drawing nothing on the way (Song et al. 2021, eq. 12 with σ = 0).

The default of previews. Timesteps and numbers are those of diffusers' DDIMScheduler, whose import takes seconds.
Shapes: B pictures, C latent channels, H × W latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from everydream.diffusion.paths import NoisePath
from everydream.errors import ConfigError

Spacing = Callable[[int, int, int], list[int]]  # sampling steps, training timesteps, offset → timesteps, falling


def _leading(steps: int, total: int, offset: int) -> list[int]:
    return [i * (total // steps) + offset for i in reversed(range(steps))]


def _trailing(steps: int, total: int, offset: int) -> list[int]:
    """Starts at the last timestep: what a zero-terminal-SNR model needs (Lin et al. 2023, section 3.3)."""
    return [round(total - i * total / steps) - 1 for i in range(steps)]


def _linspace(steps: int, total: int, offset: int) -> list[int]:
    return [round(i * (total - 1) / (steps - 1)) if steps > 1 else 0 for i in reversed(range(steps))]


SPACINGS: dict[str, Spacing] = {"leading": _leading, "trailing": _trailing, "linspace": _linspace}
Split = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x_t, prediction, √ᾱ, √(1−ᾱ) → x_0, ε
SPLITS: dict[str, Split] = {
    "epsilon": lambda x, p, signal, noise: ((x - noise * p) / signal, p),
    "sample": lambda x, p, signal, noise: (p, (x - signal * p) / noise),
    "v_prediction": lambda x, p, signal, noise: (signal * x - noise * p, signal * p + noise * x),
}


class Ddim:
    """`config`: a model's scheduler_config.json. The methods are those of diffusers' schedulers that sampling uses."""

    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        self._alphas_bar = NoisePath.from_scheduler_config(config).alphas_cumprod
        total = len(self._alphas_bar)
        if steps > total:
            raise ConfigError(f"sample_prompts: {steps} steps are more than the model's {total} timesteps")
        self._split = SPLITS[config.get("prediction_type", "epsilon")]
        self._stride = total // steps
        self._end = torch.ones(()) if config.get("set_alpha_to_one", True) else self._alphas_bar[0]
        spacing = SPACINGS[config.get("timestep_spacing", "leading")]
        self.timesteps = torch.tensor(spacing(steps, total, int(config.get("steps_offset", 0))))  # on the CPU

    def scale_model_input(self, x_BCHW: Tensor, t: Tensor) -> Tensor:
        return x_BCHW

    def alpha_bar(self, t: Tensor) -> Tensor:
        return self._alphas_bar[int(t)]

    def step(self, prediction_BCHW: Tensor, t: Tensor, x_BCHW: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """x_t → x at the timestep before: √ᾱ'·x_0 + √(1−ᾱ')·ε with what the prediction says x_0 and ε are."""
        before = int(t) - self._stride
        alpha_bar = self.alpha_bar(t)
        alpha_bar_before = self._alphas_bar[before] if before >= 0 else self._end
        x0_BCHW, noise_BCHW = self._split(x_BCHW, prediction_BCHW, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
        return (alpha_bar_before.sqrt() * x0_BCHW + (1 - alpha_bar_before).sqrt() * noise_BCHW,)
