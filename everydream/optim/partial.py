"""What holds for any optimizer: an update of some of its parameters, and a twin that follows its settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

StepOnly = Callable[[Sequence[torch.nn.Parameter]], None]


def step_only(optimizer: torch.optim.Optimizer) -> StepOnly:
    """A function that steps the parameters it is given, which have gradients, and no others.

    For optimizers whose update of a parameter looks at that parameter alone (Row.may_fuse).
    """
    assert not hasattr(optimizer, "flat"), "one buffer for a whole group cannot be updated in part"
    if stepper := getattr(optimizer, "stepper", None):  # rounding.py's
        return stepper.step_only
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}

    def step(params: Sequence[torch.nn.Parameter]) -> None:
        everything = [group["params"] for group in optimizer.param_groups]
        try:
            for i, group in enumerate(optimizer.param_groups):
                group["params"] = [p for p in params if group_of[id(p)] == i]
            optimizer.step()
        finally:
            for group, members in zip(optimizer.param_groups, everything, strict=True):
                group["params"] = members

    return step


def follow(twin: torch.optim.Optimizer, leader: torch.optim.Optimizer) -> None:
    """Give an optimizer of the same class on other parameters the leader's group values and numbers of its own."""
    for theirs, ours in zip(twin.param_groups, leader.param_groups, strict=True):
        theirs.update({key: value for key, value in ours.items() if key != "params"})
    vars(twin).update({key: value for key, value in vars(leader).items() if type(value) is float})  # Lion's _init_lr
