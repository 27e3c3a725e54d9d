"""Which pictures are trained when: a pure function of (seed, position). Knows identities and sizes, no files.

Each epoch, each bucket's pictures are permuted and appended to that bucket's endless queue, which is cut into
micro-batches of `batch_size`; what does not fill one waits for the next epoch. So every micro-batch is full and of one
size, and no picture is dropped or taken twice in an epoch. The micro-batches that an epoch completes are shuffled
across buckets and appended to one endless stream. Nothing here depends on processes, workers, or what ran before.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from everydream.data.pictures import Size
from everydream.draws import generator
from everydream.errors import DataError


class Draw(NamedTuple):
    """One picture in one epoch; `repeat` counts its copies where multiply is over 1."""

    sample: str
    epoch: int
    repeat: int


class Cut(NamedTuple):
    """A micro-batch: where it lies in its bucket's queue."""

    bucket: Size
    place: int


class Plan:
    """The endless stream of micro-batches of one set of pictures.

    `buckets`: size → identities. `multiplies`: identity → how often an epoch (1 where none is given); a fraction gives
    each epoch its floor or its ceiling, in turns that start at a drawn place. `start` = (micro-batch, epoch) is where
    the stream begins: (0, 0), or after changed data the place where the new pictures took over.
    """

    def __init__(
        self,
        buckets: Mapping[Size, Sequence[str]],
        batch_size: int,
        seed: int,
        *,
        multiplies: Mapping[str, float] | None = None,
        name: str = "subject",
        start: tuple[int, int] = (0, 0),
    ) -> None:
        assert batch_size >= 1, f"batch_size {batch_size}"
        self.buckets = {size: tuple(sorted(identities)) for size, identities in sorted(buckets.items())}
        self.batch_size, self.seed, self.name, self.start = batch_size, seed, name, start
        rates = _rates(self.buckets, multiplies or {}, seed, name)
        self._rates = {size: rate for size, rate in rates.items() if rate.p.any()}
        self.drawn = {  # without those whose multiply is 0
            size: tuple(identity for identity, p in zip(identities, rates[size].p, strict=True) if p)
            for size, identities in self.buckets.items()
        }
        if not self._rates:
            raise DataError(f"{name}: no picture is ever used: there are none, or multiply is 0 for all of them")
        self._at = start[1]  # the epoch that was asked for last, from where the next search begins
        self._remember()

    def _remember(self) -> None:
        self._total = lru_cache(maxsize=64 * len(self._rates))(self._count)
        self._border = lru_cache(maxsize=64)(self._border_of)
        self._cuts = lru_cache(maxsize=4)(self._cuts_of)
        self._queue = lru_cache(maxsize=4 * len(self._rates))(self._queue_of)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self).items() if name not in ("_total", "_border", "_cuts", "_queue")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    @cached_property
    def signature(self) -> str:
        """The same for plans that cut the same pictures in the same way, wherever they start."""
        pictures = [[size, self.buckets[size], rate.p.tolist(), rate.q.tolist()] for size, rate in self._rates.items()]
        said = json.dumps([self.name, self.batch_size, self.seed, pictures])
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def micro_batch(self, index: int) -> tuple[Draw, ...]:
        """`batch_size` draws of one bucket."""
        epoch = self.epoch_of(index)
        size, cut = self._cuts(epoch)[index - self._border(epoch)]
        wanted = range(cut * self.batch_size, (cut + 1) * self.batch_size)
        return tuple(self._draw(size, position, epoch) for position in wanted)

    def micro_batches(self, epochs: int) -> int:
        """How many micro-batches the first `epochs` epochs complete; that many are the stream's first ones."""
        return self._border(max(epochs, self.start[1]))

    def epoch_of(self, index: int) -> int:
        """The epoch (from 0) that completes this micro-batch."""
        assert index >= self.start[0], f"micro-batch {index} lies before the plan's start {self.start[0]}"
        low = self._at if self._border(self._at) <= index else self.start[1]
        stride = 1
        while self._border(low + stride) <= index:
            low, stride = low + stride, 2 * stride
        self._at = low + bisect_right(range(low, low + stride), index, key=self._border) - 1
        return self._at

    def waiting(self, epochs: int) -> dict[Size, int]:
        """Draws left in each bucket's queue after `epochs` epochs, where there are any."""
        rests = {size: self._total(size, epochs) % self.batch_size for size in self._rates}
        return {size: rest for size, rest in rests.items() if rest}

    def draws_in(self, epoch: int) -> int:
        """How many pictures this epoch asks for, copies counted."""
        return sum(self._total(size, epoch + 1) - self._total(size, epoch) for size in self._rates)

    # --- queues: position → draw ---

    def _border_of(self, epoch: int) -> int:
        """The first micro-batch of this epoch."""
        return self.start[0] + sum(self._total(size, epoch) // self.batch_size for size in self._rates)

    def _count(self, size: Size, epochs: int) -> int:
        """Length of the bucket's queue after `epochs` epochs."""
        rate = self._rates[size]
        return int(rate.through(epochs).sum() - rate.through(self.start[1]).sum())

    def _cuts_of(self, epoch: int) -> list[Cut]:
        cuts = [
            Cut(size, index)
            for size in self._rates
            for index in range(
                self._total(size, epoch) // self.batch_size, self._total(size, epoch + 1) // self.batch_size
            )
        ]
        order = generator(self.seed, "plan order", self.name, epoch).permutation(len(cuts))
        return [cuts[at] for at in order]

    def _queue_of(self, size: Size, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """What this epoch appends to the bucket's queue: (index of the identity, repeat)."""
        rate = self._rates[size]
        counts = rate.through(epoch + 1) - rate.through(epoch)
        index = np.repeat(np.arange(len(counts)), counts)
        repeat = np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = generator(self.seed, "plan bucket", self.name, epoch, *size).permutation(len(index))
        return index[order], repeat[order]

    def _draw(self, size: Size, position: int, epoch: int) -> Draw:
        while (begin := self._total(size, epoch)) > position:  # it waited since an earlier epoch
            epoch -= 1
        index, repeat = self._queue(size, epoch)
        return Draw(self.buckets[size][index[position - begin]], epoch, int(repeat[position - begin]))


# --- how often ---


@dataclass(frozen=True, slots=True)
class _Rate:
    """How often each picture of a bucket is drawn: floor(E·p/q + phase/phases) times in E epochs."""

    p: np.ndarray
    q: np.ndarray
    phase: np.ndarray
    phases: np.ndarray

    def through(self, epochs: int) -> np.ndarray:
        whole, part = epochs // self.q, epochs % self.q
        return whole * self.p + (part * self.p * self.phases + self.phase * self.q) // (self.q * self.phases)


def _share(multiply: float) -> Fraction:
    """Small denominators keep `_Rate`'s products within 64 bits. captions.py lets nothing between 0 and 0.001 pass."""
    share = Fraction(multiply).limit_denominator(1000)
    assert share or not multiply, f"multiply {multiply} would be 0"
    return share


def _rates(
    buckets: Mapping[Size, Sequence[str]], multiplies: Mapping[str, float], seed: int, name: str
) -> dict[Size, _Rate]:
    """Pictures of one fraction get phases 0, 1/n, 2/n, … in a drawn order, so that each epoch has n·fraction of them,
    rounded down or up, wherever they stand in the list."""
    shares = {
        identity: _share(multiplies.get(identity, 1.0)) for identities in buckets.values() for identity in identities
    }
    alike: dict[Fraction, list[str]] = {}
    for identity in sorted(shares):
        alike.setdefault(shares[identity], []).append(identity)
    phases: dict[str, tuple[int, int]] = {}
    for share, identities in alike.items():
        ranks = generator(seed, "plan phase", name, str(share)).permutation(len(identities))
        phases |= {identity: (int(rank), len(identities)) for identity, rank in zip(identities, ranks, strict=True)}

    def column(identities: Sequence[str], value: Callable[[str], int]) -> np.ndarray:
        return np.array([value(identity) for identity in identities], dtype=np.int64)

    return {
        size: _Rate(
            p=column(identities, lambda identity: shares[identity].numerator),
            q=column(identities, lambda identity: shares[identity].denominator),
            phase=column(identities, lambda identity: phases[identity][0]),
            phases=column(identities, lambda identity: phases[identity][1]),
        )
        for size, identities in buckets.items()
    }


# --- updates: grad_accum × processes micro-batches each, cut from the stream across epochs ---


def updates_in(plan: Plan, epochs: int, grad_accum: int, processes: int) -> int:
    """How many updates `max_epochs` gives; the stream's last rest is not trained."""
    return plan.micro_batches(epochs) // (grad_accum * processes)
