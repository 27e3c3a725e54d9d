"""Weights, gradients and optimizer state of a group as views of one buffer each: one kernel instead of hundreds.

Worth it where a step is bound by dispatch: on a CPU, for models of small tensors, with optimizers that treat every
element alike (Row.elementwise). The library's optimizer keeps groups and state, each parameter's state being a view of
the buffer, so that checkpoints are those of the plain path; its `step` and `zero_grad` are replaced.

Equal to the plain path bit for bit, but for two things. The norm of a buffer adds up in another order than the norms
of its tensors, so that clipping by it may differ in the last bit. And a parameter that gets no gradient in an update
is passed over by the plain path, while here its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from everydream.optim.partial import follow

# Elements. Kernels take two vectors of 16 at a time and what is left one by one, where they may round otherwise:
# tensors with a rest (in Stable Diffusion the last convolution's 4 biases) stay by themselves, and results the same.
UNIT = 32

Optimizer = torch.optim.Optimizer
Parameter = torch.nn.Parameter
Twins = Callable[[list[dict[str, Any]]], Optimizer]


class Buffer:
    """One group's parameters laid end to end, but for the `odd` ones; a view has the strides of its parameter."""

    def __init__(self, group: Sequence[Parameter]) -> None:
        self.params = [p for p in group if p.numel() and p.numel() % UNIT == 0]
        self.odd = [p for p in group if p.numel() % UNIT]
        sizes = [p.numel() for p in self.params]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        device = group[0].device
        self.weights = Parameter(torch.zeros(sum(sizes), device=device))
        self.weights.grad = torch.zeros(sum(sizes), device=device)
        self.gradients = self.views(self.weights.grad)
        with torch.no_grad():
            for p, view in zip(self.params, self.views(self.weights.detach()), strict=True):
                p.data = view.copy_(p)
        self.attach()

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        for p in self.params:
            is_dense = p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
            assert p.dtype is torch.float32 and is_dense, (p.dtype, p.shape, p.stride())
        return [
            buffer.as_strided(p.shape, p.stride(), offset) for p, offset in zip(self.params, self.offsets, strict=True)
        ]

    def attach(self) -> None:
        """Autograd adds into a gradient that is there, and would make one of its own where none is."""
        for p, view in zip(self.params, self.gradients, strict=True):
            p.grad = view

    @torch.no_grad()
    def collect(self) -> None:
        """Gradients that someone else has put in place of the views."""
        for p, view in zip(self.params, self.gradients, strict=True):
            if p.grad is not view:
                view.zero_() if p.grad is None else view.copy_(p.grad)
                p.grad = view


class Flat:
    """`handles`, a few a group, stand for all parameters wherever only gradients count (norms, clipping).

    Made before the model is first used, and for one process only: DDP has gradient buffers of its own.
    """

    def __init__(self, optimizer: Optimizer, make_twin: Twins) -> None:
        self.optimizer = optimizer
        self.buffers = [Buffer(group["params"]) for group in optimizer.param_groups]
        members = [([buffer.weights] if buffer.params else []) + buffer.odd for buffer in self.buffers]
        self.handles = [handle for handles in members for handle in handles]
        self.twin = make_twin([{**g, "params": m} for g, m in zip(optimizer.param_groups, members, strict=True)])
        # What optimizer.state must hold for each parameter: views of the twin's state, by key.
        self.linked: dict[Parameter, dict[str, Any]] = {}
        self.counters: list[tuple[torch.Tensor, torch.Tensor]] = []  # the twin's number, and each parameter's copy
        vars(optimizer).update(step=self.step, zero_grad=self.zero_grad, flat=self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for buffer in self.buffers:
            assert buffer.weights.grad is not None
            buffer.weights.grad.zero_()
            buffer.attach()
            for p in buffer.odd:
                p.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for buffer in self.buffers:
            buffer.collect()
        if not self._is_linked() and not self._adopt():
            self._give_up()
            self.optimizer.step()
            return loss
        self._step_twin()
        if not self.linked:
            self._link()
        for number, copies in self.counters:
            copies.copy_(number)
        return loss

    def _step_twin(self) -> None:
        follow(self.twin, self.optimizer)
        self.twin.step()

    # State: the twin's is the truth, the optimizer's are views of it

    def _is_linked(self) -> bool:
        """Nobody has put other state into the optimizer (a resume does)."""
        state = self.optimizer.state
        return sum(map(bool, state.values())) == len(self.linked) and all(
            state[p].get(key) is value for p, entries in self.linked.items() for key, value in entries.items()
        )

    def _link(self) -> None:
        self.linked, self.counters = {}, []
        self.optimizer.state.clear()
        for buffer in self.buffers:
            columns = {}
            for key, value in self.twin.state[buffer.weights].items():
                if not isinstance(value, torch.Tensor):
                    columns[key] = [value] * len(buffer.params)
                elif value.shape == buffer.weights.shape:
                    columns[key] = buffer.views(value)
                else:
                    copies = value.repeat(len(buffer.params), *[1] * value.dim())
                    self.counters.append((value, copies))
                    columns[key] = list(copies)
            for i, p in enumerate(buffer.params):
                if columns:
                    self.linked[p] = {key: column[i] for key, column in columns.items()}
            self.linked |= {p: dict(self.twin.state[p]) for p in buffer.odd if self.twin.state.get(p)}
        self.optimizer.state.update({p: dict(entries) for p, entries in self.linked.items()})

    def _adopt(self) -> bool:
        """Copy the optimizer's state, which is new, into the twin's; False if parameters of one group differ in age."""
        for buffer in self.buffers:
            entries = [self.optimizer.state.get(p, {}) for p in buffer.params]
            taken: dict[str, Any] = {}
            for key, value in (entries[0] if entries else {}).items():
                column = [entry.get(key) for entry in entries]
                if isinstance(value, torch.Tensor) and value.shape == buffer.params[0].shape and value.dim():
                    if not all(isinstance(v, torch.Tensor) for v in column):
                        return False
                    taken[key] = torch.zeros_like(buffer.weights.detach())
                    for view, v in zip(buffer.views(taken[key]), column, strict=True):
                        view.copy_(v)
                elif not all(_equal(value, v) for v in column):
                    return False
                else:
                    taken[key] = value.clone() if isinstance(value, torch.Tensor) else value
            if any(entry.keys() != taken.keys() for entry in entries):
                return False
            self.twin.state[buffer.weights] = taken
            self.twin.state.update({p: dict(self.optimizer.state.get(p, {})) for p in buffer.odd})
        self._link()
        return True

    def _give_up(self) -> None:
        """From here on the library's own step, on the same buffers: slower, and right for any state."""
        del vars(self.optimizer)["step"]
        for p, entries in self.linked.items():
            for key, value in entries.items():
                if self.optimizer.state[p].get(key) is value and isinstance(value, torch.Tensor):
                    self.optimizer.state[p][key] = value.clone()  # its neighbours go on with theirs


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)
