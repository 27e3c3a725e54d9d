"""What the loop eats: caches of latents and text, and this process's batches in the order of the plan."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from everydream.data.cache import LatentCache, TextCache, build_latents, build_texts
from everydream.data.dataset import Item, Source
from everydream.data.gate import Progress
from everydream.models.family import Family
from everydream.runtime import Ranks


@dataclass(frozen=True)
class Stream:
    """This process's micro-batches: of update u the G from u·G·P + r·G on, of each kind in turn."""

    kinds: tuple[str, ...]  # ("subject",) or ("subject", "class")
    accumulation: int
    rank: int
    processes: int

    @property
    def per_update(self) -> int:
        return self.accumulation * self.processes

    def indices(self, step: int) -> range:
        """Of one kind, in the update that follows `step`."""
        first = step * self.per_update + self.rank * self.accumulation
        return range(first, first + self.accumulation)

    def items(self, first_step: int, total_steps: int) -> Iterator[Item]:
        for step in range(first_step, total_steps):
            for index in self.indices(step):
                for kind in self.kinds:
                    yield kind, index


class Items:
    """An iterable that can be sent to data workers and started again, as torch's samplers are."""

    def __init__(self, stream: Stream, first_step: int, total_steps: int) -> None:
        self.stream, self.first_step, self.total_steps = stream, first_step, total_steps

    def __iter__(self) -> Iterator[Item]:
        return self.stream.items(self.first_step, self.total_steps)

    def __len__(self) -> int:
        return (self.total_steps - self.first_step) * self.stream.accumulation * len(self.stream.kinds)


def cache_latents(
    family: Family,
    sources: Mapping[str, Source],
    *,
    folder: Path,
    alpha_color: tuple[int, int, int],
    workers: int,
    ranks: Ranks,
    progress: Progress,
) -> LatentCache:
    """Every latent that the sources can ask for; what is missing is encoded, each process its share."""
    cache = LatentCache(folder, family.digest("vae") + _precision(), alpha_color)
    requests = list(itertools.chain.from_iterable(source.latent_requests() for source in sources.values()))

    def build(rank: int, world: int) -> None:
        build_latents(
            cache,
            requests,
            family.encode_pixels,
            vae_factor=family.facts.vae_factor,
            workers=max(1, workers),
            rank=rank,
            world=world,
            progress=progress,
        )

    in_shares(ranks, build)
    lacking = cache.missing(requests)  # finds what was made
    assert not lacking, f"{len(lacking)} latents are missing after they were made"
    return cache


def _precision() -> str:
    """TF32 keeps 10 bits of a product: what was encoded with it is not for a run without."""
    return " tf32" if torch.cuda.is_available() and torch.backends.cudnn.allow_tf32 else ""


def cache_texts(
    family: Family,
    captions: Sequence[str],
    *,
    folder: Path,
    chunks: int,
    clip_skip: int,
    ranks: Ranks,
    progress: Progress,
) -> TextCache:
    """The embeddings of all captions, with a frozen text encoder."""
    words = {name: hashlib.sha256(content).hexdigest() for name, content in family.facts.tokenizer.files.items()}
    cache = TextCache(
        folder, repr((family.digest("text_encoder") + _precision(), sorted(words.items()), clip_skip, chunks))
    )

    def encode(texts: list[str]) -> torch.Tensor:
        return family.encode_text(torch.from_numpy(family.tokenize(texts, chunks)))

    in_shares(
        ranks, lambda rank, world: build_texts(cache, captions, encode, rank=rank, world=world, progress=progress)
    )
    lacking = cache.missing(captions)
    assert not lacking, f"{len(lacking)} embeddings are missing after they were made"
    return cache


def in_shares(ranks: Ranks, build: Callable[[int, int], None]) -> None:
    """Each process makes its share; then each makes what it cannot see, on machines that share no cache folder."""
    ranks.together(lambda: build(ranks.rank, ranks.count))
    if ranks.count > 1:
        ranks.together(lambda: build(0, 1))
