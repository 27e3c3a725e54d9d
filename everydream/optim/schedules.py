"""Learning-rate schedules: pure functions of the optimizer step, so that a resume needs nothing but the step.

`step` counts optimizer updates from 0 and names the update about to be made. Warm-up over W updates rises by equal
amounts, from 1/(W+1) to W/(W+1); update W is the first at full lr (no update is spent at lr 0). The decay then ends at
`decay_steps`, counted from the start of the run with warm-up included; from there on the factor stays at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

POWER = 2.0  # of the polynomial; 1 would be `linear`
CYCLES = 4  # of cosine_with_restarts, of equal length


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _polynomial(progress: float) -> float:
    return (1.0 - progress) ** POWER


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cosine_with_restarts(progress: float) -> float:
    """Each cycle starts at the full lr and ends near 0: Loshchilov & Hutter 2017, SGDR."""
    return 0.0 if progress >= 1.0 else _cosine(CYCLES * progress % 1.0)


# name → factor of progress through the decay, 0 at its start, 1 at its end
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "cosine_with_restarts": _cosine_with_restarts,
}


def lr_factor(step: int, name: str, warmup_steps: int = 0, decay_steps: int | None = None) -> float:
    """What the base lr is multiplied by for update `step`: in [0, 1]. Only `constant` may leave `decay_steps` out."""
    if name != "constant":
        assert decay_steps is not None, f"{name} needs decay_steps"
        if step >= decay_steps:
            return SCHEDULES[name](1.0)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = 0.0 if decay_steps is None else (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return SCHEDULES[name](min(1.0, progress))


def base_lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    """The lr of each group: read once, right after the optimizer is made."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_lr(optimizer: torch.optim.Optimizer, base: Sequence[float], factor: float) -> float:
    """Write base × factor into every group; returns `current_lr`."""
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr * factor
    return current_lr(optimizer)


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The lr that the next step uses, read back from the optimizer: the only number that is printed and logged.

    A part's groups share one lr. Prodigy multiplies it by its own estimate, which starts at `d0`: shown is the product.
    """
    group = optimizer.param_groups[0]
    return float(group["lr"]) * (float(group["d"]) if "d0" in group else 1.0)
