from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from everydream.errors import CheckpointError
from everydream.optim import ema as ema_module
from everydream.optim.ema import EMA, NoEMA, ema_decay

DTYPES = [torch.float32, torch.bfloat16]


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=rng).to(dtype).requires_grad_()
        for name, shape in (("a", (3, 4)), ("b", (5,)), ("c", (2, 2, 2)))
    }


def train(parameters: dict[str, Tensor], step: int) -> None:
    with torch.no_grad():
        for i, value in enumerate(parameters.values()):
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(value))


def bits(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_decay_warms_up_and_stops_at_its_value() -> None:
    values = [ema_decay(step, 0.99) for step in range(2000)]
    assert values[0] == 0.1 and values[1] == 2 / 11
    assert values == sorted(values)
    assert values[-1] == 0.99


def test_an_interval_keeps_the_same_memory() -> None:
    assert ema_decay(10_000, 0.999, 8) == 0.999**8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interval", [1, 3])
def test_the_average_equals_its_recursion_in_float64(dtype: torch.dtype, interval: int) -> None:
    parameters = weights(dtype)
    ema = EMA(parameters, 0.9, interval)
    expected = {name: value.detach().double() for name, value in parameters.items()}
    for step in range(1, 31):
        train(parameters, step)
        ema.update(step)
        if step % interval == 0:
            decay = min(0.9, (1 + step) / (10 + step)) ** interval
            for name, value in parameters.items():
                expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
    for name, average in ema.tensors().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_weights_that_stand_still_are_their_own_average() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.999)
    for step in range(1, 20):
        ema.update(step)
    assert equal(ema.tensors(), bits(parameters))


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_an_update_is_one_fused_call_in_place() -> None:
    ema = EMA(weights(), 0.9, interval=2)
    with Calls() as calls:
        ema.update(1)
        assert calls.names == []
        ema.update(2)
    assert [name for name in calls.names if name != "detach"] == ["_foreach_lerp_"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_applied_puts_the_average_in_and_the_weights_back_to_the_bit(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    ema = EMA(parameters, 0.9)
    train(parameters, 1)
    ema.update(1)
    before, average, places = bits(parameters), bits(ema.tensors()), [p.data_ptr() for p in parameters.values()]
    with ema.applied():
        assert equal(bits(parameters), {name: value.to(dtype) for name, value in average.items()})
        assert [p.data_ptr() for p in parameters.values()] == places
    assert equal(bits(parameters), before) and equal(ema.tensors(), average)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_inside_applied_still_restores(dtype: torch.dtype) -> None:
    parameters = weights(dtype)
    ema = EMA(parameters, 0.9)
    train(parameters, 1)
    before, average = bits(parameters), bits(ema.tensors())
    with pytest.raises(RuntimeError, match="out of memory"), ema.applied():
        raise RuntimeError("out of memory")
    assert equal(bits(parameters), before) and equal(ema.tensors(), average)
    ema.update(1)


def test_an_error_half_way_in_still_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = weights()
    ema = EMA(parameters, 0.9)
    train(parameters, 1)
    before, average = bits(parameters), bits(ema.tensors())
    real, calls = ema_module._exchange, []

    def failing(a: Tensor, b: Tensor) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        real(a, b)

    monkeypatch.setattr(ema_module, "_exchange", failing)
    with pytest.raises(RuntimeError, match="out of memory"), ema.applied():
        pass
    assert len(calls) == 3 and equal(bits(parameters), before) and equal(ema.tensors(), average)


def test_the_average_is_not_read_nor_moved_while_it_is_in_the_model() -> None:
    ema = EMA(weights(), 0.9)
    with ema.applied():
        with pytest.raises(AssertionError):
            ema.tensors()
        with pytest.raises(AssertionError):
            ema.update(1)
        with pytest.raises(AssertionError), ema.applied():
            pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interval", [1, 2])
def test_six_steps_are_three_a_resume_and_three(dtype: torch.dtype, interval: int) -> None:
    def run(parameters: dict[str, Tensor], ema: EMA, steps: range) -> None:
        for step in steps:
            train(parameters, step)
            ema.update(step)

    whole = weights(dtype)
    straight = EMA(whole, 0.9, interval)
    run(whole, straight, range(1, 7))

    first = weights(dtype)
    interrupted = EMA(first, 0.9, interval)
    run(first, interrupted, range(1, 4))
    second = {name: value.detach().clone().requires_grad_() for name, value in first.items()}
    resumed = EMA(second, 0.9, interval)
    resumed.load(bits(interrupted.tensors()))
    run(second, resumed, range(4, 7))
    assert equal(resumed.tensors(), straight.tensors())


def test_the_average_never_shares_memory_with_the_weights_or_what_was_loaded() -> None:
    parameters = weights()
    ema = EMA(parameters, 0.9)
    loaded = bits(ema.tensors())
    ema.load(loaded)
    for name, average in ema.tensors().items():
        assert average.data_ptr() not in (parameters[name].data_ptr(), loaded[name].data_ptr())


def test_an_average_of_other_weights_is_refused() -> None:
    good = bits(EMA(weights(), 0.9).tensors())
    for wrong in (
        {name: value for name, value in good.items() if name != "b"},
        {**good, "d": torch.zeros(1)},
        {**good, "b": torch.zeros(6)},
        {**good, "b": good["b"].bfloat16()},
    ):
        ema = EMA(weights(), 0.9)
        with pytest.raises(CheckpointError, match=r"ema\.safetensors: [bd] is"):
            ema.load(wrong)
        assert equal(ema.tensors(), good)


def test_no_ema_has_every_method_of_ema_and_does_nothing() -> None:
    for name, method in inspect.getmembers(EMA, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(method) == inspect.signature(getattr(NoEMA, name)), name
    off = NoEMA()
    off.update(1)
    off.load({})
    with off.applied():
        assert off.tensors() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_on_the_cpu_equals_one_on_the_gpu(dtype: torch.dtype) -> None:
    averages = []
    for device in (None, "cpu"):
        parameters = {name: value.detach().cuda() for name, value in weights(dtype).items()}
        ema = EMA(parameters, 0.9, device=device)
        for step in range(1, 6):
            train({name: value.cpu() for name, value in parameters.items()}, step)
            for value in parameters.values():
                value.mul_(1.01)
            ema.update(step)
        before = bits(parameters)
        with ema.applied():
            pass
        assert equal(bits(parameters), before)
        averages.append(ema.tensors())
    for name, value in averages[0].items():
        torch.testing.assert_close(value.cpu(), averages[1][name], rtol=1e-6, atol=1e-7)


def test_the_decay_that_is_told_is_that_of_the_last_update() -> None:
    ema = EMA({"w": torch.zeros(1)}, 0.9, interval=4)
    assert [ema.metrics(step) for step in (1, 3)] == [{}, {}]
    assert [ema.metrics(step)["ema_decay"] for step in (4, 7, 8)] == [ema_decay(step, 0.9, 4) for step in (4, 4, 8)]
