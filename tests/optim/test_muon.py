"""Muon for matrices, AdamW for the rest: each is the library's own, and together they are one optimizer."""

from __future__ import annotations

import copy

import pytest
import torch

from everydream.optim.composite import Composite
from everydream.optim.groups import takes_muon
from tests.optim.problem import Net, assert_same, data, optimizer_of, train, weights


@pytest.mark.parametrize(
    "shape, muon",
    [
        ((320, 320), True),
        ((10240, 1280), True),
        ((1280, 5120), True),
        ((49408, 768), False),
        ((320, 4, 3, 3), False),
        ((320,), False),
        ((), False),
    ],
)
def test_which_weights_are_muons(shape: tuple[int, ...], muon: bool) -> None:
    assert takes_muon(shape) is muon


def test_equals_the_librarys_two_classes_side_by_side() -> None:
    ours, theirs = Net(), Net()
    optimizer = optimizer_of(ours, "muon", lr=1e-3)
    matrices = [theirs.wide.weight, theirs.narrow.weight]
    others = [p for name, p in theirs.named_parameters() if name not in ("wide.weight", "narrow.weight")]
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.01, fused=True)
    train(ours, optimizer, 5, data())
    x, y = data()
    for _ in range(5):
        theirs.zero_grad()
        torch.nn.functional.mse_loss(theirs(x), y).backward()
        muon.step()
        adamw.step()
    assert_same(weights(ours), weights(theirs))


def test_state_and_groups_are_the_parts_own_also_after_loading() -> None:
    net = Net()
    optimizer = optimizer_of(net, "muon", lr=1e-3)
    assert isinstance(optimizer, Composite)
    train(net, optimizer, 1, data())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert set(optimizer.state) == set(net.parameters())
    for part in optimizer.parts:
        assert part.state is optimizer.state
        assert all(any(group is ours for ours in optimizer.param_groups) for group in part.param_groups)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[1]["lr"] = 0.0
    before = weights(net)
    train(net, optimizer, 1, data())
    assert_same(weights(net), before)  # lr 0: also weight decay is multiplied by it
