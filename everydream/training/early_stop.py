"""A plugin: ends the run once the validation loss has not become lower for a while.

"plugins": ["everydream.training.early_stop.EarlyStop"], "validation_config": "validation.json"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from everydream.training import jsonl
from everydream.training.records import METRICS

if TYPE_CHECKING:
    from everydream.training.turns import Trainer


class EarlyStop:
    """Make a subclass to change these: a plugin is made without arguments."""

    metric = "loss_val"
    patience = 5  # validations without a new best, after which the run ends
    min_change = 0.0  # how much lower than the best a value must be to count as a new best

    def __init__(self) -> None:
        self.history: list[tuple[int, float]] = []  # step, value

    def after_build(self, trainer: Trainer) -> None:
        """A resumed run decides as if it had not been interrupted: what was measured before is in metrics.jsonl."""
        history = []
        if trainer.log.folder is not None:
            records = jsonl.read(trainer.log.folder / METRICS)
            history = [(r["step"], _number(r[self.metric])) for r in records if self.metric in r]
        self.history = trainer.ranks.broadcast(history)
        # A run that was stopped here is finished: a resume has nothing to do. Not by a validation of this very step,
        # which the next step would have looked at.
        self._stop_if_due(trainer, [entry for entry in self.history if entry[0] < trainer.state.step])

    def before_exit(self, trainer: Trainer) -> None:
        if not self.history:
            todo = "Set validation_config, or leave the plugin out."
            trainer.log.event("plugin", f"EarlyStop: {self.metric} was never measured", "warning", todo=todo)

    def after_step(self, trainer: Trainer) -> None:
        step, value = trainer.log.steps.get(self.metric), trainer.log.latest.get(self.metric)
        if step is not None and (not self.history or self.history[-1][0] < step):
            self.history.append((step, _number(value)))
        self._stop_if_due(trainer, self.history)

    def _stop_if_due(self, trainer: Trainer, history: Sequence[tuple[int, float]]) -> None:
        waited = validations_since_best([value for _, value in history], self.min_change) if history else 0
        if waited >= self.patience:
            best_step, best = history[-1 - waited]
            trainer.stop_after_this_step(
                f"{self.metric} has not become lower than {best:.4f} of step {best_step} in {waited} validations"
            )


def _number(value: float | None) -> float:
    """metrics.jsonl says null for what is not finite."""
    return math.nan if value is None or not math.isfinite(value) else value


def validations_since_best(values: Sequence[float], min_change: float = 0.0) -> int:
    """0: the last one is the best. What is not a number is no best."""
    best, index = math.inf, 0
    for i, value in enumerate(values):
        if value < best - min_change:
            best, index = value, i
    return len(values) - 1 - index
