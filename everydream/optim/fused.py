"""Fused backward: a parameter is updated as soon as its gradient is ready, and the gradient is freed.

At no time are all gradients in memory: on a model of N float32 weights that saves nearly 4 N bytes. (LOMO, Lv et al.
2023, "Full parameter fine-tuning for large language models with limited resources", for any optimizer.)
The price: one process, no accumulation, no clipping by the whole norm, no fp16 loss scaling, no second backward (class
pictures) and none that is compiled, for each needs all gradients at once; and an update cannot be withheld as a whole.
The trainer therefore checks the loss before backward, a parameter whose gradient is not finite is left as it is, and
`norms` shows it: the run goes back to its last good checkpoint.

State, groups and steps are the optimizer's own, so that checkpoints are those of the plain path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from everydream.optim.partial import StepOnly, step_only


class FusedBackward:
    """Hooks on every trained parameter, from construction to `remove`. Set learning rates before backward."""

    def __init__(
        self,
        optimizers: Mapping[str, torch.optim.Optimizer],
        parameters: Mapping[str, Sequence[torch.nn.Parameter]],
    ) -> None:
        device = next(p for members in parameters.values() for p in members).device
        self.optimizers = dict(optimizers)
        self.squares = {part: torch.zeros((), dtype=torch.float64, device=device) for part in parameters}
        steps = {part: step_only(optimizer) for part, optimizer in self.optimizers.items()}
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(self._update, part, steps[part]))
            for part, members in parameters.items()
            for p in members
        ]

    def begin(self) -> None:
        """Before each backward."""
        for part, optimizer in self.optimizers.items():
            self.squares[part].zero_()
            if stepper := getattr(optimizer, "stepper", None):
                stepper.begin()

    def norms(self) -> torch.Tensor:
        """As clip.part_norms: the norm of each part's gradients in this backward, not finite where one is not."""
        return torch.stack([square.sqrt().float() for square in self.squares.values()])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _update(self, part: str, step: StepOnly, p: torch.nn.Parameter) -> None:
        assert p.grad is not None
        norm = torch.linalg.vector_norm(p.grad, dtype=torch.float32)
        self.squares[part] += norm.double().square()
        if norm.device.type == "cpu":
            if math.isfinite(norm.item()):
                step([p])
        else:
            _step_where(norm.isfinite(), step, p)
        p.grad = None


def _step_where(is_finite: torch.Tensor, step: StepOnly, p: torch.nn.Parameter) -> None:
    """On the device, without waiting for it: the optimizer sees a zero gradient, the weights stay as they were."""
    assert p.grad is not None
    p.grad.masked_fill_(~is_finite, 0.0)
    before = p.detach().clone()
    step([p])
    p.copy_(torch.where(is_finite, p, before))
