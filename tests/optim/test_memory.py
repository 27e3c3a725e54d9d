"""The bytes that --dry_run announces are those that the optimizer then holds."""

from __future__ import annotations

import pytest
import torch

from everydream.optim.memory import state_bytes
from everydream.optim.table import ROWS
from tests.optim.problem import Net, data, optimizer_of, train


def held(optimizer: torch.optim.Optimizer) -> int:
    """Without numbers (counts of steps) and bitsandbytes' shared tables."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if torch.is_tensor(value) and value.dim() and not key.startswith("qmap")
    )


@pytest.mark.parametrize("name, args", [*((name, {}) for name in ROWS), ("sgd", {"momentum": 0.9})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_what_the_optimizer_holds_after_a_step(name: str, args: dict, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not ROWS[name].may_round:
        return  # refused, which test_rounding.py shows
    net = Net().to(dtype)
    for p in net.parameters():
        p.data += 0.01  # Prodigy does not keep a start of zeros
    optimizer = optimizer_of(net, name, args=args, rounding_seed=1 if dtype is torch.bfloat16 else None)
    train(net, optimizer, 1, data())
    assert state_bytes(name, [p.shape for p in net.parameters()], args) == held(optimizer)


def test_a_class_of_ones_own_is_not_known() -> None:
    assert state_bytes("some.Class", [(10, 10)]) is None
