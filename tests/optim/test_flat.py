"""Laid flat, an optimizer does what it does on separate tensors, bit for bit, and keeps the same state."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from everydream.optim import factory, lion
from everydream.optim.clip import grad_holders, part_norms, scale_gradients
from everydream.optim.groups import split
from everydream.optim.partial import step_only
from everydream.optim.table import ROWS
from tests.optim.problem import Net, assert_same, data, optimizer_of, part, train, weights
from tests.optim.test_rows import EXPECTED

LYING = [name for name, row in ROWS.items() if row.elementwise]
VARIANTS = [(name, {}) for name in LYING] + [
    ("sgd", {"args": {"momentum": 0.9}}),
    ("adamw", {"args": {"amsgrad": True}}),
    ("adamw", {"args": {"foreach": True}}),
    ("lion", {"weight_decay": 0.1}),
    ("lion", {"weight_decay": 0.1, "args": {"decoupled_weight_decay": True}}),
]
variants = pytest.mark.parametrize("name, options", VARIANTS)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def pair(name: str, device: str = "cpu", **options: object) -> tuple[Net, torch.optim.Optimizer]:
    net = Net().to(device)
    return net, optimizer_of(net, name, lr=EXPECTED[name].lr, **options)


def assert_same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    def states(of: torch.optim.Optimizer) -> list[dict[str, object]]:
        return [of.state.get(p, {}) for group in of.param_groups for p in group["params"]]

    for mine, theirs in zip(states(a), states(b), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            other = theirs[key]
            if torch.is_tensor(value):
                assert torch.is_tensor(other)
                assert (value.shape, value.dtype) == (other.shape, other.dtype), key
                assert torch.equal(value, other), key
            else:
                assert value == other, key


@variants
@devices
def test_equals_the_plain_path_bit_for_bit_weights_and_state(name: str, options: dict, device: str) -> None:
    (plain, a), (flat, b) = pair(name, device, **options), pair(name, device, flat=True, **options)
    assert type(a) is type(b)
    for _ in range(5):
        losses = train(plain, a, 1, data(device=device)), train(flat, b, 1, data(device=device))
        assert losses[0] == losses[1]
        assert_same(weights(flat), weights(plain))
        assert_same_state(a, b)


@pytest.mark.parametrize("name", LYING)
def test_groups_with_and_without_decay(name: str) -> None:
    nets = [Net(), Net()]
    for net, flat in zip(nets, (False, True), strict=True):
        groups = split(net.named_parameters(), "unet", 0.5, no_decay_on_norms=True)
        train(net, factory.make(name, groups, lr=1e-2, weight_decay=0.5, flat=flat), 3, data())
    assert_same(*map(weights, nets))


@pytest.mark.parametrize("name", LYING)
def test_accumulation_and_learning_rate_changes(name: str) -> None:
    (plain, a), (flat, b) = pair(name), pair(name, flat=True)
    for net, optimizer in ((plain, a), (flat, b)):
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)
            optimizer.zero_grad()
            for seed in (1, 2, 3):
                x, y = data(seed)
                torch.nn.functional.mse_loss(net(x), y).backward()
            optimizer.step()
    assert_same(weights(flat), weights(plain))


@pytest.mark.parametrize("name, options", [v for v in VARIANTS if v[1] != {"args": {"foreach": True}}])
@pytest.mark.parametrize("saved_flat, loaded_flat", [*itertools.product([False, True], repeat=2)])
def test_state_saved_on_either_path_goes_on_on_either(
    name: str, options: dict, saved_flat: bool, loaded_flat: bool
) -> None:
    straight, a = pair(name, **options)
    train(straight, a, 6, data())
    first, before = pair(name, flat=saved_flat, **options)
    train(first, before, 3, data())
    second, after = pair(name, flat=loaded_flat, **options)
    train(second, after, 1, data(seed=9))  # state of its own, which loading replaces
    second.load_state_dict(first.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(second, after, 3, data())
    assert_same(weights(second), weights(straight))
    assert_same_state(a, after)


def test_values_written_into_the_state_count() -> None:
    """As a resume does that mends what torch's load_state_dict casts."""
    (plain, a), (flat, b) = pair("adamw"), pair("adamw", flat=True)
    for net, optimizer in ((plain, a), (flat, b)):
        train(net, optimizer, 2, data())
        for state in optimizer.state.values():
            state["exp_avg"] = torch.ones_like(state["exp_avg"])
        train(net, optimizer, 2, data())
    assert_same(weights(flat), weights(plain))


