"""bf16 weights that learn: the library's own step in float32, the result rounded stochastically.

A bf16 weight has 8 bits of mantissa, so an update below 1/512 of it is lost when rounded to nearest: at fine-tuning
learning rates, nearly all are. Rounded up with the probability of the remainder, they arrive on average (Gupta et al.
2015, "Deep learning with limited numerical precision").

The optimizer that is made for the bf16 weights keeps groups and state; its `step` is replaced by one that runs a twin
of it, chunk by chunk, on float32 copies of weights and gradients. State is therefore float32 (or the library's 8 bits),
never bf16: a bf16 second moment could not decay at beta2 0.999.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from everydream.draws import torch_seed
from everydream.optim.partial import follow

CHUNK = 2**24  # elements at a time: 64 MiB of weights and as much of gradients
COUNT = "rounded_steps"  # in the first group, so that it is saved and resumed with the optimizer


@torch.no_grad()
def round_stochastically_(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Float32 values → the same tensor, each on one of its two bf16 neighbours. `noise`: int32 in [0, 2¹⁶), same shape.

    Adding below the 16 bits that bf16 does not have carries into them with the right probability. A value that bf16
    can hold, an infinity and torch's own NaN stay what they are.
    """
    values.view(torch.int32).add_(noise).bitwise_and_(-65536)
    return values


class Rounding:
    """Replaces `optimizer.step`. Draws are a pure function of (seed, number of the step, name of the parameter)."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        make_twin: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        names: Mapping[torch.nn.Parameter, str],
        seed: int,
    ) -> None:
        assert all(p.dtype is torch.bfloat16 for p in names), {p.dtype for p in names}
        self.optimizer, self.names, self.seed = optimizer, dict(names), seed
        # Shapes and dtype of the twin's parameters are real, their memory is one number until a chunk is lent to them.
        self.stand_ins = {p: torch.nn.Parameter(_hollow(p), p.requires_grad) for p in self.names}
        self.twin = make_twin(
            [{**g, "params": [self.stand_ins[p] for p in g["params"]]} for g in optimizer.param_groups]
        )
        self.group_of = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        device = next(iter(self.names)).device
        self.generator = torch.Generator(device)
        optimizer.param_groups[0].setdefault(COUNT, 0)
        vars(optimizer).update(step=self.step, stepper=self)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.begin()
        self.step_only(p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None)
        return loss

    def begin(self) -> None:
        """Count a step: its draws differ from the last one's."""
        first = self.optimizer.param_groups[0]
        first[COUNT] = first.get(COUNT, 0) + 1

    @torch.no_grad()
    def step_only(self, params: Iterable[torch.nn.Parameter]) -> None:
        """One update of these parameters, which have gradients; the others are not looked at."""
        follow(self.twin, self.optimizer)
        for chunk in _chunks(params):
            self._step_chunk(chunk)
        follow(self.optimizer, self.twin)

    def _step_chunk(self, chunk: Sequence[torch.nn.Parameter]) -> None:
        sizes = [p.numel() for p in chunk]
        weights = torch.empty(sum(sizes), dtype=torch.float32, device=chunk[0].device)
        gradients, noise = torch.empty_like(weights), torch.empty_like(weights, dtype=torch.int32)
        pieces = [
            [_like(p, part) for part, p in zip(buffer.split(sizes), chunk, strict=True)]
            for buffer in (weights, gradients)
        ]
        torch._foreach_copy_(pieces[0], list(chunk))
        torch._foreach_copy_(pieces[1], [p.grad for p in chunk if p.grad is not None])
        members: list[list[torch.nn.Parameter]] = [[] for _ in self.twin.param_groups]
        for p, weight, gradient in zip(chunk, *pieces, strict=True):
            stand_in = self.stand_ins[p]
            stand_in.data, stand_in.grad = weight, gradient
            self.twin.state[stand_in] = self.optimizer.state[p]
            members[self.group_of[p]].append(stand_in)
        for group, some in zip(self.twin.param_groups, members, strict=True):
            group["params"] = some
        self.twin.step()
        for p, part in zip(chunk, noise.split(sizes), strict=True):
            count = self.optimizer.param_groups[0][COUNT]
            self.generator.manual_seed(torch_seed(self.seed, "rounding", count, self.names[p]))
            part.random_(0, 65536, generator=self.generator)
        round_stochastically_(weights, noise)
        torch._foreach_copy_(list(chunk), pieces[0])
        for p in chunk:
            stand_in = self.stand_ins[p]
            self.optimizer.state[p] = self.twin.state[stand_in]
            stand_in.data, stand_in.grad = _hollow(p), None


def _like(p: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Laid out in memory as the parameter is, so that its state is too, here and after a resume."""
    return part.as_strided(p.shape, p.stride(), part.storage_offset())


def _hollow(p: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.float32, device=p.device).expand(p.shape)


def _chunks(params: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    chunk: list[torch.nn.Parameter] = []
    elements = 0
    for p in params:
        if chunk and elements + p.numel() > CHUNK:
            yield chunk
            chunk, elements = [], 0
        chunk.append(p)
        elements += p.numel()
    if chunk:
        yield chunk
