"""Preview pictures during training: grids in samples/, for the trackers and the report. A failure never ends a run."""

from __future__ import annotations

import contextlib
import gc
import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from everydream.errors import ConfigError, Stopped
from everydream.runtime import no_compiled_code
from everydream.training import grids, prompts, sampling
from everydream.training.divided import divided, on_main
from everydream.training.prompts import Picture, Sampling
from everydream.training.records import SAMPLES, grid_files
from everydream.training.sampling import Parts
from everydream.training.storage import Bytes, write_atomically

if TYPE_CHECKING:
    from everydream.runtime import Ranks
    from everydream.training.log import NullLog

BEFORE_AFTER = "before_after.png"
BATCH_SIZE = 4  # pictures at a time; halved where memory does not do


class NoPreviews:
    """Previews off."""

    def __call__(self, step: int) -> list[Path]:
        return []

    def before_after(self) -> Path | None:
        return None


class Previews(NoPreviews):
    """`parts()`: the model as it is now; let go after each use. `prompts_file` is read anew each time. `stop()`: the
    signal to stop for, or 0. All processes must call; rank 0 writes `samples/step-….png` in `folder`. The training's
    randomness is untouched.
    """

    def __init__(
        self,
        prompts_file: Path,
        folder: Path,
        parts: Callable[[], Parts],
        log: NullLog,
        ranks: Ranks,
        *,
        defaults: Sampling,
        captions: Sequence[str] = (),
        batch_size: int = BATCH_SIZE,
        autocast: sampling.Autocast = contextlib.nullcontext,
        stop: Callable[[], int] = lambda: 0,
    ) -> None:
        self.prompts_file, self.folder, self.parts = prompts_file, folder, parts
        self.log, self.ranks, self.defaults, self.captions = log, ranks, defaults, captions
        self._told: set[str] = set()
        self.batch_size, self.autocast, self.stop = batch_size, autocast, stop

    def __call__(self, step: int) -> list[Path]:
        """The grid's path, on rank 0; nothing where there is none: a broken prompts file, a signal, no memory."""
        try:
            pictures = on_main(self.ranks, lambda: prompts.read(self.prompts_file, self.defaults, self.captions))
            with untouched_randomness(), no_compiled_code():
                made = self._make(pictures)
        except ConfigError as error:
            self._warn(str(error), "Mend the file: it is read again for the next preview. Training goes on.")
            return []
        except Stopped:
            return []
        finally:
            release_memory()
        return self._write(step, pictures, made) if self.ranks.is_main else []

    def _make(self, pictures: Sequence[Picture]) -> list[bytes | str]:
        """For each picture a PNG, or why there is none."""
        parts = self.ranks.together(self.parts)
        self._mention_long(parts, pictures)
        self.batch_size = min(self.ranks.gather(self.batch_size))  # one process may have run out of memory before
        todo = sampling.batches(pictures, self.batch_size)
        with self.log.task("preview", len(pictures)) as advance, parts.evaluating():
            done = divided(
                self.ranks,
                todo,
                lambda batch: self._batch(parts, [pictures[i] for i in batch]),
                self.stop,
                lambda results: advance(sum(map(len, results))),
            )
        made: dict[int, bytes | str] = {}
        for batch, results in zip(todo, done, strict=True):
            made |= dict(zip(batch, results, strict=True))
        return [made[i] for i in range(len(pictures))]

    def _batch(self, parts: Parts, pictures: Sequence[Picture]) -> list[bytes | str]:
        try:
            images = sampling.sample(parts, pictures, autocast=self.autocast, stopping=lambda: bool(self.stop()))
            return [_png(image) for image in images]
        except sampling.Interrupted:
            raise Stopped(self.stop()) from None
        except torch.OutOfMemoryError as error:
            if len(pictures) == 1:
                return [str(error).splitlines()[0]]
        except Exception as error:  # one prompt's trouble is not the others'
            return [f"{type(error).__name__}: {error}"] * len(pictures)
        # Outside the handler, which would keep the failed batch's tensors alive.
        release_memory()
        self.batch_size = max(1, len(pictures) // 2)
        return [result for picture in pictures for result in self._batch(parts, [picture])]

    def _write(self, step: int, pictures: Sequence[Picture], made: Sequence[bytes | str]) -> list[Path]:
        from PIL import Image

        cells, failures = [], {}
        for picture, result in zip(pictures, made, strict=True):
            if isinstance(result, str):
                failures[picture.prompt] = result
                continue
            note = f"guidance {picture.guidance:g} · seed {picture.seed}"
            cells.append(grids.Cell(Image.open(io.BytesIO(result)), picture.prompt, note, picture.facts()))
        if failures:
            listed = "; ".join(f"{prompt!r}: {reason}" for prompt, reason in failures.items())
            self._warn(f"{len(failures)} prompts gave no picture: {listed}", "Training goes on. " + advice(listed))
        if not cells:
            return []
        columns = guidance_columns(pictures)
        image, facts = grids.draw(cells, f"step {step}", columns)
        path = self.folder / SAMPLES / f"step-{step:010d}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, Bytes(grids.png(image, {"step": step, "cells": facts})))
        except OSError as error:
            reason = error.strerror or str(error)
            todo = "Training goes on: free disk space or make it writable."
            self._warn(f"{path.parent}: previews cannot be written: {reason}", todo)
            return []
        self.log.event("preview", f"Preview: {path}", "debug", step=step, path=str(path.relative_to(self.folder)))
        self.log.images(step, "preview", [path])
        return [path]

    def before_after(self) -> Path | None:
        """Rank 0, at the end of the run: the first and the last previews, one above the other."""
        steps = grid_files(self.folder)
        if not self.ranks.is_main or len(steps) < 2:
            return None
        path = self.folder / SAMPLES / BEFORE_AFTER
        try:
            image = grids.before_after(steps[min(steps)], steps[max(steps)])
            if image is None:
                return None
            write_atomically(path, Bytes(grids.png(image, {})))
        except (OSError, ValueError, KeyError) as error:
            self._warn(f"{path}: {error}", "The previews themselves are beside it.")
            return None
        return path

    def _mention_long(self, parts: Parts, pictures: Sequence[Picture]) -> None:
        for text in dict.fromkeys(p.prompt for p in pictures):
            if self.ranks.is_main and parts.is_too_long(text):
                self._warn(
                    f"prompt {text[:60]!r}… has more tokens than the model reads", "Only its start is used: shorten it."
                )

    def _warn(self, what: str, todo: str) -> None:
        if what not in self._told:  # the same trouble at each preview is one trouble
            self._told.add(what)
            self.log.event("preview", what, "warning", todo=todo)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def advice(reason: str) -> str:
    is_memory = "out of memory" in reason.lower() or "allocate" in reason.lower()
    return "Ask for smaller pictures in the prompts file." if is_memory else "Leave these prompts out."


def guidance_columns(pictures: Sequence[Picture]) -> int | None:
    """A row a prompt where each was asked for with several guidances; else as it fits."""
    rows: dict[tuple[Any, ...], int] = {}
    for picture in pictures:
        facts: Mapping[str, Any] = {**picture.facts(), "guidance": None}
        rows[tuple(facts.values())] = rows.get(tuple(facts.values()), 0) + 1
    counts = set(rows.values())
    return counts.pop() if len(counts) == 1 and max(counts) > 1 else None


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Python's, numpy's and torch's global generators (all devices) are as they were, whatever happens inside."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)


def release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
