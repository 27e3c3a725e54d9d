"""From folders to plans: which pictures a run has, in which sizes, and when each is trained.

roots → scan (the gate) → hold-out → sizes → plan
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from everydream.data.buckets import assign
from everydream.data.dataset import Augmentation, Source
from everydream.data.folders import Root
from everydream.data.gate import Progress, no_progress
from everydream.data.pictures import Size
from everydream.data.plan import Plan
from everydream.data.scan import Sample, Scan, scan
from everydream.runtime import Ranks


@dataclass(frozen=True)
class Gate:
    """How pictures are checked; the same for every set of a run."""

    sizes: tuple[Size, ...]
    bad_images: str
    max_image_megapixels: float
    masked_loss: bool
    workers: int
    cache_dir: Path
    remember: bool  # False: nothing is written, not even what was learned
    ranks: Ranks

    def check(self, roots: Sequence[Root], progress: Progress = no_progress) -> Scan:
        """Every picture is decoded once, by rank 0; the others find what it learned.

        Raises DataError with all problems, or where the processes see different files.
        """

        def work() -> Scan:
            found = scan(
                roots,
                max_image_megapixels=self.max_image_megapixels,
                masked_loss=self.masked_loss,
                workers=self.workers,
                cache_dir=self.cache_dir,
                remember=self.remember,
                progress=progress if self.ranks.is_main else no_progress,
            )
            found.usable(self.bad_images)
            return found

        return self.ranks.main_first(work)


@dataclass(frozen=True)
class PictureSet:
    """Pictures that share a plan."""

    name: str
    samples: tuple[Sample, ...]
    buckets: Mapping[Size, Sequence[str]]
    plan: Plan

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[Sample],
        sizes: Sequence[Size],
        batch_size: int,
        seed: int,
        start: tuple[int, int] = (0, 0),
    ) -> PictureSet:
        buckets = assign(((sample.identity, sample.width, sample.height) for sample in samples), sizes)
        multiplies = {sample.identity: sample.multiply for sample in samples}
        plan = Plan(buckets, batch_size, seed, multiplies=multiplies, name=name, start=start)
        return cls(name, tuple(samples), buckets, plan)

    def source(self, augmentation: Augmentation, *, is_class: bool = False) -> Source:
        return Source.of(self.samples, self.buckets, augmentation, self.plan, is_class=is_class)


def total_updates(plan: Plan, per_update: int, max_epochs: int | None, max_steps: int | None) -> int:
    """Whichever comes first: floor(micro-batches of max_epochs / per_update), or max_steps. One of them is set."""
    limits = [] if max_steps is None else [max_steps]
    if max_epochs is not None:
        limits.append(plan.micro_batches(max_epochs) // per_update)
    return min(limits)