def test_parameters_of_different_age_go_on_the_plain_way() -> None:
    """A resume that trains more than before: some have state, some have none."""
    (plain, a), (flat, b) = pair("adamw"), pair("adamw", flat=True)
    for net, optimizer in ((plain, a), (flat, b)):
        train(net, optimizer, 2, data())
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["state"][0], saved["state"][3]
        optimizer.load_state_dict(saved)
        for _ in range(3):
            train(net, optimizer, 1, data())
    assert_same(weights(flat), weights(plain))
    assert_same_state(a, b)


def test_norm_and_clipping_go_over_few_tensors_a_group() -> None:
    (plain, a), (flat, b) = pair("adamw"), pair("adamw", flat=True)
    norms = []
    for net, optimizer in ((plain, a), (flat, b)):
        x, y = data()
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        parts = {"unet": grad_holders(optimizer)}
        norms.append(part_norms(parts).item())
        scale_gradients(parts, 0.5)
    assert len(grad_holders(b)) == 2 < len(grad_holders(a))  # the buffer, and narrow's 4 biases by themselves
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for p, q in zip(plain.parameters(), flat.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


def test_gradients_set_by_someone_else_count() -> None:
    (plain, a), (flat, b) = pair("adamw"), pair("adamw", flat=True)
    for net, optimizer in ((plain, a), (flat, b)):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert_same(weights(flat), weights(plain))


def test_channels_last_weights_keep_their_layout() -> None:
    (plain, a), (flat, b) = pair("adamw"), (Net().to(memory_format=torch.channels_last), None)
    b = optimizer_of(flat, "adamw", lr=EXPECTED["adamw"].lr, flat=True)
    assert flat.conv.weight.is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(plain.parameters(), flat.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    a.step()
    b.step()
    assert_same(weights(flat), weights(plain))
    assert_same_state(a, b)


def test_weights_are_views_of_one_buffer_and_stay_so() -> None:
    net, optimizer = pair("adamw", flat=True)
    handle, odd = grad_holders(optimizer)
    assert odd is net.narrow.bias
    train(net, optimizer, 2, data())
    for p in set(net.parameters()) - {odd}:
        assert p.untyped_storage().data_ptr() == handle.untyped_storage().data_ptr()
        assert p.data_ptr() % 64 == 0
        assert p.grad is not None
        assert p.grad.untyped_storage().data_ptr() == handle.grad.untyped_storage().data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [name for name in ROWS if name not in LYING])
def test_others_are_refused(name: str) -> None:
    with pytest.raises(AssertionError, match="cannot be laid flat"):
        optimizer_of(Net(), name, flat=True)
    assert not factory.flat_pays(name, part(Net()), "cpu", 1)


def test_it_cannot_be_updated_in_part() -> None:
    _, optimizer = pair("adamw", flat=True)
    with pytest.raises(AssertionError, match="in part"):
        step_only(optimizer)


def test_it_pays_on_one_cpu_process_with_small_tensors() -> None:
    groups = part(Net())
    assert factory.flat_pays("adamw", groups, "cpu", 1)
    assert not factory.flat_pays("adamw", groups, "cuda", 1)
    assert not factory.flat_pays("adamw", groups, "cpu", 2)
    assert not factory.flat_pays("some.Class", groups, "cpu", 1)
    assert not factory.flat_pays("adamw", split({"a.weight": (1000, 1000)}.items(), "unet"), "cpu", 1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("block", [7, 2**18])
def test_lions_blocks_equal_the_library(weight_decay: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lion_pytorch.lion_pytorch import update_fn

    monkeypatch.setattr(lion, "BLOCK", block)
    rng = torch.Generator().manual_seed(0)
    p, m = torch.randn(1000, generator=rng), torch.zeros(1000)
    q, n = p.clone(), m.clone()
    for _ in range(5):
        g = torch.randn(1000, generator=rng)
        update_fn(p, g, m, 1e-3, weight_decay, 0.9, 0.99)
        lion.update_in_blocks(q, g, n, 1e-3, weight_decay, 0.9, 0.99)
    assert torch.equal(p, q)
    assert torch.equal(m, n)
