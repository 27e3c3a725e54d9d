"""bf16 weights with stochastic rounding learn as float32 weights do; plain bf16 loses the updates."""

from __future__ import annotations

import copy

import pytest
import torch

from everydream.optim import rounding
from everydream.optim.table import ROWS
from tests.optim.problem import Net, assert_same, data, optimizer_of, train, weights
from tests.optim.test_rows import EXPECTED

BF16 = torch.bfloat16
ROUNDING = [name for name, row in ROWS.items() if row.may_round]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 65536, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def test_the_result_is_a_neighbour_and_right_on_average() -> None:
    value = 1.0 + 2**-7 * 0.3  # bf16 has 1 and 1 + 2**-7 there
    rounded = rounding.round_stochastically_(torch.full((100_000,), value), noise(100_000))
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(value, abs=2**-7 * 0.01)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_probability_is_exactly_the_remainder(sign: float) -> None:
    """All 65,536 draws: of those, as many as the remainder's bits go away from zero."""
    every = torch.arange(65536, dtype=torch.int32)
    value = sign * (1.0 + 2**-7 * 12345 / 65536)
    away = rounding.round_stochastically_(torch.full((65536,), value), every).abs() > 1.0
    assert away.sum().item() == 12345


def test_what_bf16_can_hold_stays() -> None:
    held = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38, 1e-40, float("inf"), -float("inf"), float("nan")]).to(BF16).float()
    for seed in range(20):
        rounded = rounding.round_stochastically_(held.clone(), noise(len(held), seed))
        assert torch.equal(rounded.view(torch.int32), held.view(torch.int32))


def test_only_rows_with_a_reason_cannot() -> None:
    assert set(ROWS) - set(ROUNDING) == {"prodigy", "schedulefree_adamw"}
    assert all(len(ROWS[name].cannot_round) > 20 for name in set(ROWS) - set(ROUNDING))


@pytest.mark.parametrize("name", ROUNDING)
@devices
def test_learns_as_float32_does(name: str, device: str) -> None:
    """At an lr whose steps are mostly below bf16's resolution, as in fine-tuning."""
    batch, lr = data(device=device), EXPECTED[name].lr / 30
    exact = Net().to(device)
    full = train(exact, optimizer_of(exact, name, lr=lr), 200, batch)
    net = Net().to(device, BF16)
    rounded = train(net, optimizer_of(net, name, lr=lr, rounding_seed=1), 200, batch)
    learnt = (rounded[0] - rounded[-1]) / (full[0] - full[-1])
    assert 0.9 < learnt < 1.1, (full[0], full[-1], rounded[-1])


@pytest.mark.parametrize("name", ["adamw", "lion", "adamw8bit", "lion8bit"])
def test_plain_bf16_loses_the_updates(name: str) -> None:
    """What the option is for: at a fine-tuning lr the plain classes leave most bf16 weights where they were."""
    plain, rounded, exact = Net().to(BF16), Net().to(BF16), Net()
    lr = 2e-5
    for net, seed in ((plain, None), (rounded, 1), (exact, None)):
        train(net, optimizer_of(net, name, lr=lr, rounding_seed=seed), 20, data())
    start = Net().wide.weight
    stuck = (plain.wide.weight == start.to(BF16)).float().mean().item()
    moved = (rounded.wide.weight.float() - start.to(BF16).float()).detach().flatten()
    wanted = (exact.wide.weight - start).detach().flatten()
    assert stuck > 0.5
    # Each weight is random, the direction of all together is not.
    assert torch.dot(moved, wanted) / torch.dot(wanted, wanted) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", ROUNDING)
@devices
def test_state_is_as_of_float32_weights(name: str, device: str) -> None:
    net = Net().to(device, BF16)
    optimizer = optimizer_of(net, name, rounding_seed=1)
    train(net, optimizer, 1, data(device=device))
    for param, expected in ((net.wide.weight, EXPECTED[name].big), (net.wide.bias, EXPECTED[name].small)):
        tensors = {key: value.dtype for key, value in optimizer.state[param].items() if torch.is_tensor(value)}
        assert tensors == expected
    assert all(
        p.dtype is BF16 and p.shape == q.shape for p, q in zip(net.parameters(), Net().parameters(), strict=True)
    )


