"""The loss of each picture = path × prediction × weighting × loss function, free of model families, in float32.

Shapes: B pictures, C latent channels, H × W latent pixels, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from everydream.diffusion.paths import NoisePath


@dataclass(frozen=True)
class Prediction:
    """What the network is asked for, and the min-SNR weight that belongs to it."""

    target: Callable[[NoisePath, Tensor, Tensor, Tensor], Tensor]  # path, x0_BCHW, noise_BCHW, t_B → target_BCHW
    min_snr: Callable[[Tensor, float], Tensor]  # snr_B, γ → weight_B


# Min-SNR weighting, Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section 3.4: the
# weight min(SNR, γ) on the x₀ loss, carried over to what the network predicts. All three are finite at SNR = 0.
PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(
        target=lambda path, x0_BCHW, noise_BCHW, t_B: noise_BCHW.float(),
        min_snr=lambda snr_B, gamma: gamma / snr_B.clamp_min(gamma),  # = min(SNR, γ)/SNR, and its limit 1 at SNR = 0
    ),
    "v_prediction": Prediction(
        target=lambda path, x0_BCHW, noise_BCHW, t_B: path.velocity(x0_BCHW, noise_BCHW, t_B),
        min_snr=lambda snr_B, gamma: snr_B.clamp_max(gamma) / (snr_B + 1),
    ),
    "sample": Prediction(
        target=lambda path, x0_BCHW, noise_BCHW, t_B: x0_BCHW.float(),
        min_snr=lambda snr_B, gamma: snr_B.clamp_max(gamma),
    ),
}


def _mse(error_BCHW: Tensor, fraction_B111: Tensor, delta: float) -> Tensor:
    """e²."""
    return error_BCHW.square()


def _huber(error_BCHW: Tensor, fraction_B111: Tensor, delta: float) -> Tensor:
    """e² up to |e| = δ, 2δ|e| − δ² beyond: Huber 1964 (his ρ) times 2, which is mse's scale: both have the
    same value and gradient where |e| ≤ δ, so that changing the loss does not change the effective learning rate."""
    size_BCHW = error_BCHW.abs()
    inside_BCHW = size_BCHW.clamp_max(delta)
    return inside_BCHW * (2 * size_BCHW - inside_BCHW)


def _mse_huber(error_BCHW: Tensor, fraction_B111: Tensor, delta: float) -> Tensor:
    """mse at t = 0 (nearly clean) turning linearly into huber at t = T − 1 (nearly noise)."""
    return torch.lerp(_mse(error_BCHW, fraction_B111, delta), _huber(error_BCHW, fraction_B111, delta), fraction_B111)


def _huber_mse(error_BCHW: Tensor, fraction_B111: Tensor, delta: float) -> Tensor:
    """huber at t = 0 (nearly clean) turning linearly into mse at t = T − 1 (nearly noise)."""
    return _mse_huber(error_BCHW, 1 - fraction_B111, delta)


# error_BCHW, t/(T − 1) as B×1×1×1, δ → loss_BCHW
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "mse": _mse,
    "huber": _huber,
    "mse_huber": _mse_huber,
    "huber_mse": _huber_mse,
}


@dataclass(frozen=True)
class Objective:
    """`min_snr_gamma` None: every timestep weighs the same. `huber_delta` is used by the huber losses only."""

    path: NoisePath
    prediction: str = "epsilon"
    min_snr_gamma: float | None = None
    loss_type: str = "mse"
    huber_delta: float = 1.0

    def __post_init__(self) -> None:
        assert self.prediction in PREDICTIONS, f"{self.prediction!r} not in {list(PREDICTIONS)}"
        assert self.loss_type in LOSSES, f"{self.loss_type!r} not in {list(LOSSES)}"
        assert self.huber_delta > 0, self.huber_delta
        assert self.min_snr_gamma is None or self.min_snr_gamma > 0, self.min_snr_gamma

    def loss(
        self,
        prediction_BCHW: Tensor,
        latents_BCHW: Tensor,
        noise_BCHW: Tensor,
        t_B: Tensor,
        mask_B1HW: Tensor | None = None,
    ) -> Tensor:
        """One float32 value a picture: the mean over its latent, or over its mask's area. The caller reduces."""
        row = PREDICTIONS[self.prediction]
        error_BCHW = prediction_BCHW.float() - row.target(self.path, latents_BCHW, noise_BCHW, t_B)
        fraction_B111 = (t_B.float() / max(self.path.num_train_timesteps - 1, 1)).view(-1, 1, 1, 1)
        loss_B = area_mean(LOSSES[self.loss_type](error_BCHW, fraction_B111, self.huber_delta), mask_B1HW)
        if self.min_snr_gamma is None:
            return loss_B
        return loss_B * row.min_snr(self.path.snr(t_B), self.min_snr_gamma)


def area_mean(loss_BCHW: Tensor, mask_B1HW: Tensor | None) -> Tensor:
    """Σ mask·loss / Σ mask for each picture: a small mask counts as much as a full one; an empty mask gives 0."""
    if mask_B1HW is None:
        return loss_BCHW.mean(dim=(1, 2, 3))
    area_B = mask_B1HW.float().sum(dim=(1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    return (loss_BCHW * mask_B1HW.float()).sum(dim=(1, 2, 3)) / (area_B * loss_BCHW.shape[1])


def problems(prediction: str, zero_terminal_snr: bool, start: int, end: int, num_train_timesteps: int) -> list[str]:
    """What makes these settings meaningless together, each with what to do; empty where all is well."""
    found = []
    if prediction == "epsilon" and zero_terminal_snr:
        found.append(
            "enable_zero_terminal_snr: the model predicts epsilon, and at the last timestep, which then holds no "
            "signal, epsilon is the input itself and says nothing about the picture (Lin et al. 2023, section 3.2). "
            "Use it with a v-prediction model, or leave it off"
        )
    if not 0 <= start < end <= num_train_timesteps:
        found.append(
            f"timestep_start, timestep_end: {start}, {end} is no range within 0 to {num_train_timesteps}, this model's "
            "timesteps (the start belongs to the range, the end does not)"
        )
    return found
