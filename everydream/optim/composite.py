"""Several optimizers that look like one: to the loop, to schedules and to checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Composite(torch.optim.Optimizer):
    """Each of `parts` steps its own parameters; param_groups and state are the very objects of the parts, joined."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        # The parent checks the groups and fills in its hooks; the groups it holds are then replaced by the parts' own.
        super().__init__([{"params": group["params"]} for part in self.parts for group in part.param_groups], {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        """The groups and the state here are the truth; give each part its own of them."""
        if not isinstance(self.state, defaultdict):
            self.state = defaultdict(dict, self.state)
        start = 0
        for part in self.parts:
            part.state = self.state
            part.param_groups = self.param_groups[start : start + len(part.param_groups)]
            start += len(part.param_groups)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict with new groups and a new state."""
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss
