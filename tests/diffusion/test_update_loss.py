"""The law of accumulation: N micro-batches of B are one of N·B, with unequal weights, class pictures and processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from everydream.diffusion.objectives import Objective, update_loss
from everydream.diffusion.paths import NoisePath

OBJECTIVE = Objective(NoisePath.from_scheduler_config({"beta_schedule": "scaled_linear"}), min_snr_gamma=5.0)
SUBJECT, CLASS = 12, 6  # pictures of an update


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(nn.functional.pad(x, (1, 1, 1, 1)))


def pictures(n: int, seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(n, 4, 8, 8, generator=rng),
        "noise": torch.randn(n, 4, 8, 8, generator=rng),
        "t": torch.randint(0, 1000, (n,), generator=rng),
        "weights": torch.rand(n, generator=rng) * 2,
    }


def share(model: nn.Module, batch: dict[str, Tensor], total: int, factor: float) -> Tensor:
    noisy = OBJECTIVE.path.add_noise(batch["latents"], batch["noise"], batch["t"])
    loss_B = OBJECTIVE.loss(model(noisy), batch["latents"], batch["noise"], batch["t"])
    return update_loss(loss_B, batch["weights"], total, factor)


def gradient(micro_batches: int, prior: float = 0.5, processes: int = 1, with_class: bool = True) -> Tensor:
    """Of a whole update, flat, as DistributedDataParallel forms it: the mean over the processes' gradients."""
    kinds = [(pictures(SUBJECT, 1), SUBJECT, 1.0)]
    if with_class:
        kinds.append((pictures(CLASS, 2), CLASS, prior))
    total = torch.zeros(())
    for process in range(processes):
        model = Denoiser()
        for i in range(process, micro_batches, processes):
            for batch, n, factor in kinds:
                mine = {name: value.chunk(micro_batches)[i] for name, value in batch.items()}
                share(model, mine, n, factor * processes).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        total = total + flat / processes
    return total


@pytest.mark.parametrize(("micro_batches", "processes"), [(2, 1), (3, 1), (6, 1), (2, 2), (6, 2), (3, 3), (6, 3)])
def test_micro_batches_and_processes_add_up_to_one_batch(micro_batches: int, processes: int) -> None:
    whole = gradient(1)
    assert (gradient(micro_batches, processes=processes) - whole).norm() <= 1e-5 * whole.norm()


def test_an_update_is_the_formula_written_out() -> None:
    """Σ_subject wᵢlᵢ/N_subject + prior_loss_weight·Σ_class wⱼlⱼ/N_class, every picture by itself."""
    model, expected = Denoiser(), torch.zeros(())
    for batch, n, factor in ((pictures(SUBJECT, 1), SUBJECT, 1.0), (pictures(CLASS, 2), CLASS, 0.5)):
        for i in range(n):
            one = {name: value[i : i + 1] for name, value in batch.items()}
            noisy = OBJECTIVE.path.add_noise(one["latents"], one["noise"], one["t"])
            loss = OBJECTIVE.loss(model(noisy), one["latents"], one["noise"], one["t"])
            expected = expected + factor * one["weights"][0] * loss[0] / n
    expected.backward()
    by_hand = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (gradient(3) - by_hand).norm() <= 1e-5 * by_hand.norm()


def test_prior_loss_weight_acts_in_proportion() -> None:
    subject = gradient(3, with_class=False)
    of_class = gradient(3, prior=1.0) - subject
    assert of_class.norm() > 0.1 * subject.norm()
    for weight in (0.5, 2.0):
        expected = subject + weight * of_class
        assert (gradient(3, prior=weight) - expected).norm() <= 1e-5 * expected.norm()
    assert (gradient(3, prior=0.0) - subject).norm() <= 1e-7 * subject.norm()


def test_weights_do_not_change_how_much_the_others_count() -> None:
    """N counts pictures: a picture of weight 0 does not make its neighbours heavier."""
    loss_B = torch.tensor([1.0, 2.0, 3.0])
    shares = [update_loss(loss_B[i : i + 1], torch.ones(1), total=3) for i in range(2)]
    assert update_loss(loss_B, torch.tensor([1.0, 1.0, 0.0]), total=3) == sum(shares)
