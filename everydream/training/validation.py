"""Loss on pictures that are not trained on, with the same noise and timesteps each time.

Beside it, the same on some training pictures: while both fall, the model learns; when they part, it learns by heart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from everydream.data.plan import Draw
from everydream.draws import torch_seed
from everydream.errors import DataError, Stopped
from everydream.training.divided import divided

if TYPE_CHECKING:
    from everydream.data.batch import Batch
    from everydream.data.dataset import MicroBatches
    from everydream.data.scan import Sample
    from everydream.runtime import Ranks

MIN_LOSSES = 32  # a set's mean is over at least so many
HELD_OUT, TRAINED = "loss_val", "loss_train_fixed"  # metrics; an extra data set's is loss_val_<name>


class Picture(Protocol):
    """What the choice looks at in a sample. `content`: a digest of the file's bytes."""

    @property
    def identity(self) -> str: ...
    @property
    def content(self) -> str: ...


P = TypeVar("P", bound=Picture)


def choose(samples: Collection[P], share: float, seed: int, purpose: str) -> list[P]:
    """About `share` of the pictures, at least one: a pure function of seed and content.

    Copies of a picture go together, whatever their names. A picture's place depends on nothing but itself and the seed:
    further pictures, other names or another order move few others, and a larger share holds the smaller one's.
    """
    contents = sorted({sample.content for sample in samples}, key=lambda c: (torch_seed(seed, purpose, c), c))
    chosen = set(contents[: max(1, round(share * len(contents)))])
    return [sample for sample in samples if sample.content in chosen]


def split(samples: Collection[P], share: float, seed: int) -> tuple[list[P], list[P]]:
    """(trained on, held out), each in the order given. Raises DataError where one side would be empty."""
    held_out = choose(samples, share, seed, "hold out")
    names = {sample.identity for sample in held_out}
    trained = [sample for sample in samples if sample.identity not in names]
    if not trained or not held_out:
        raise DataError(
            f"auto_split_proportion {share} of {len({s.content for s in samples})} different pictures leaves none to "
            f"{'validate with' if trained else 'train on'}: add pictures, or use val_split_mode manual"
        )
    return trained, held_out


def refuse_shared(trained: Collection[P], held_out: Collection[P]) -> None:
    """Raises DataError with each held-out picture that is trained on under the same or another name."""
    names = {sample.content: sample.identity for sample in trained}
    problems = [
        f"manual_data_root: {sample.identity} is the same picture as {names[sample.content]}, which is trained on. "
        "Remove one of them (stabilize_training_loss measures the loss on training pictures)"
        for sample in held_out
        if sample.content in names
    ]
    if problems:
        raise DataError(problems)


def still(sample: Sample) -> Sample:
    """The sample as it is measured: not flipped, its caption as written and never dropped, of weight 1."""
    return replace(sample, multiply=1.0, cond_dropout=0.0, flip_p=0.0, loss_scale=1.0, shuffle_tags=False)


class FixedPlan:
    """Micro-batches of one set, the same each time: every picture equally often, a bucket's last one may be smaller.

    Sets of under MIN_LOSSES pictures look at each several times, with other noise and timesteps: the losses of two
    pictures at one timestep each would say little. `buckets`: size → identities.
    """

    def __init__(self, buckets: Mapping[tuple[int, int], Sequence[str]], batch_size: int) -> None:
        pictures = sum(map(len, buckets.values()))
        repeats = range(-(-MIN_LOSSES // max(1, pictures)))
        queues = (
            [Draw(identity, 0, repeat) for repeat in repeats for identity in sorted(identities)]
            for _, identities in sorted(buckets.items())
        )
        self._cuts = [tuple(q[i : i + batch_size]) for q in queues for i in range(0, len(q), batch_size)]

    def __len__(self) -> int:
        return len(self._cuts)

    def micro_batch(self, index: int) -> tuple[Draw, ...]:
        return self._cuts[index]


class Validation:
    """`plans`: metric → what to look at, by names of `dataset` (data.dataset.MicroBatches, with validation's own seed).
    `loss_of`: batch → loss_B, the objective's, not weighted.

    The caller puts the model into eval mode, and EMA's weights in where wanted. No random generator is touched.
    """

    def __init__(
        self,
        dataset: MicroBatches,
        plans: Mapping[str, FixedPlan],
        loss_of: Callable[[Batch], torch.Tensor],
        ranks: Ranks,
        stop: Callable[[], int],
    ) -> None:
        self.dataset, self.plans, self.loss_of, self.ranks, self.stop = dataset, plans, loss_of, ranks, stop

    def __call__(self, step: int) -> dict[str, float]:
        """The mean loss over each set's pictures; nothing if a stop signal came first. All processes must call it."""
        items = [(name, i) for name, plan in self.plans.items() for i in range(len(plan))]
        try:
            losses = divided(self.ranks, items, self._losses, self.stop)
        except Stopped:
            return {}
        values: dict[str, list[float]] = {name: [] for name in self.plans}
        for (name, _), some in zip(items, losses, strict=True):
            values[name] += some
        return {name: math.fsum(some) / len(some) for name, some in values.items() if some}

    @torch.no_grad()
    def _losses(self, item: tuple[str, int]) -> list[float]:
        name, i = item
        batch = self.dataset[name, self.plans[name].micro_batch(i)].to(self.ranks.device)
        losses: list[float] = self.loss_of(batch).tolist()
        return losses


class NoValidation:
    """Validation off."""

    def __call__(self, step: int) -> dict[str, float]:
        return {}