@pytest.mark.parametrize("name", ROUNDING)
def test_a_step_is_the_float32_step_rounded(name: str) -> None:
    """Each weight lands on one of the two bf16 neighbours of what the library computes in float32."""
    net, exact = Net().to(BF16), Net()
    exact.load_state_dict(net.float().state_dict())
    net.to(BF16)
    ours, theirs = optimizer_of(net, name, lr=1e-3, rounding_seed=1), optimizer_of(exact, name, lr=1e-3)
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        p.grad = torch.full_like(p, 0.01)
        q.grad = p.grad.float()
    ours.step()
    theirs.step()
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        low = (q.detach().view(torch.int32) & -65536).view(torch.float32)
        high = (q.detach().view(torch.int32) + 65535 & -65536).view(torch.float32)
        assert ((p.float() == low) | (p.float() == high)).all()


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize("chunk", [1, 5000, 2**24])
def test_neither_the_chunks_nor_the_order_change_a_bit(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Net().to(BF16)
    train(whole, optimizer_of(whole, name, lr=1e-3, rounding_seed=1), 3, data())
    monkeypatch.setattr(rounding, "CHUNK", chunk)
    parted = Net().to(BF16)
    train(parted, optimizer_of(parted, name, lr=1e-3, rounding_seed=1), 3, data())
    assert_same(weights(parted), weights(whole))


def test_draws_depend_on_the_seed_and_on_the_step() -> None:
    results = []
    for seed in (1, 1, 2):
        net = Net().to(BF16)
        train(net, optimizer_of(net, "adamw", lr=1e-4, rounding_seed=seed), 2, data())
        results.append(weights(net))
    assert_same(results[0], results[1])
    assert not torch.equal(results[0]["wide.weight"], results[2]["wide.weight"])

    net = Net().to(BF16)
    optimizer = optimizer_of(net, "sgd", lr=1e-4, rounding_seed=1)
    moved = []
    for _ in range(2):
        start = net.wide.weight.detach().clone()
        net.wide.weight.grad = torch.ones_like(net.wide.weight)
        optimizer.step()
        moved.append(net.wide.weight.detach() != start)
        with torch.no_grad():
            net.wide.weight.copy_(start)
    assert not torch.equal(*moved)


def test_the_count_of_steps_is_saved_with_the_groups() -> None:
    net = Net().to(BF16)
    optimizer = optimizer_of(net, "sgd", lr=1e-2, rounding_seed=1)
    train(net, optimizer, 3, data())
    again = copy.deepcopy(net)
    resumed = optimizer_of(again, "sgd", lr=1e-2, rounding_seed=1)
    resumed.load_state_dict(optimizer.state_dict())
    train(net, optimizer, 2, data())
    train(again, resumed, 2, data())
    assert_same(weights(again), weights(net))


def test_the_float32_copies_are_gone_after_the_step() -> None:
    net = Net().to(BF16)
    optimizer = optimizer_of(net, "adamw", rounding_seed=1)
    train(net, optimizer, 1, data())
    stepper: rounding.Rounding = optimizer.stepper  # type: ignore[attr-defined]
    assert all(s.untyped_storage().nbytes() == 4 and s.grad is None for s in stepper.stand_ins.values())


def test_float32_weights_are_not_rounded_by_mistake() -> None:
    with pytest.raises(AssertionError, match="float32"):
        optimizer_of(Net(), "adamw", rounding_seed=1)


def test_a_row_that_cannot_is_refused() -> None:
    with pytest.raises(AssertionError, match="estimated from all parameters"):
        optimizer_of(Net().to(BF16), "prodigy", rounding_seed=1)
