"""Every row of the table, no exclusions: a row without an expectation here fails.

Exact class, dtype of the state after a step, loss falls, state saved and loaded exactly.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from dataclasses import dataclass

import pytest
import torch

from everydream.optim import factory, groups, schedules, table
from everydream.optim.partial import step_only
from tests.optim.problem import Net, assert_same, data, optimizer_of, train, weights

F32, U8 = torch.float32, torch.uint8


@dataclass(frozen=True)
class Expected:
    cls: str
    lr: float  # at which the small problem's loss falls, by a factor of 4 in 100 steps
    big: dict[str, torch.dtype]  # state tensors of a matrix of 8,192 elements
    small: dict[str, torch.dtype]  # of a bias
    defaults: dict[str, object]  # as the optimizer holds them in its first group


ADAM = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
LION = {"lr": 1e-7, "betas": (0.9, 0.99), "weight_decay": 0.0}
ADAM32 = {"step": F32, "exp_avg": F32, "exp_avg_sq": F32}
ADAM8 = {"state1": U8, "state2": U8, "qmap1": F32, "qmap2": F32, "absmax1": F32, "absmax2": F32}
LION8 = {"state1": U8, "qmap1": F32, "absmax1": F32}
PRODIGY = {"s": F32, "p0": F32, "exp_avg": F32, "exp_avg_sq": F32}

EXPECTED = {
    "adamw": Expected("torch.optim.adamw.AdamW", 3e-3, ADAM32, ADAM32, {**ADAM, "fused": True}),
    "adamw8bit": Expected("bitsandbytes.optim.adamw.AdamW8bit", 3e-3, ADAM8, {"state1": F32, "state2": F32}, ADAM),
    "lion": Expected("lion_pytorch.lion_pytorch.Lion", 1e-3, {"exp_avg": F32}, {"exp_avg": F32}, LION),
    "lion8bit": Expected("bitsandbytes.optim.lion.Lion8bit", 1e-3, LION8, {"state1": F32}, LION),
    "paged_adamw8bit": Expected(
        "bitsandbytes.optim.adamw.PagedAdamW8bit", 3e-3, ADAM8, {"state1": F32, "state2": F32}, ADAM
    ),
    "paged_lion8bit": Expected("bitsandbytes.optim.lion.PagedLion8bit", 1e-3, LION8, {"state1": F32}, LION),
    "ademamix8bit": Expected(
        "bitsandbytes.optim.ademamix.AdEMAMix8bit",
        3e-3,
        ADAM8,
        {"state1": F32, "state2": F32},
        {**ADAM, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0},
    ),
    "adafactor": Expected(
        "torch.optim.Adafactor",
        3e-2,
        {"step": F32, "row_var": F32, "col_var": F32},
        {"step": F32, "variance": F32},
        {"lr": 3e-5, "weight_decay": 0.0, "eps": (None, 1e-3)},
    ),
    "muon": Expected(
        "everydream.optim.muon.MuonWithAdamW",
        3e-3,
        {"momentum_buffer": F32},
        ADAM32,
        {"lr": 1e-6, "weight_decay": 0.01, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"},
    ),
    "sgd": Expected(
        "torch.optim.sgd.SGD", 0.3, {}, {}, {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0, "fused": True}
    ),
    "prodigy": Expected(
        "prodigyopt.prodigy.Prodigy", 1.0, PRODIGY, PRODIGY, {**ADAM, "lr": 1.0, "weight_decay": 0.0, "d0": 1e-6}
    ),
    "schedulefree_adamw": Expected(
        "schedulefree.adamw_schedulefree.AdamWScheduleFree",
        1e-2,
        {"z": F32, "exp_avg_sq": F32},
        {"z": F32, "exp_avg_sq": F32},
        {**ADAM, "lr": 5e-6, "weight_decay": 0.0, "train_mode": True},
    ),
}

rows = pytest.mark.parametrize("name", table.ROWS)
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.parametrize("name", [name for name, row in table.ROWS.items() if row.package == "bitsandbytes"])
@pytest.mark.parametrize("rounding", [False, True])
def test_bitsandbytes_waits_for_the_card_only_where_its_state_is_paged(
    name: str, rounding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.optim import optimizer as module

    waits: list[torch.Tensor] = []
    monkeypatch.setattr(module, "sync_gpu", wait := waits.append)
    net = Net().to(torch.bfloat16) if rounding else Net()
    optimizer = optimizer_of(net, name, rounding_seed=0 if rounding else None)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    step_only(optimizer)([net.wide.weight])
    assert bool(waits) == name.startswith("paged_")
    assert module.sync_gpu is wait, "as it was"


def test_every_row_has_an_expectation_and_every_expectation_a_row() -> None:
    assert set(EXPECTED) == set(table.ROWS)


@rows
@devices
def test_class_and_defaults_are_exactly_these(name: str, device: str) -> None:
    optimizer = optimizer_of(Net().to(device), name)
    assert f"{type(optimizer).__module__}.{type(optimizer).__name__}" == EXPECTED[name].cls
    group = optimizer.param_groups[0]
    assert {key: group[key] for key in EXPECTED[name].defaults} == EXPECTED[name].defaults


@rows
@devices
def test_state_has_exactly_these_tensors_and_dtypes_after_a_step(name: str, device: str) -> None:
    net = Net().to(device)
    optimizer = optimizer_of(net, name)
    train(net, optimizer, 1, data(device=device))
    for param, expected in ((net.wide.weight, EXPECTED[name].big), (net.wide.bias, EXPECTED[name].small)):
        tensors = {key: value.dtype for key, value in optimizer.state[param].items() if torch.is_tensor(value)}
        assert tensors == expected


@rows
@devices
def test_loss_falls(name: str, device: str) -> None:
    net = Net().to(device)
    losses = train(net, optimizer_of(net, name, lr=EXPECTED[name].lr), 100, data(device=device))
    assert losses[-1] < losses[0] / 4, (losses[0], losses[-1])


@rows
@devices
def test_saved_and_loaded_is_as_uninterrupted(name: str, device: str) -> None:
    """torch's own state_dict, as Accelerate's `prepare` uses it; tests/training walks the checkpoint's form."""
    lr, batch = EXPECTED[name].lr, data(device=device)
    straight = Net().to(device)
    train(straight, optimizer_of(straight, name, lr=lr), 6, batch)

    first = Net().to(device)
    before = optimizer_of(first, name, lr=lr)
    train(first, before, 3, batch)
    second = Net(seed=5).to(device)
    second.load_state_dict(first.state_dict())
    after = optimizer_of(second, name, lr=lr)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(second, after, 3, batch)
    assert_same(weights(second), weights(straight))


