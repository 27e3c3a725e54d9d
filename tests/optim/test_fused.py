"""Fused backward is the plain update, parameter by parameter, with the gradients gone."""

from __future__ import annotations

import math

import pytest
import torch

from everydream.optim.clip import part_norms
from everydream.optim.fused import FusedBackward
from everydream.optim.partial import step_only
from everydream.optim.table import ROWS
from tests.optim.problem import Net, assert_same, data, optimizer_of, train, weights
from tests.optim.test_rows import EXPECTED

FUSING = [name for name, row in ROWS.items() if row.may_fuse]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
rounded = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def fused_train(
    net: Net, optimizer: torch.optim.Optimizer, steps: int, batch: tuple[torch.Tensor, torch.Tensor]
) -> list[float]:
    """The norm of each step's gradients."""
    fused = FusedBackward({"unet": optimizer}, {"unet": list(net.parameters())})
    x, y = batch
    norms = []
    for _ in range(steps):
        fused.begin()
        torch.nn.functional.mse_loss(net(x.to(net.conv.weight.dtype)).float(), y).backward()
        assert all(p.grad is None for p in net.parameters())
        norms.append(fused.norms().item())
    fused.remove()
    return norms


@pytest.mark.parametrize("name", FUSING)
@rounded
@devices
def test_equals_the_plain_path_bit_for_bit_weights_and_state(name: str, dtype: torch.dtype, device: str) -> None:
    seed = 1 if dtype is torch.bfloat16 else None
    lr, batch = EXPECTED[name].lr, data(device=device)
    plain, fused = Net().to(device, dtype), Net().to(device, dtype)
    a, b = (optimizer_of(net, name, lr=lr, rounding_seed=seed) for net in (plain, fused))
    train(plain, a, 5, batch)
    fused_train(fused, b, 5, batch)
    assert_same(weights(fused), weights(plain))
    for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            same = torch.equal(value, b.state[q][key]) if torch.is_tensor(value) else value == b.state[q][key]
            assert same, key
    for mine, theirs in zip(a.param_groups, b.param_groups, strict=True):
        assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in theirs.items() if k != "params"}


@pytest.mark.parametrize("name", FUSING)
def test_a_plain_step_after_fused_ones_goes_on(name: str) -> None:
    """The groups are whole again: a preview, a save or a run without the option finds all parameters."""
    plain, fused = Net(), Net()
    a, b = (optimizer_of(net, name, lr=1e-3) for net in (plain, fused))
    train(plain, a, 4, data())
    fused_train(fused, b, 2, data())
    train(fused, b, 2, data())
    assert_same(weights(fused), weights(plain))


@devices
def test_norm_is_that_of_all_gradients(device: str) -> None:
    net, batch = Net().to(device), data(device=device)
    torch.nn.functional.mse_loss(net(batch[0]), batch[1]).backward()
    wanted = part_norms({"unet": list(net.parameters())}).item()
    net.zero_grad()
    (norm,) = fused_train(net, optimizer_of(net, "adamw"), 1, batch)
    assert norm == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", FUSING)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@rounded
@devices
def test_a_parameter_with_a_bad_gradient_is_left_as_it_is(
    name: str, bad: float, dtype: torch.dtype, device: str
) -> None:
    net = Net().to(device, dtype)
    optimizer = optimizer_of(net, name, lr=EXPECTED[name].lr, rounding_seed=1 if dtype is torch.bfloat16 else None)
    fused_train(net, optimizer, 2, data(device=device))
    handle = net.wide.weight.register_hook(
        lambda g: torch.where(torch.arange(g.numel()).view(g.shape) == 7, bad, g.cpu()).to(g)
    )
    before = weights(net)
    (norm,) = fused_train(net, optimizer, 1, data(device=device))
    assert not math.isfinite(norm)
    handle.remove()
    after = weights(net)
    assert torch.equal(after["wide.weight"], before["wide.weight"])
    assert not torch.equal(after["conv.weight"], before["conv.weight"])
    (norm,) = fused_train(net, optimizer, 1, data(device=device))
    assert math.isfinite(norm)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize("name", FUSING)
def test_step_only_touches_nothing_else(name: str) -> None:
    net = Net()
    optimizer = optimizer_of(net, name, lr=0.1)
    before = weights(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    step_only(optimizer)([net.conv.weight, net.norm.bias])
    moved = {key for key, value in weights(net).items() if not torch.equal(value, before[key])}
    assert moved == {"conv.weight", "norm.bias"}
    assert set(optimizer.state) <= {net.conv.weight, net.norm.bias}


def test_only_rows_with_a_reason_cannot() -> None:
    assert set(ROWS) - set(FUSING) == {"prodigy", "schedulefree_adamw"}


@pytest.mark.gpu
def test_peak_memory_is_less_by_nearly_the_gradients() -> None:
    def peak(fuse: bool) -> int:
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048) for _ in range(12))).cuda()
        optimizer = optimizer_of(net, "adamw")
        x = torch.randn(8, 2048, device="cuda")
        fused = FusedBackward({"unet": optimizer}, {"unet": list(net.parameters())}) if fuse else None
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            net(x).square().mean().backward()
            if fused is None:
                optimizer.step()
                optimizer.zero_grad()
        return torch.cuda.max_memory_allocated()

    gradients = 12 * (2048 * 2048 + 2048) * 4
    assert peak(False) - peak(True) > 0.7 * gradients
