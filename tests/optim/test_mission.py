"""adamw, adamw8bit and lion are the libraries' own, step by step and bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import lion_pytorch
import pytest
import torch

from everydream.optim import factory
from everydream.optim.table import ROWS
from tests.optim.problem import Net, assert_same, data, optimizer_of, train, weights

# Written out, not read from the table: these numbers are promised to users.
LIBRARY: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, fused=True),
    "adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
    "lion": lambda p: lion_pytorch.Lion(p, lr=1e-7, betas=(0.9, 0.99), weight_decay=0.0),
}
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.parametrize("name", LIBRARY)
@devices
def test_twenty_steps_equal_the_librarys_own_class_bit_for_bit(name: str, device: str) -> None:
    ours, theirs = Net().to(device), Net().to(device)
    start = weights(ours)
    optimizer, reference = optimizer_of(ours, name), LIBRARY[name](list(theirs.parameters()))
    assert type(optimizer) is type(reference)
    for _ in range(20):
        train(ours, optimizer, 1, data(device=device))
        train(theirs, reference, 1, data(device=device))
        assert_same(weights(ours), weights(theirs))
    assert all(not torch.equal(start[key], moved) for key, moved in weights(ours).items())


@pytest.mark.parametrize("name", LIBRARY)
@devices
def test_implementation_flags_are_the_same(name: str, device: str) -> None:
    ours, theirs = Net().to(device), Net().to(device)
    optimizer, reference = optimizer_of(ours, name), LIBRARY[name](list(theirs.parameters()))

    def flags(of: torch.optim.Optimizer) -> list[dict[str, object]]:
        return [{key: value for key, value in group.items() if key != "params"} for group in of.param_groups]

    assert flags(optimizer) == flags(reference)


@pytest.mark.parametrize("name", LIBRARY)
def test_documented_defaults(name: str) -> None:
    documented = {
        "adamw": {"lr": 1e-6, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01},
        "adamw8bit": {"lr": 1e-6, "betas": (0.9, 0.999), "epsilon": 1e-8, "weight_decay": 0.01},
        "lion": {"lr": 1e-7, "betas": (0.9, 0.99), "weight_decay": 0.0},
    }
    assert dict(ROWS[name].defaults) == documented[name]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@devices
def test_a_step_can_be_skipped_on_the_device(name: str, device: str) -> None:
    """What `can_skip_on_device` promises: found_inf of 1 leaves weights and state as they were."""
    assert ROWS[name].can_skip_on_device
    net = Net().to(device)
    optimizer = optimizer_of(net, name, lr=1e-2)
    train(net, optimizer, 2, data(device=device))
    before, step = weights(net), [state.get("step", torch.zeros(())).clone() for state in optimizer.state.values()]
    factory.skip_where(optimizer, torch.ones((), device=device))
    for p in net.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert_same(weights(net), before)
    assert [state.get("step", torch.zeros(())) for state in optimizer.state.values()] == step
    factory.skip_where(optimizer, torch.zeros((), device=device))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(not torch.equal(before[key], moved) for key, moved in weights(net).items())
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_only_rows_whose_class_looks_at_found_inf_say_so() -> None:
    assert {name for name, row in ROWS.items() if row.can_skip_on_device} == {"adamw", "sgd"}
