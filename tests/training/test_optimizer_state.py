"""An optimizer saved to a file and loaded into a fresh one goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from everydream.errors import CheckpointError, ConfigError
from everydream.optim import factory, table
from everydream.training import optimizer_state
from everydream.training.storage import write_atomically
from everydream.training.tensorfile import Tensors, as_bytes, read_tensors
from tests.optim.problem import Net, assert_same, data, part, train, weights

LR = {"sgd": 0.3, "prodigy": 1.0, "adafactor": 3e-2}  # else 1e-3: large enough that three steps change every weight
DTYPES = [torch.float32, torch.bfloat16]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

Make = Callable[[Net], Optimizer]


def row(name: str, **options: Any) -> Make:
    options.setdefault("lr", LR.get(name, 1e-3))
    return lambda net: factory.make(name, part(net), device=next(net.parameters()).device, **options)


def save(folder: Path, net: Net, optimizer: Optimizer) -> None:
    tensors, described = optimizer_state.capture({"unet": optimizer}, {"unet": dict(net.named_parameters())})
    write_atomically(folder / "optimizer.safetensors", Tensors(tensors))
    (folder / "state.json").write_text(json.dumps(described, allow_nan=False))


def load(folder: Path, net: Net, optimizer: Optimizer, **options: Any) -> list[str]:
    return optimizer_state.restore(
        {"unet": optimizer},
        {"unet": dict(net.named_parameters())},
        read_tensors(folder / "optimizer.safetensors"),
        json.loads((folder / "state.json").read_text()),
        **options,
    )


def net_of(dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Net:
    return Net(seed).to(device=device, dtype=dtype)


def assert_exact(after: Optimizer, net: Net, before: Optimizer, old: Net) -> None:
    """Every value of the state and the groups: type, dtype, device, layout and bits; shared memory is shared again."""
    pairs = list(zip(net.parameters(), old.parameters(), strict=True))
    assert len(after.state) == len(before.state)
    for new, former in pairs:
        assert_equal(after.state.get(new, {}), before.state.get(former, {}))
    for a, b in zip(after.param_groups, before.param_groups, strict=True):
        assert_equal({k: v for k, v in a.items() if k != "params"}, {k: v for k, v in b.items() if k != "params"})

    def sharing(optimizer: Optimizer, parameters: list[torch.nn.Parameter]) -> list[int]:
        values = [v for p in parameters for v in optimizer.state.get(p, {}).values() if torch.is_tensor(v)]
        places = [value.data_ptr() for value in values]
        return [places.index(place) for place in places]

    assert sharing(after, [new for new, _ in pairs]) == sharing(before, [former for _, former in pairs])


def assert_equal(a: Any, b: Any) -> None:
    assert type(a) is type(b), (a, b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
        assert a.numel() <= 1 or a.stride() == b.stride()
        assert as_bytes(a.detach().cpu()) == as_bytes(b.detach().cpu())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    else:
        assert a == b


def assert_resumes_exactly(folder: Path, make: Make, dtype: torch.dtype, device: str = "cpu") -> None:
    batch = data(device=device)
    straight = net_of(dtype, device)
    train(straight, make(straight), 6, batch)

    old = net_of(dtype, device)
    before = make(old)
    train(old, before, 3, batch)
    save(folder, old, before)

    new = net_of(dtype, device, seed=5)
    new.load_state_dict(old.state_dict())
    after = make(new)
    assert load(folder, new, after) == []
    assert_exact(after, new, before, old)
    assert_same(weights(new), weights(old))
    train(new, after, 3, batch)
    assert_same(weights(new), weights(straight))


@pytest.mark.parametrize("name", table.ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@devices
def test_every_row_resumes_bit_for_bit(name: str, dtype: torch.dtype, device: str, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, row(name), dtype, device)


def plain(cls: Callable[..., Optimizer], **options: Any) -> Make:
    return lambda net: cls(net.parameters(), **options)


def bitsandbytes_adamw(net: Net) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW(net.parameters(), lr=1e-3)


def lion_decoupled(net: Net) -> Optimizer:
    import lion_pytorch

    return lion_pytorch.Lion(net.parameters(), lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True)


OTHERS: dict[str, Make] = {
    "sgd with momentum": row("sgd", args={"momentum": 0.9, "nesterov": True}),
    "adam amsgrad, unfused": plain(torch.optim.Adam, lr=1e-3, amsgrad=True),
    "adamw with lr as a tensor": plain(torch.optim.AdamW, lr=torch.tensor(1e-3), fused=True),
    "adamw capturable step": plain(torch.optim.AdamW, lr=1e-3, foreach=True),
    "ademamix with schedules": row("ademamix8bit", args={"t_alpha": 10, "t_beta3": 10}),
    "prodigy, sliced": row("prodigy", args={"slice_p": 11, "safeguard_warmup": True}),
    "schedulefree with warm-up": row("schedulefree_adamw", args={"warmup_steps": 4}),
    "bitsandbytes 32-bit": bitsandbytes_adamw,
    "lion, decoupled decay": lion_decoupled,
    "rprop, a class of the user's": row("torch.optim.Rprop"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_optimizers_resume_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, OTHERS[name], dtype)


def test_attributes_outside_state_dict_come_back(tmp_path: Path) -> None:
    """lion-pytorch divides its decoupled decay by the lr it was built with, which state_dict() does not hold."""
    old, new = net_of(torch.float32), net_of(torch.float32)
    before, after = lion_decoupled(old), lion_decoupled(new)
    vars(before)["_init_lr"] = 0.25
    train(old, before, 1, data())
    save(tmp_path, old, before)
    assert load(tmp_path, new, after) == []
    assert (vars(after)["_init_lr"], vars(after)["decoupled_wd"]) == (0.25, True)


def test_shared_maps_are_stored_once(tmp_path: Path) -> None:
    net = net_of(torch.float32)
    optimizer = row("adamw8bit")(net)
    train(net, optimizer, 1, data())
    save(tmp_path, net, optimizer)
    maps = [name for name in read_tensors(tmp_path / "optimizer.safetensors") if "qmap" in name]
    assert sorted(name.rpartition("/")[2] for name in maps) == ["qmap1", "qmap2"]


def test_state_is_named_by_parameter(tmp_path: Path) -> None:
    net = net_of(torch.float32)
    optimizer = row("adamw")(net)
    train(net, optimizer, 1, data())
    save(tmp_path, net, optimizer)
    names = {f"unet/{name}/{key}" for name, _ in net.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")}
    assert set(read_tensors(tmp_path / "optimizer.safetensors")) == names


def test_state_follows_the_weights_layout(tmp_path: Path) -> None:
    """Fused kernels go through weights and state in memory order, so both must have the same."""
    old = net_of(torch.float32).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = row("adamw")(old)
    train(old, before, 1, data())
    save(tmp_path, old, before)
    new = net_of(torch.float32)
    after = row("adamw")(new)
    load(tmp_path, new, after)
    state = after.state[new.conv.weight]["exp_avg"]
    assert state.stride() == new.conv.weight.stride() != before.state[old.conv.weight]["exp_avg"].stride()
    assert torch.equal(state, before.state[old.conv.weight]["exp_avg"])


def test_schedule_free_keeps_its_training_weights_exactly(tmp_path: Path) -> None:
    """Its own eval() and train() round; the model that is saved has the averaged weights, the state the others."""
    straight, old, new = (net_of(torch.float32) for _ in range(3))
    make = row("schedulefree_adamw")
    train(straight, make(straight), 6, data())
    before = make(old)
    train(old, before, 3, data())
    save(tmp_path, old, before)
    factory.set_mode(before, training=False)
    new.load_state_dict(old.state_dict())  # what model/ holds
    after = make(new)
    assert load(tmp_path, new, after) == []
    train(new, after, 3, data())
    assert_same(weights(new), weights(straight))


def saved_by(folder: Path, name: str, **options: Any) -> Net:
    net = net_of(torch.float32)
    optimizer = row(name, **options)(net)
    train(net, optimizer, 2, data())
    save(folder, net, optimizer)
    return net


def test_settings_changed_on_purpose_win(tmp_path: Path) -> None:
    saved_by(tmp_path, "prodigy", weight_decay=0.0)
    for changed, decay in ((False, 0.0), (True, 0.5)):
        net = net_of(torch.float32)
        optimizer = row("prodigy", weight_decay=0.5)(net)
        assert load(tmp_path, net, optimizer, changed=changed) == []
        group = optimizer.param_groups[0]
        assert (group["weight_decay"], group["k"]) == (decay, 2)  # a counter is no setting


def test_divided_into_groups_otherwise_keeps_counters_and_state(tmp_path: Path) -> None:
    old = saved_by(tmp_path, "schedulefree_adamw", weight_decay=0.1)
    net = net_of(torch.float32)
    groups = part(net, weight_decay=0.1, no_decay_on_norms=True)
    optimizer = factory.make("schedulefree_adamw", groups, lr=1e-3, weight_decay=0.1)
    assert load(tmp_path, net, optimizer, changed=True) == []
    assert [(group["weight_decay"], group["k"]) for group in optimizer.param_groups] == [(0.0, 2), (0.1, 2)]
    assert len(optimizer.state) == len(list(old.parameters()))


def test_another_optimizer_starts_afresh_and_says_so(tmp_path: Path) -> None:
    saved_by(tmp_path, "lion")
    net = net_of(torch.float32)
    optimizer = row("adamw")(net)
    [note] = load(tmp_path, net, optimizer)
    assert "lion_pytorch.lion_pytorch.Lion" in note and "torch.optim.adamw.AdamW starts afresh" in note
    assert not optimizer.state


def test_parameters_trained_anew_or_no_longer_are_said(tmp_path: Path) -> None:
    def some(net: Net, *names: str) -> Optimizer:
        return torch.optim.AdamW([p for name, p in net.named_parameters() if name.startswith(names)], lr=1e-3)

    old, new = net_of(torch.float32), net_of(torch.float32)
    before, after = some(old, "conv", "norm"), some(new, "conv", "wide")
    train(old, before, 1, data())
    save(tmp_path, old, before)
    anew, no_longer = load(tmp_path, new, after)
    assert "2 parameters are trained anew" in anew and "wide.bias" in anew
    assert "2 parameters are no longer trained" in no_longer and "norm.bias" in no_longer
    assert set(after.state) == {new.conv.weight, new.conv.bias}


def test_a_part_that_was_not_trained_is_said() -> None:
    net = net_of(torch.float32)
    notes = optimizer_state.restore({"unet": row("adamw")(net)}, {"unet": dict(net.named_parameters())}, {}, {})
    assert notes == ["unet was not trained before: its optimizer starts afresh"]


def test_what_only_pickle_could_store_is_refused(tmp_path: Path) -> None:
    net = net_of(torch.float32)
    optimizer = row("adamw")(net)
    train(net, optimizer, 1, data())
    optimizer.state[net.conv.weight]["callback"] = print
    with pytest.raises(ConfigError, match=r"unet/conv\.weight/callback is a builtins"):
        save(tmp_path, net, optimizer)


def test_a_missing_tensor_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    net = saved_by(tmp_path, "adamw")
    tensors = read_tensors(tmp_path / "optimizer.safetensors")
    del tensors["unet/conv.weight/exp_avg"]
    described = json.loads((tmp_path / "state.json").read_text())
    with pytest.raises(CheckpointError, match=r"unet/conv\.weight/exp_avg is missing"):
        optimizer_state.restore({"unet": row("adamw")(net)}, {"unet": dict(net.named_parameters())}, tensors, described)
