"""One clock: optimizer steps. Where a step lies in the epochs, and on which steps something is due.

Everything here is a function of the step, so that a resumed run does the same things on the same steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everydream.data.plan import Plan


@dataclass(frozen=True)
class Clock:
    """`plan`: the subject pictures'. `per_update`: accumulation × processes. `total_steps`: where the run ends."""

    plan: Plan
    per_update: int
    total_steps: int

    def _trained(self, step: int) -> Fraction:
        """Epochs at this update border; 3/2: half of the second one's micro-batches are done. Whole where one ends."""
        done = step * self.per_update
        if done <= self.plan.start[0]:
            return Fraction(self.plan.start[1])
        epoch = self.plan.epoch_of(done - 1)
        begin, end = self.plan.micro_batches(epoch), self.plan.micro_batches(epoch + 1)
        return epoch + Fraction(done - begin, end - begin)

    def epochs_ended(self, step: int) -> int:
        """Epochs whose last micro-batch lies at or before this update border."""
        return int(self._trained(step))

    def ends_epoch(self, step: int, every: float) -> bool:
        """Whether a multiple of `every` epochs ends with the update before this border."""
        exact = Fraction(str(every))  # 0.2 in binary is a little more, and its fifth multiple not quite an epoch
        return step > 0 and self._trained(step) // exact > self._trained(step - 1) // exact

    def steps_of_epoch_ends(self, every: float) -> Iterator[int]:
        """One after the other, for a run may be long."""
        exact, step = Fraction(str(every)), 0
        while True:
            due = (self._trained(step) // exact + 1) * exact
            step = bisect_left(range(self.total_steps + 1), due, lo=step + 1, key=self._trained)
            if step > self.total_steps:
                return
            yield step


@dataclass
class Due:
    """When something is done: every n steps, every n epochs, at the start, at the end. Never twice on one step."""

    clock: Clock
    every_steps: int | None = None
    every_epochs: float | None = None
    at_start: bool = False
    at_end: bool = False
    last: int = -1  # the step it was last done on, or the checkpoint's that the run was resumed from

    def __call__(self, step: int) -> bool:
        if step == self.last:
            return False
        due = self.is_on(step)
        self.last = step if due else self.last
        return due

    def is_on(self, step: int) -> bool:
        if step == 0:
            return self.at_start
        return bool(
            (self.every_steps and step % self.every_steps == 0)
            or (self.every_epochs and self.clock.ends_epoch(step, self.every_epochs))
            or (self.at_end and step >= self.clock.total_steps)
        )
