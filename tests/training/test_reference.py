"""A micro-batch's losses and gradients against diffusers' own modules, wired as its training examples do it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from transformers import CLIPTextModel

from everydream.data.batch import Batch
from everydream.diffusion.objectives import Objective
from everydream.diffusion.paths import NoisePath
from everydream.models.family import load, read_facts
from everydream.training.update import Update
from tests.tiny import make_tiny_model

SNR_GAMMA = 5.0


def micro_batch(n: int = 4) -> Batch:
    rng = torch.Generator().manual_seed(0)
    return Batch(
        identities=tuple(map(str, range(n))),
        captions=("",) * n,
        epochs=(0,) * n,
        crops=((0, 0, 64, 48),) * n,
        flips=(False,) * n,
        is_class=False,
        t_B=torch.tensor([0, 300, 700, 999]),
        noise_BCHW=torch.randn(n, 4, 12, 16, generator=rng),
        vae_noise_BCHW=torch.randn(n, 4, 12, 16, generator=rng),
        weights_B=torch.ones(n),
        pixels_BCHW=torch.randint(0, 256, (n, 3, 48, 64), generator=rng, dtype=torch.uint8),
        tokens_BKL=torch.randint(0, 500, (n, 1, 77), generator=rng),
    )


def theirs(folder: Path, batch: Batch, v_prediction: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-picture losses, weighted by min-SNR, and each part's flat gradient of their sum."""
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").train()
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    assert batch.pixels_BCHW is not None and batch.tokens_BKL is not None
    with torch.no_grad():
        latent_dist = vae.encode(batch.pixels_BCHW.float() / 127.5 - 1).latent_dist
    latents = (latent_dist.mean + latent_dist.std * batch.vae_noise_BCHW) * vae.config.scaling_factor
    noisy = scheduler.add_noise(latents, batch.noise_BCHW, batch.t_B)
    text = text_encoder(batch.tokens_BKL[:, 0])[0]
    output = unet(noisy, batch.t_B, text).sample
    snr = compute_snr(scheduler, batch.t_B)
    weights = snr.clamp_max(SNR_GAMMA) / (snr + v_prediction)
    target = scheduler.get_velocity(latents, batch.noise_BCHW, batch.t_B) if v_prediction else batch.noise_BCHW
    loss_B = F.mse_loss(output, target, reduction="none").mean(dim=(1, 2, 3)) * weights
    loss_B.sum().backward()
    return loss_B.detach(), {"unet": norm(unet.parameters()), "text_encoder": norm(text_encoder.parameters())}


def norm(parameters: object) -> Tensor:
    """Of each tensor's gradient, sorted: the names differ between versions of the libraries."""
    some: list[nn.Parameter] = list(parameters)  # type: ignore[call-overload]
    return torch.tensor([p.grad.norm() if p.grad is not None else 0.0 for p in some]).sort().values


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_and_gradients_equal_diffusers(tmp_path: Path, prediction: str) -> None:
    folder = make_tiny_model(tmp_path / "model", prediction_type=prediction)
    batch = micro_batch()
    loss_B, norms = theirs(folder, batch, prediction == "v_prediction")
    facts = read_facts(str(folder))
    family = load(facts, train=("unet", "text_encoder"), weights_dtype=torch.float32, device="cpu")
    path = NoisePath.from_scheduler_config(facts.scheduler_config)
    update = SimpleNamespace(
        family=family,
        denoiser=family.denoiser.train(),
        objective=Objective(path, facts.prediction_type, min_snr_gamma=SNR_GAMMA),
    )
    ours_B = Update.example_losses(update, batch)
    ours_B.sum().backward()
    torch.testing.assert_close(ours_B.detach(), loss_B, rtol=1e-5, atol=0)
    for part, expected in norms.items():
        found = norm(family.parameters_of(part).values())
        assert (found - expected).norm() <= 1e-5 * expected.norm(), part
