"""Batches in the order of a plan's items, made here or in worker processes; errors of the user's data as they are."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from everydream.data.batch import Batch
from everydream.data.dataset import Item, MicroBatches
from everydream.errors import DataError


class _Reported(Dataset):
    """Errors of the user's data come back as values, in turn: torch would paste a traceback into their message."""

    def __init__(self, dataset: MicroBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, item: Item) -> Batch | Exception:
        try:
            return self.dataset[item]
        except DataError as error:
            return error


class _ReportedByWorker(_Reported):
    """Any error, by its traceback: torch would raise it by its class's name, whatever its constructor takes."""

    def __getitem__(self, item: Item) -> Batch | Exception:
        try:
            return super().__getitem__(item)
        except Exception:
            return RuntimeError(f"in a data worker:\n{traceback.format_exc()}")


def _start_worker(worker: int) -> None:
    # Signals are the parent's affair, also when the whole process group gets them: it finishes its update and saves.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


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
        self._start = (
            partial(_from_workers, dataset, items, num_workers, pin_memory, context, prefetch)
            if num_workers
            else partial(_made_here, dataset, items, pin_memory)  # a DataLoader takes a quarter of a batch from caches
        )
        self._iterator: Iterator[Batch | Exception] | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = self._start()
        try:
            item = next(self._iterator)
        except BaseException as error:
            self.close()
            if not self.num_workers or not _is_lost_worker(error):
                raise
            advice = "probably for want of memory: lower num_workers or max_image_megapixels"
            raise DataError(f"a data worker was ended by the system, {advice}") from None
        if isinstance(item, Exception):
            self.close()
            raise item
        return item

    def close(self) -> None:
        iterator: Any = self._iterator
        self._iterator = iter(())
        if hasattr(iterator, "_shutdown_workers"):  # by hand: while an error is told its traceback keeps the iterator
            iterator._shutdown_workers()
            for worker in iterator._workers:  # they do not hear SIGTERM, and the end of the program waits for them
                worker.kill()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_lost_worker(error: BaseException) -> bool:
    """torch saw that a worker is gone, or it went with a batch half on its way."""
    return isinstance(error, EOFError | OSError) or (isinstance(error, RuntimeError) and "worker" in str(error))


_AT_ONCE = 8  # batches from caches: in a row each takes a third of what one by itself does, which finds the CPU's cold


def _made_here(dataset: MicroBatches, items: Iterable[Item], pin_memory: bool) -> Iterator[Batch | Exception]:
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
) -> Iterator[Batch | Exception]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else each forked worker warns of it
    with _without_advice(), _without_child_handler():
        loader: DataLoader = DataLoader(
            _ReportedByWorker(dataset),
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
