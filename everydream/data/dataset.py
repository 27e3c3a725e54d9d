"""Draws → Batch, in data workers or in the process itself.

Every random choice for a picture comes from a generator of its own, keyed by (seed, purpose, epoch, identity, repeat):
turning one augmentation on or off changes no other, and neither do workers, processes, prefetching or a resume.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from everydream.data.batch import Batch
from everydream.data.buckets import crop_box
from everydream.data.cache import LatentCache, LatentRequest, TextCache, mask_of, pixels_of
from everydream.data.captions import shuffle_tags
from everydream.data.pictures import Box, Size, quiet_pillow
from everydream.data.plan import Draw, Plan
from everydream.data.scan import Sample
from everydream.draws import generator
from everydream.errors import DataError

Item = tuple[str, int | tuple[Draw, ...]]  # source name, and a micro-batch of its plan or the draws themselves
Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The run's settings; what stands beside a picture wins over them."""

    cond_dropout: float = 0.0  # share of draws that are trained with the empty caption
    flip_p: float = 0.0
    crop_jitter: float = 0.0  # share of the shorter side
    shuffle_tags: bool = False
    keep_tags: int = 0

    def flip_of(self, sample: Sample) -> float:
        return self.flip_p if sample.flip_p is None else sample.flip_p

    def dropout_of(self, sample: Sample) -> float:
        return self.cond_dropout if sample.cond_dropout is None else sample.cond_dropout

    def shuffles(self, sample: Sample) -> bool:
        return self.shuffle_tags if sample.shuffle_tags is None else sample.shuffle_tags


@dataclass(frozen=True)
class Source:
    """Pictures that are drawn from: the subject's, the class's, the validation's."""

    samples: Mapping[str, Sample]
    sizes: Mapping[str, Size]
    augmentation: Augmentation = field(default_factory=Augmentation)
    plan: Plan | None = None
    is_class: bool = False

    @classmethod
    def of(
        cls,
        samples: Iterable[Sample],
        buckets: Mapping[Size, Sequence[str]],
        augmentation: Augmentation,
        plan: Plan | None = None,
        *,
        is_class: bool = False,
    ) -> Source:
        sizes = {identity: size for size, identities in buckets.items() for identity in identities}
        return cls({sample.identity: sample for sample in samples}, sizes, augmentation, plan, is_class)

    def latent_requests(self) -> list[LatentRequest]:
        """Every variant that a draw can ask for; only with fixed crops."""
        assert self.augmentation.crop_jitter == 0.0, "latents of moving crops cannot be cached"
        requests = []
        for sample in self.samples.values():
            flip_p, size = self.augmentation.flip_of(sample), self.sizes[sample.identity]
            crop = crop_box(sample.width, sample.height, size)
            requests += [
                LatentRequest(sample, size, crop, flip)
                for flip, share in ((False, 1.0 - flip_p), (True, flip_p))
                if share > 0.0
            ]
        return requests

    def captions(self) -> list[str] | None:
        """Every caption that a draw can ask for, the empty one included; None where tags are shuffled."""
        if any(self.augmentation.shuffles(sample) for sample in self.samples.values()):
            return None
        return sorted({"", *(sample.caption for sample in self.samples.values())})