@rows
def test_row_is_what_the_table_says_it_is(name: str) -> None:
    row = table.ROWS[name]
    module, _, cls = row.cls.rpartition(".")
    assert getattr(importlib.import_module(module), cls).__name__ == EXPECTED[name].cls.rpartition(".")[2]
    assert set(row.hyperparameters) <= set(table.HYPERPARAMETERS)
    assert set(row.defaults) == {"lr", *row.hyperparameters}
    optimizer = optimizer_of(Net(), name)
    assert factory.has_two_sets(optimizer) == (name == "schedulefree_adamw")


@rows
def test_given_hyperparameters_reach_the_optimizer(name: str) -> None:
    row = table.ROWS[name]
    betas = (0.8, 0.95, 0.99)[: len(row.defaults.get("betas", ()))] or None
    net = Net()
    optimizer = optimizer_of(net, name, lr=2e-5, betas=betas, epsilon=1e-6, weight_decay=0.05)
    for group in optimizer.param_groups:
        assert group["lr"] == 2e-5
        assert group["weight_decay"] == 0.05
        if "betas" in row.hyperparameters and "betas" in group:  # Muon's own groups have a momentum instead
            assert tuple(group["betas"]) == betas
        if "epsilon" in row.hyperparameters and "momentum" not in group:
            assert group["eps"] == 1e-6


@rows
def test_groups_without_decay_do_not_decay(name: str) -> None:
    """With zero gradients only weight decay moves a weight."""
    net = Net()
    parts = groups.split(net.named_parameters(), "unet", 0.5, no_decay_on_norms=True)
    optimizer = factory.make(name, parts, lr=0.1, weight_decay=0.5)
    with torch.no_grad():
        net.norm.bias.fill_(1.0)
    before = weights(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    factory.set_mode(optimizer, training=False)
    for pname, p in net.named_parameters():
        if p.ndim <= 1:
            assert torch.equal(p, before[pname]), pname
        elif name != "prodigy":  # its first steps are lr × d0 = 1e-7 of a weight
            assert not torch.equal(p, before[pname]), pname


@rows
def test_lr_is_read_back_from_the_optimizer(name: str) -> None:
    net = Net()
    optimizer = optimizer_of(net, name, lr=0.5)
    base = schedules.base_lrs(optimizer)
    shown = schedules.set_lr(optimizer, base, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125] * len(base)
    assert shown == (0.125e-6 if name == "prodigy" else 0.125)


@rows
def test_no_row_warns_or_needs_a_second_word(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = Net()
        train(net, optimizer_of(net, name), 2, data())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["paged_adamw8bit", "paged_lion8bit"])
def test_paged_state_is_paged_on_cuda(name: str) -> None:
    big = torch.nn.Linear(1024, 1024, device="cuda")
    optimizer = optimizer_of(big, name)
    big(torch.ones(1, 1024, device="cuda")).sum().backward()
    optimizer.step()
    assert optimizer.state[big.weight]["state1"].is_paged


@pytest.mark.parametrize("paged, plain", [("paged_adamw8bit", "adamw8bit"), ("paged_lion8bit", "lion8bit")])
def test_paged_rows_run_on_a_cpu_as_the_plain_ones_and_say_so(paged: str, plain: str) -> None:
    results = []
    for name in (paged, plain):
        net = Net()
        train(net, optimizer_of(net, name, lr=1e-3), 3, data())
        results.append(weights(net))
    assert_same(*results)
    assert any(plain in note for note in factory.check(paged, {}, device="cpu"))
    assert factory.check(paged, {}, device="cuda") == []
