"""adamw, adamw8bit and lion are the libraries' own, step by step and bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import lion_pytorch
import pytest
import torch

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
