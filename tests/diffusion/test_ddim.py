"""Our DDIM is diffusers', number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everydream.diffusion.ddim import SPACINGS, SPLITS, Ddim
from everydream.errors import ConfigError

CONFIG: dict[str, Any] = {  # Stable Diffusion 1.5's
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@pytest.mark.parametrize("prediction_type", SPLITS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_is_diffusers_ddim(prediction_type: str, spacing: str, zero_snr: bool, steps: int) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = {**CONFIG, "prediction_type": prediction_type, "timestep_spacing": spacing}
    config |= {"rescale_betas_zero_snr": zero_snr}
    theirs, ours = DDIMScheduler.from_config(config, clip_sample=False), Ddim(config, steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = ours_x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in theirs.timesteps:
        prediction = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(int(t)))
        if zero_snr and prediction_type == "epsilon" and ours.alpha_bar(t) == 0:
            return  # nothing of the picture is left to divide by: such a model must predict v
        x = theirs.step(prediction, t, x).prev_sample
        (ours_x,) = ours.step(prediction, t, ours_x)
        torch.testing.assert_close(ours_x, x, rtol=1e-5, atol=1e-6)
    assert ours.init_noise_sigma == theirs.init_noise_sigma


def test_what_a_config_leaves_out_is_as_in_diffusers() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    config = {"num_train_timesteps": 100}
    theirs, ours = DDIMScheduler.from_config(config, clip_sample=False), Ddim(config, 3)
    theirs.set_timesteps(3)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    x = torch.ones(1, 1, 2, 2)
    torch.testing.assert_close(ours.step(x / 2, ours.timesteps[-1], x)[0], theirs.step(x / 2, 0, x).prev_sample)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ConfigError, match="1001 steps"):
        Ddim(CONFIG, 1001)
