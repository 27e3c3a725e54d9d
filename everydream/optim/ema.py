"""Exponential moving average of the weights: smoother than the weights, for previews, validation and export.

Float32, on a device of its own; an update is a fused lerp in place, without a copy of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from everydream.errors import CheckpointError


def ema_decay(step: int, decay: float, interval: int = 1) -> float:
    """The share of the old average that an update at `step` keeps: min(decay, (1 + step)/(10 + step)) to the power of
    `interval`, so that a longer interval keeps the same memory in steps.

    The warm-up is TensorFlow's (tf.train.ExponentialMovingAverage, num_updates): early on the average follows the
    weights instead of remembering their start.
    """
    return min(decay, (1 + step) / (10 + step)) ** interval


class EMA:
    """`device` None keeps each average beside its parameter; "cpu" saves accelerator memory and costs one transfer of
    the trained weights, one tensor at a time, each `interval` steps."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decay: float,
        interval: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        assert 0 <= decay < 1, decay
        assert interval >= 1, interval
        self.decay, self.interval = decay, interval
        self._parameters = dict(parameters)
        self._averages = {
            name: value.detach().to(device=device or value.device, dtype=torch.float32, copy=True)
            for name, value in self._parameters.items()
        }
        self._swapped = False

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step` (the first is 1). Nothing happens between intervals."""
        assert not self._swapped, "the weights are the average now: leave applied() before training on"
        if step % self.interval:
            return
        weight = 1 - ema_decay(step, self.decay, self.interval)
        averages, parameters = [], []
        for name, average in self._averages.items():
            value = self._parameters[name].detach()
            if value.device == average.device and value.dtype == average.dtype:
                averages.append(average)
                parameters.append(value)
            else:
                average.lerp_(value.to(average), weight)  # one tensor's copy at a time
        if averages:
            torch._foreach_lerp_(averages, parameters, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the model's weights; on leaving, however that comes about, the weights are back bit for bit.

        In place, so that optimizer, compiled graphs and flat buffers keep their tensors. Float32 weights change places
        with their average and take no memory; others are kept aside.
        """
        assert not self._swapped, "already applied"
        with ExitStack() as restore:
            self._swapped = True
            restore.callback(setattr, self, "_swapped", False)
            for name, average in self._averages.items():
                value = self._parameters[name].detach()
                if value.dtype == average.dtype:
                    _exchange(value, average)
                    restore.callback(_exchange, value, average)
                else:
                    kept = value.to(average.device, copy=True)
                    restore.callback(_copy, value, kept)
                    value.copy_(average)
            yield

    def metrics(self, step: int) -> dict[str, float]:
        """The decay of the last update until this step: below `decay`, the average is still warming up."""
        last = step - step % self.interval
        return {"ema_decay": ema_decay(last, self.decay, self.interval)} if last else {}

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32: live, so copy what must outlast the next update."""
        assert not self._swapped, "the averages are in the model now: leave applied() first"
        return dict(self._averages)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, changed: bool = False) -> list[str]:
        """What tensors() gave, exactly. Raises CheckpointError where names, shapes or types differ.

        `changed`: other parameters are trained now, on purpose; the average of a new one begins with its weights.
        Returns lines on that.
        """
        new, gone = sorted(self._averages.keys() - tensors.keys()), sorted(tensors.keys() - self._averages.keys())
        if (new or gone) and not changed:
            where = f"{new[0]} is missing" if new else f"{gone[0]} is not trained in this run"
            raise CheckpointError(f"ema.safetensors: {where}. Resume with the settings it was saved with")
        for name in sorted(self._averages.keys() & tensors.keys()):
            ours, theirs = self._averages[name], tensors[name]
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                raise CheckpointError(
                    f"ema.safetensors: {name} is {theirs.dtype} {tuple(theirs.shape)}, and this model needs "
                    f"{ours.dtype} {tuple(ours.shape)}. Resume with the model it was saved with"
                )
            ours.copy_(theirs)
        told = {"begins with the present weights": new, "is kept no longer": gone}
        return [f"the average of {len(some)} parameters {what} ({some[0]}, …)" for what, some in told.items() if some]


class NoEMA:
    """EMA off: same methods, nothing kept."""

    def update(self, step: int) -> None:
        pass

    @contextmanager
    def applied(self) -> Iterator[None]:
        yield

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], *, changed: bool = False) -> list[str]:
        return []


@torch.no_grad()
def _exchange(a: Tensor, b: Tensor) -> None:
    kept = a.to(b.device, copy=True)
    a.copy_(b)
    b.copy_(kept)


@torch.no_grad()
def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source)
