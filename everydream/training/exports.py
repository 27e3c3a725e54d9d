"""The single file that is made from a checkpoint: the original layout, with the run's recipe inside."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from everydream.models.family import read_facts
from everydream.models.writing import single_file
from everydream.training.bag import EMA_FILE, MODEL, as_content
from everydream.training.checkpoint import clean, name_of
from everydream.training.saver import Exports
from everydream.training.storage import Content
from everydream.training.tensorfile import read_tensors

RUN_KEY = "everydream.run"  # in a file's metadata


@dataclass(frozen=True)
class SingleFiles:
    """A run's. `run`: its folder; `recipe`: its settings as JSON; `averaged`: with averaged weights if there are any.

    `folder` may be shared with other runs, whose files stay theirs (`is_shared`).
    """

    run: Path
    folder: Path
    project: str
    dtype: torch.dtype
    recipe: str
    averaged: bool
    is_shared: bool

    def of(self, step: int) -> Exports:
        target = self.folder / f"{self.project}-{name_of(step)}.safetensors"
        if target.exists() and _made_by(target) != self._id:
            target = self.folder / f"{self.run.name}-{name_of(step)}.safetensors"
        return {target: partial(self._make, title=target.stem)}

    def clean(self, step: int) -> None:
        """Remove what a killed process left half-written; of a shared folder only what this run may have left there."""
        with contextlib.suppress(OSError):  # what cannot be removed harms nobody
            clean(self.folder, name=f"{self.project}-{name_of(step) if self.is_shared else 'step-'}")

    def _make(self, checkpoint: Path, *, title: str) -> Content:
        average = checkpoint / EMA_FILE
        made = single_file(
            read_facts(str(checkpoint / MODEL)),
            dtype=self.dtype,
            title=title,
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            metadata={"everydream.recipe": self.recipe, RUN_KEY: self._id},
            replaced=read_tensors(average) if self.averaged and average.is_file() else {},
        )
        return as_content(made)

    @property
    def _id(self) -> str:
        """Of the run, without saying where it lies."""
        return f"{self.run.name}/{hashlib.blake2b(str(self.run.resolve()).encode(), digest_size=4).hexdigest()}"


def _made_by(path: Path) -> str | None:
    """The run that made this file; None where it does not say."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(RUN_KEY)
    except (OSError, SafetensorError):
        return None
