"""Losses against the papers' formulas, in float64, and torch's own losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from everydream.diffusion.objectives import LOSSES, PREDICTIONS, Objective, area_mean, problems
from everydream.diffusion.paths import NoisePath

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PATH = NoisePath.from_scheduler_config(CONFIG)
ZERO_SNR = NoisePath.from_scheduler_config(CONFIG, zero_terminal_snr=True)
LAST = torch.tensor([999])


def draw(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """prediction, latents, noise, t."""
    rng = torch.Generator().manual_seed(seed)
    shape = (n, 4, 6, 5)
    prediction, latents, noise = (torch.randn(shape, generator=rng) for _ in range(3))
    return prediction, latents, noise, torch.randint(0, 1000, (n,), generator=rng)


def alpha_bar_64(t: Tensor) -> Tensor:
    return PATH.alphas_cumprod.double()[t].view(-1, 1, 1, 1)


# Every row of the tables has its expectation here, in float64 and written anew from the papers.
TARGETS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda x0, noise, t: noise.double(),
    "v_prediction": lambda x0, noise, t: (
        alpha_bar_64(t).sqrt() * noise.double() - (1 - alpha_bar_64(t)).sqrt() * x0.double()
    ),
    "sample": lambda x0, noise, t: x0.double(),
}
MIN_SNR: dict[str, Callable[[Tensor, float], Tensor]] = {
    "epsilon": lambda snr, gamma: torch.minimum(snr, torch.tensor(gamma)) / snr,
    "v_prediction": lambda snr, gamma: torch.minimum(snr, torch.tensor(gamma)) / (snr + 1),
    "sample": lambda snr, gamma: torch.minimum(snr, torch.tensor(gamma)),
}
LOSS_VALUES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "mse": lambda e, u, d: e**2,
    "huber": lambda e, u, d: torch.where(e.abs() <= d, e**2, 2 * d * e.abs() - d**2),
    "mse_huber": lambda e, u, d: (1 - u) * e**2 + u * LOSS_VALUES["huber"](e, u, d),
    "huber_mse": lambda e, u, d: u * e**2 + (1 - u) * LOSS_VALUES["huber"](e, u, d),
}


def reference(objective: Objective, prediction: Tensor, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    error = prediction.double() - TARGETS[objective.prediction](latents, noise, t)
    loss = LOSS_VALUES[objective.loss_type](error, t.double().view(-1, 1, 1, 1) / 999, objective.huber_delta)
    loss_B = loss.mean(dim=(1, 2, 3))
    if objective.min_snr_gamma is not None:
        snr = (alpha_bar_64(t) / (1 - alpha_bar_64(t))).flatten()
        loss_B = loss_B * MIN_SNR[objective.prediction](snr, objective.min_snr_gamma)
    return loss_B


@pytest.mark.parametrize("gamma", [None, 1.0, 5.0])
@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_objective_equals_its_float64_reference(prediction: str, loss_type: str, gamma: float | None) -> None:
    objective = Objective(PATH, prediction, gamma, loss_type, huber_delta=0.7)
    data = draw(64)
    expected = reference(objective, *data)
    torch.testing.assert_close(objective.loss(*data).double(), expected, rtol=2e-4 if gamma else 1e-6, atol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_has_no_loss(prediction: str, loss_type: str) -> None:
    _, latents, noise, t = draw(3)
    perfect = PREDICTIONS[prediction].target(PATH, latents, noise, t)
    assert Objective(PATH, prediction, 5.0, loss_type).loss(perfect, latents, noise, t).tolist() == [0, 0, 0]


@pytest.mark.parametrize("path", [PATH, ZERO_SNR], ids=["path", "zero_snr"])
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_makes_all_predictions_one_objective(path: NoisePath, gamma: float) -> None:
    """Hang et al. 2023: all are min(SNR, γ)·‖x₀ − x̂₀‖², whichever of ε, v, x₀ the network is asked for."""
    _, x0, noise, _ = draw(999)
    t = torch.arange(999)  # without the last timestep, where no x₀ follows from an ε
    x0_hat = x0 + 0.1 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(9))
    a, s = (x.double() for x in path.signal_and_noise(t))
    x_t = a * x0 + s * noise
    eps_hat = (x_t - a * x0_hat) / s
    guesses = {"sample": x0_hat, "epsilon": eps_hat, "v_prediction": a * eps_hat - s * x0_hat}
    weights = path.snr(t).double().clamp_max(gamma)
    expected = weights * (x0.double() - x0_hat.double()).square().mean(dim=(1, 2, 3))
    for prediction in PREDICTIONS:
        loss_B = Objective(path, prediction, gamma).loss(guesses[prediction].float(), x0, noise, t)
        # ε's error shrinks with √SNR, and its float32 rounding with it not: the last timesteps are the coarsest.
        torch.testing.assert_close(loss_B.double(), expected, rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize(("prediction", "weight"), [("epsilon", 1.0), ("v_prediction", 0.0), ("sample", 0.0)])
def test_min_snr_is_finite_where_there_is_no_signal(prediction: str, weight: float) -> None:
    output, latents, noise, _ = draw(1)
    output.requires_grad_()
    plain = Objective(ZERO_SNR, prediction).loss(output, latents, noise, LAST)
    loss_B = Objective(ZERO_SNR, prediction, 5.0).loss(output, latents, noise, LAST)
    assert loss_B.item() == weight * plain.item()
    loss_B.sum().backward()
    assert output.grad is not None and output.grad.isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_pictures_loss_does_not_depend_on_its_neighbours(prediction: str, n: int) -> None:
    objective = Objective(PATH, prediction, 5.0, "mse_huber", huber_delta=0.5)
    output, latents, noise, t = draw(n)
    mask = torch.rand(n, 1, 6, 5, generator=torch.Generator().manual_seed(1))
    together = objective.loss(output, latents, noise, t, mask)
    assert together.shape == (n,)
    for i in range(n):
        alone = objective.loss(output[i : i + 1], latents[i : i + 1], noise[i : i + 1], t[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-6, atol=0)


def test_mse_equals_torchs() -> None:
    output, latents, noise, t = draw(4)
    expected = F.mse_loss(output, noise, reduction="none").mean(dim=(1, 2, 3))
    assert torch.equal(Objective(PATH).loss(output, latents, noise, t), expected)


@pytest.mark.parametrize("delta", [0.1, 1.0, 3.0])
def test_huber_is_twice_torchs(delta: float) -> None:
    output, latents, noise, t = draw(4)
    expected = 2 * F.huber_loss(output, noise, reduction="none", delta=delta).mean(dim=(1, 2, 3))
    loss_B = Objective(PATH, loss_type="huber", huber_delta=delta).loss(output, latents, noise, t)
    torch.testing.assert_close(loss_B, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_small_errors_have_the_same_loss_and_gradient_whatever_the_loss_type(loss_type: str) -> None:
    _, latents, noise, t = draw(4)
    error = 0.09 * torch.tanh(torch.randn(noise.shape, generator=torch.Generator().manual_seed(2)))

    def loss_and_gradient(name: str) -> tuple[Tensor, Tensor]:
        output = (noise + error).requires_grad_()
        loss_B = Objective(PATH, loss_type=name, huber_delta=0.1).loss(output, latents, noise, t)
        return loss_B.detach(), torch.autograd.grad(loss_B.sum(), output)[0]

    for ours, mse in zip(loss_and_gradient(loss_type), loss_and_gradient("mse"), strict=True):
        torch.testing.assert_close(ours, mse, rtol=1e-5, atol=1e-9)


def test_hubers_gradient_never_passes_2_delta() -> None:
    output, latents, noise, t = draw(4)
    output = (100 * output).requires_grad_()
    loss_B = Objective(PATH, loss_type="huber", huber_delta=0.3).loss(output, latents, noise, t)
    gradient = torch.autograd.grad(loss_B.sum(), output)[0] * output[0].numel()
    assert gradient.abs().max().item() == pytest.approx(0.6, rel=1e-4)


def test_the_mixes_read_from_clean_to_noise() -> None:
    """mse_huber is mse at t = 0 and huber at t = T − 1; huber_mse the other way round."""
    output, latents, noise, _ = draw(1)
    for t, names in ((0, ("mse", "huber")), (999, ("huber", "mse"))):
        for mix, pure in zip(("mse_huber", "huber_mse"), names, strict=True):
            mixed, alone = (
                Objective(PATH, loss_type=name, huber_delta=0.2).loss(10 * output, latents, noise, torch.tensor([t]))
                for name in (mix, pure)
            )
            torch.testing.assert_close(mixed, alone, rtol=1e-6, atol=0)


def test_the_gradient_is_the_one_derived_by_hand() -> None:
    """d/dv̂ of w·mean((v̂ − v)²) = 2w(v̂ − v)/(C·H·W)."""
    output, latents, noise, t = draw(5)
    output.requires_grad_()
    Objective(PATH, "v_prediction", 5.0).loss(output, latents, noise, t).sum().backward()
    snr = PATH.snr(t)
    weight = (snr.clamp_max(5) / (snr + 1)).view(-1, 1, 1, 1)
    expected = 2 * weight * (output.detach() - PATH.velocity(latents, noise, t)) / output[0].numel()
    torch.testing.assert_close(output.grad, expected, rtol=1e-6, atol=1e-10)


def test_losses_are_float32_whatever_comes_in() -> None:
    output, latents, noise, t = draw(3)
    low = [x.bfloat16() for x in (output, latents, noise)]
    objective = Objective(PATH, "v_prediction", 5.0, "mse_huber")
    with torch.autocast("cpu", torch.bfloat16):
        loss_B = objective.loss(*low, t)
    assert loss_B.dtype == torch.float32
    assert torch.equal(loss_B, objective.loss(*(x.float() for x in low), t))


def test_a_full_mask_changes_nothing() -> None:
    loss = torch.rand(3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(area_mean(loss, torch.ones(3, 1, 6, 5)), area_mean(loss, None), rtol=1e-6, atol=0)


def test_a_mask_is_normalised_by_its_area() -> None:
    loss = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 6, 5)
    mask[0, :, :3, :2] = 1
    mask[1, :, 5, 4] = 0.25
    expected = torch.stack([loss[0, :, :3, :2].mean(), loss[1, :, 5, 4].mean()])
    torch.testing.assert_close(area_mean(loss, mask), expected, rtol=1e-6, atol=0)


def test_an_empty_mask_gives_no_loss_and_no_gradient() -> None:
    output, latents, noise, t = draw(1)
    output.requires_grad_()
    loss_B = Objective(PATH).loss(output, latents, noise, t, torch.zeros(1, 1, 6, 5))
    loss_B.sum().backward()
    assert loss_B.item() == 0
    assert output.grad is not None and not output.grad.any()


@pytest.mark.parametrize(
    "wrong", [{"prediction": "flow"}, {"loss_type": "l1"}, {"huber_delta": 0.0}, {"min_snr_gamma": 0.0}]
)
def test_an_objective_checks_its_parts(wrong: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        Objective(PATH, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prediction", "zero_snr", "start", "end", "said"),
    [
        ("epsilon", False, 0, 1000, []),
        ("v_prediction", True, 0, 1000, []),
        ("sample", True, 0, 1000, []),
        ("epsilon", True, 0, 1000, ["enable_zero_terminal_snr"]),
        ("epsilon", False, 500, 500, ["timestep_start"]),
        ("epsilon", False, -1, 1000, ["timestep_start"]),
        ("epsilon", True, 0, 1001, ["enable_zero_terminal_snr", "timestep_start"]),
    ],
)
def test_meaningless_settings_are_named(prediction: str, zero_snr: bool, start: int, end: int, said: list[str]) -> None:
    found = problems(prediction, zero_snr, start, end, 1000)
    assert [text.split(":")[0].split(",")[0] for text in found] == said
