"""The norm that is logged is the true one, and clipping by it is torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from everydream.optim.clip import part_norms, scale_gradients
from tests.optim.problem import Net, data


def with_gradients(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Net:
    net = Net().to(dtype)
    x, y = data()
    (torch.nn.functional.mse_loss(net(x.to(dtype)).float(), y) * scale).backward()
    return net


def split(net: Net) -> dict[str, list[torch.nn.Parameter]]:
    named = dict(net.named_parameters())
    return {
        "unet": [p for name, p in named.items() if name.startswith("conv")],
        "text_encoder": [p for name, p in named.items() if not name.startswith("conv")],
    }


def test_norms_are_each_parts_own() -> None:
    parts = split(with_gradients())
    exact = [math.sqrt(sum(p.grad.double().square().sum().item() for p in ps)) for ps in parts.values()]  # type: ignore[union-attr]
    assert part_norms(parts).tolist() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("shape", [(4_000_000,), (2000, 2000)])
def test_a_large_gradients_norm_is_exact_to_float32s_last_digits(shape: tuple[int, ...]) -> None:
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    exact = torch.linalg.vector_norm(weight.grad, dtype=torch.float64).item()
    assert part_norms({"unet": [weight]}).item() == pytest.approx(exact, rel=1e-6)


def test_bf16_gradients_have_a_float32_norm() -> None:
    parts = split(with_gradients(dtype=torch.bfloat16))
    exact = [math.sqrt(sum(p.grad.double().square().sum().item() for p in ps)) for ps in parts.values()]  # type: ignore[union-attr]
    norms = part_norms(parts)
    assert norms.dtype == torch.float32
    assert norms.tolist() == pytest.approx(exact, rel=1e-5)


def test_parameters_without_gradient_count_as_nothing() -> None:
    parts = split(with_gradients())
    for p in parts["unet"]:
        p.grad = None
    assert part_norms(parts).tolist()[0] == 0.0
    assert part_norms({"unet": [], **parts}).tolist()[0] == 0.0
    scale_gradients(parts, 0.5)


@pytest.mark.parametrize("largest", [0.01, 1.0, 1e6])
def test_clipping_is_torchs_own_over_all_parts(largest: float) -> None:
    ours, theirs = with_gradients(scale=100.0), with_gradients(scale=100.0)
    parts = split(ours)
    scale_gradients(parts, min(1.0, largest / part_norms(parts).norm().item()))
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), largest)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_gradient_shows_in_its_parts_norm_only(bad: float) -> None:
    parts = split(with_gradients())
    parts["unet"][0].grad[0, 0, 0, 0] = bad  # type: ignore[index]
    unet, text_encoder = part_norms(parts).tolist()
    assert not math.isfinite(unet)
    assert math.isfinite(text_encoder)
