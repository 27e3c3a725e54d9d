"""schedule.jsonl: which picture went in when, with which crop, caption, noise and timestep. A line a micro-batch.

What a person (or a test) needs to see that two runs saw the same. Gathered from all processes, and only when on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream.data.batch import Batch
    from everydream.runtime import Ranks
    from everydream.training.log import NullLog


class NoSchedule:
    """write_schedule off."""

    def begin(self, step: int) -> None:
        """The update after `step` begins; what was seen of one that was abandoned is forgotten."""

    def see(self, index: int, batch: Batch) -> None:
        """`index`: the micro-batch's number in its plan's stream. `batch`: on the host."""

    def tell(self, log: NullLog) -> None:
        """The update is done."""


class Schedule(NoSchedule):
    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._step = 0
        self._seen: list[dict[str, Any]] = []

    def begin(self, step: int) -> None:
        self._step = step + 1  # the number that metrics.jsonl gives this update
        self._seen.clear()

    def see(self, index: int, batch: Batch) -> None:
        record: dict[str, Any] = {
            "step": self._step,
            "micro_batch": index,
            "process": self.ranks.rank,
            "samples": list(batch.identities),
            "captions": list(batch.captions),
            "epochs": list(batch.epochs),
            "crops": [list(crop) for crop in batch.crops],
            "flips": list(batch.flips),
            "timesteps": batch.t_B.tolist(),
            "noise_checks": batch.noise_BCHW.flatten(1)[:, 0].tolist(),
            "weights": batch.weights_B.tolist(),
        }
        if batch.is_class:
            record["class"] = True
        self._seen.append(record)

    def tell(self, log: NullLog) -> None:
        seen = [record for records in self.ranks.gather(self._seen) for record in records]
        log.schedule(sorted(seen, key=lambda record: (record.get("class", False), record["micro_batch"])))
