"""Every row, on every path it can take, goes on from a checkpoint's form bit for bit, on any other path too."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from everydream.optim.fused import FusedBackward
from everydream.optim.table import ROWS
from everydream.training.optimizer_state import capture, restore
from tests.optim.problem import Net, assert_same, data, optimizer_of, train, weights
from tests.optim.test_rows import EXPECTED

PATHS = {
    "plain": lambda row: True,
    "bf16": lambda row: row.may_round,
    "flat": lambda row: row.elementwise,
    "fused backward": lambda row: row.may_fuse,
    "bf16, fused backward": lambda row: row.may_round and row.may_fuse,
}
WALK = [(name, path) for name, row in ROWS.items() for path, can in PATHS.items() if can(row)]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def start(
    name: str, path: str, device: str, seed: int = 0, layout: torch.memory_format = torch.contiguous_format
) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(seed).to(device, torch.bfloat16 if "bf16" in path else torch.float32)
    net.conv.to(memory_format=layout)  # type: ignore[call-overload]
    options: dict[str, Any] = {"lr": EXPECTED[name].lr, "flat": path == "flat"}
    return net, optimizer_of(net, name, rounding_seed=1 if "bf16" in path else None, **options)


def run(net: Net, optimizer: torch.optim.Optimizer, path: str, steps: int) -> None:
    device = str(next(net.parameters()).device)
    if "fused" not in path:
        train(net, optimizer, steps, data(device=device))
        return
    fused = FusedBackward({"unet": optimizer}, {"unet": list(net.parameters())})
    for _ in range(steps):
        fused.begin()
        x, y = data(device=device)
        torch.nn.functional.mse_loss(net(x.to(net.conv.weight.dtype)).float(), y).backward()
    fused.remove()


def through_a_checkpoint(
    net: Net,
    optimizer: torch.optim.Optimizer,
    name: str,
    path: str,
    device: str,
    layout: torch.memory_format = torch.contiguous_format,
) -> tuple[Net, torch.optim.Optimizer]:
    tensors, saved = capture({"unet": optimizer}, {"unet": dict(net.named_parameters())})
    tensors = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    saved = json.loads(json.dumps(saved))
    after, again = start(name, path, device, seed=5, layout=layout)
    run(after, again, path, 1)  # state of its own, which a resume replaces
    after.load_state_dict(net.state_dict())
    assert restore({"unet": again}, {"unet": dict(after.named_parameters())}, tensors, saved) == []
    return after, again


@pytest.mark.parametrize("name, path", WALK)
@layouts
@devices
def test_three_steps_and_three_more_are_six(name: str, path: str, layout: torch.memory_format, device: str) -> None:
    straight, optimizer = start(name, path, device, layout=layout)
    run(straight, optimizer, path, 6)
    net, optimizer = start(name, path, device, layout=layout)
    run(net, optimizer, path, 3)
    net, optimizer = through_a_checkpoint(net, optimizer, name, path, device, layout)
    run(net, optimizer, path, 3)
    assert_same(weights(net), weights(straight))


@pytest.mark.parametrize("name, path", WALK)
@devices
def test_weights_keep_their_layout_and_state_has_it_too(name: str, path: str, device: str) -> None:
    """Kernels for a card go through weights and state in one line: another order would be other weights' state."""
    net, optimizer = start(name, path, device, layout=torch.channels_last)
    before = net.conv.weight.stride()
    run(net, optimizer, path, 1)
    net, optimizer = through_a_checkpoint(net, optimizer, name, path, device, torch.channels_last)
    run(net, optimizer, path, 1)
    assert net.conv.weight.stride() == before
    if "flat" not in path:
        same_shape = [v for v in optimizer.state[net.conv.weight].values()
                      if isinstance(v, torch.Tensor) and v.shape == net.conv.weight.shape]  # fmt: skip
        assert all(value.stride() == before for value in same_shape)


@pytest.mark.parametrize(
    "name, before, after",
    [(n, a, b) for n, a in WALK for m, b in WALK if n == m and a != b and ("bf16" in a) == ("bf16" in b)],
)
def test_the_path_may_change_on_resume(name: str, before: str, after: str) -> None:
    straight, optimizer = start(name, "bf16" if "bf16" in before else "plain", "cpu")
    run(straight, optimizer, "plain", 6)
    net, optimizer = start(name, before, "cpu")
    run(net, optimizer, before, 3)
    net, optimizer = through_a_checkpoint(net, optimizer, name, after, "cpu")
    run(net, optimizer, after, 3)
    assert_same(weights(net), weights(straight))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.elementwise])
def test_the_saved_form_is_that_of_the_plain_path(name: str) -> None:
    forms = []
    for path in ("plain", "flat", "fused backward"):
        net, optimizer = start(name, path, "cpu")
        run(net, optimizer, path, 2)
        tensors, saved = capture({"unet": optimizer}, {"unet": dict(net.named_parameters())})
        for leaf in saved["unet"]["leaves"]:
            # torch's note to itself that it has checked the devices before a first step
            leaf["attributes"].pop("_need_device_dtype_check_for_fused", None)
        forms.append((tensors, saved))
    for tensors, saved in forms[1:]:
        assert saved == forms[0][1]
        assert_same(tensors, forms[0][0])