class MicroBatches(Dataset):
    """Item → Batch. Raises DataError naming the picture.

    `times(rng)` → timestep; `noise(rng, (C, H, W))` → float32; `tokenize(captions, chunks)` → int64 [B, K, 77];
    `perturbation(rng, (L, D))` → float32, for text of `text_shape` (L, D). With `latents` no picture is read, with
    `texts` nothing is tokenized.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        seed: int,
        *,
        times: Callable[[Rng], int],
        noise: Callable[[Rng, tuple[int, int, int]], np.ndarray],
        tokenize: Callable[[list[str], int], np.ndarray] | None = None,
        chunks: int = 1,
        latent_channels: int = 4,
        vae_factor: int = 8,
        alpha_color: tuple[int, int, int] = (255, 255, 255),
        latents: LatentCache | None = None,
        texts: TextCache | None = None,
        perturbation: Callable[[Rng, tuple[int, int]], np.ndarray] | None = None,
        text_shape: tuple[int, int] | None = None,
    ) -> None:
        assert (tokenize is None) != (texts is None), "a tokenizer or a text cache, one of them"
        self.sources, self.seed = dict(sources), seed
        self.times, self.noise, self.tokenize, self.chunks = times, noise, tokenize, chunks
        self.latent_channels, self.vae_factor, self.alpha_color = latent_channels, vae_factor, alpha_color
        self.latents, self.texts = latents, texts
        self.perturbation, self.text_shape = perturbation, text_shape

    def __getitem__(self, item: Item) -> Batch:
        name, which = item
        source = self.sources[name]
        if isinstance(which, int):
            assert source.plan is not None, f"{name} has no plan"
            draws = source.plan.micro_batch(which)
        else:
            draws = which
        return self._batch(source, draws)

    def _batch(self, source: Source, draws: Sequence[Draw]) -> Batch:
        samples = [source.samples[draw.sample] for draw in draws]
        sizes = {source.sizes[draw.sample] for draw in draws}
        assert len(sizes) == 1, f"one size a micro-batch, not {sizes}"
        size = sizes.pop()
        crops = [self._crop(source, sample, size, draw) for sample, draw in zip(samples, draws, strict=True)]
        flips = [self._flip(source, sample, draw) for sample, draw in zip(samples, draws, strict=True)]
        captions = [self._caption(source, sample, draw) for sample, draw in zip(samples, draws, strict=True)]
        requests = [LatentRequest(*each) for each in zip(samples, [size] * len(draws), crops, flips, strict=True)]
        shape = (self.latent_channels, size[1] // self.vae_factor, size[0] // self.vae_factor)
        return Batch(
            identities=tuple(draw.sample for draw in draws),
            captions=tuple(captions),
            epochs=tuple(draw.epoch for draw in draws),
            crops=tuple(crops),
            flips=tuple(flips),
            is_class=source.is_class,
            t_B=torch.from_numpy(np.array([self.times(self._rng("time", draw)) for draw in draws], dtype=np.int64)),
            noise_BCHW=_stack([self.noise(self._rng("noise", draw), shape) for draw in draws]),
            vae_noise_BCHW=_stack([self._rng("vae", draw).standard_normal(shape, dtype=np.float32) for draw in draws]),
            weights_B=torch.from_numpy(np.array([sample.loss_scale for sample in samples], dtype=np.float32)),
            mask_B1HW=self._masks(requests, shape),
            perturbation_BLD=self._perturbations(draws),
            **self._pictures(requests),
            **self._text(captions),
        )

    # --- draws ---

    def _rng(self, purpose: str, draw: Draw) -> Rng:
        return generator(self.seed, purpose, draw.epoch, draw.sample, draw.repeat)

    def _crop(self, source: Source, sample: Sample, size: Size, draw: Draw) -> Box:
        jitter = source.augmentation.crop_jitter
        if not jitter:
            return crop_box(sample.width, sample.height, size)
        across, down = self._rng("crop", draw).random(2)
        return crop_box(sample.width, sample.height, size, jitter, (across, down))

    def _flip(self, source: Source, sample: Sample, draw: Draw) -> bool:
        share = source.augmentation.flip_of(sample)
        return share > 0.0 and bool(self._rng("flip", draw).random() < share)

    def _caption(self, source: Source, sample: Sample, draw: Draw) -> str:
        share = source.augmentation.dropout_of(sample)
        if share > 0.0 and self._rng("dropout", draw).random() < share:
            return ""
        if source.augmentation.shuffles(sample):
            return shuffle_tags(sample.caption, source.augmentation.keep_tags, self._rng("tags", draw))
        return sample.caption

    # --- inputs of the model ---

    def _pictures(self, requests: Sequence[LatentRequest]) -> dict[str, torch.Tensor]:
        if self.latents is not None:
            return {"moments_BMCHW": _stack([self.latents.moments(request) for request in requests])}
        with quiet_pillow():
            pixels = [pixels_of(r.sample, r.crop, r.size, r.flip, self.alpha_color) for r in requests]
        return {"pixels_BCHW": _stack(pixels)}

    def _masks(self, requests: Sequence[LatentRequest], shape: tuple[int, int, int]) -> torch.Tensor | None:
        if all(request.sample.mask_path is None for request in requests):
            return None
        return _stack([self._mask(request, shape)[None] for request in requests])

    def _mask(self, request: LatentRequest, shape: tuple[int, int, int]) -> np.ndarray:
        if request.sample.mask_path is None:
            return np.ones(shape[1:], dtype=np.float32)
        if self.latents is not None:
            return self.latents.mask(request)
        with quiet_pillow():
            return mask_of(request.sample, request.crop, request.size, request.flip, self.vae_factor)

    def _text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        if self.texts is not None:
            return {"text_BLD": _stack([self.texts.text(caption) for caption in captions])}
        assert self.tokenize is not None
        return {"tokens_BKL": torch.from_numpy(np.ascontiguousarray(self.tokenize(captions, self.chunks)))}

    def _perturbations(self, draws: Sequence[Draw]) -> torch.Tensor | None:
        if self.perturbation is None:
            return None
        assert self.text_shape is not None
        return _stack([self.perturbation(self._rng("perturbation", draw), self.text_shape) for draw in draws])


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.array(arrays))  # of float32 arrays alike a third of np.stack's time


# --- loader ---


class _Reported(Dataset):
    """Errors of the user's data come back as values: torch would paste the worker's traceback into their message."""

    def __init__(self, dataset: MicroBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Item) -> Batch | DataError:
        try:
            return self.dataset[item]
        except DataError as error:
            return error


def _start_worker(worker: int) -> None:
    # Signals are the parent's affair, also when the whole process group gets them: it finishes its update and saves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Loader:
    """An iterator of Batches in the order of `items`; `close()` (or leaving `with`) ends its workers at once."""

    def __init__(
        self,
        dataset: MicroBatches,
        items: Iterable[Item],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        context: str | None = None,
        prefetch: int = 4,
    ) -> None:
        self.num_workers = num_workers
        self._start = partial(_from_workers, dataset, items, num_workers, pin_memory, context, prefetch)
        if not num_workers:  # a DataLoader takes as long as a quarter of a batch from caches
            self._start = partial(_made_here, dataset, items, pin_memory)
        self._iterator: Iterator[Batch | DataError] | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            item = next(self._iterator)
        except (RuntimeError, EOFError, OSError) as error:
            # torch saw that a worker is gone, or it went with a batch half on its way.
            if not self.num_workers or (type(error) is RuntimeError and "worker" not in str(error)):
                raise
            self.close()
            advice = "probably for want of memory: lower num_workers or max_image_megapixels"
            raise DataError(f"a data worker was ended by the system, {advice}") from None
        if isinstance(item, DataError):
            self.close()
            raise item
        return item

    def close(self) -> None:
        self._iterator = iter(())  # the last reference to torch's iterator: it ends its workers

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


_AT_ONCE = 8  # batches from caches: in a row each takes a third of what one by itself does, which finds the CPU's cold


def _made_here(dataset: MicroBatches, items: Iterable[Item], pin_memory: bool) -> Iterator[Batch | DataError]:
    make, items = _Reported(dataset).__getitem__, iter(items)
    count = _AT_ONCE if dataset.latents is not None else 1
    while batches := [make(item) for item in itertools.islice(items, count)]:
        yield from (b.pin_memory() if pin_memory and isinstance(b, Batch) else b for b in batches)


def _from_workers(
    dataset: MicroBatches,
    items: Iterable[Item],
    num_workers: int,
    pin_memory: bool,
    context: str | None,
    prefetch: int,
) -> Iterator[Batch | DataError]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each forked worker warns of it
    with _without_advice(), _without_child_handler():
        loader: DataLoader = DataLoader(
            _Reported(dataset),
            batch_size=None,
            sampler=items,
            num_workers=num_workers,
            pin_memory=pin_memory,
            multiprocessing_context=context or start_method(),
            worker_init_fn=_start_worker,
            prefetch_factor=prefetch,
            generator=torch.Generator(),  # else it draws from the one that optimizers and dropout draw from
        )
        return iter(loader)


def start_method() -> str:
    """Linux forks: at once, and the workers are our own children (a fork server would die of the group's SIGTERM)."""
    return "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def _without_advice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # the number of workers is a setting
        # Python 3.12 warns of forking beside threads; the workers use none of theirs, nor their locks.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


@contextmanager
def _without_child_handler() -> Iterator[None]:
    """torch's handler of SIGCHLD would raise a dead worker's error wherever the parent is, in the middle of a save too;
    without it the error comes from waiting for that worker's batch, within 5 s."""
    ours = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if ours else None
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
