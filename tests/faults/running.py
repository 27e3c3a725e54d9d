"""Runs of the trainer on a tiny model, in this process or launched; and what is left of a run when it has ended."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from everydream.training import lock
from everydream.training.checkpoint import folders, verify
from everydream.training.runfolder import runs
from tests.tiny import make_pictures, make_tiny_model
from tests.training.runs import clean_process

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"time", "images_per_s", "data_wait_s", "memory_bytes"}  # what two equal runs may differ in

CAPTIONS = ["a sks star on a red bar", "a star, red", "the sks bar", "red star, sks, the bar"]


class World:
    """A folder with a tiny model and pictures of two shapes; each run has its settings file and a logdir of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_tiny_model(folder / "model")
        make_pictures(folder / "pictures", 7, size=[(64, 64), (96, 48)], captions=CAPTIONS)
        make_pictures(folder / "class", 4, captions="a red star", seed=1)
        (folder / "prompts.json").write_text('{"steps": 2, "size": [32, 32], "prompts": ["a sks star"]}')

    def settings(self, name: str, optimizer: dict[str, Any] | None = None, **changes: Any) -> Path:
        """A train.json for the runs in `logs/<name>`."""
        path = self.folder / f"{name}.json"
        optimizer_file = self.folder / f"{name}.optimizer.json"
        optimizer_file.write_text(json.dumps(optimizer or {"optimizer": "adamw", "lr": 1e-3}))
        settings = {
            "project_name": "faults", "logdir": f"logs/{name}", "seed": 5, "cache_dir": "cache",
            "base_model": "model", "data_root": "pictures", "optimizer_config": str(optimizer_file),
            "max_steps": 6, "batch_size": 2, "num_workers": 0, "scan_workers": 0, "log_step": 1,
            "save_every_n_epochs": 0, "save_every_n_steps": 2, "tensorboard": False, "sample_steps": 0,
        }  # fmt: skip
        path.write_text(json.dumps({**settings, **changes}))
        return path

    def train(self, config: Path, *arguments: str, at: dict[int, Callable[[], object]] | None = None) -> int:
        """The exit code. `at`: what happens right after the update that makes the step this number."""
        from everydream.config.resolve import resolve
        from everydream.training import run

        torch.manual_seed(torch.initial_seed() ^ 12345)  # whatever the process drew before must not matter
        with clean_process(), happening(at or {}):
            try:
                return run.run(resolve(["--config", str(config), "--quiet", *arguments], {}))
            finally:
                lock.release_all()  # as the end of the process would

    def logdir(self, config: Path) -> Path:
        return self.folder / "logs" / config.stem


def stop(signum: int = signal.SIGTERM) -> Callable[[], object]:
    return lambda: os.kill(os.getpid(), signum)


@contextmanager
def happening(at: dict[int, Callable[[], object]]) -> Iterator[None]:
    from everydream.training.turns import Trainer

    advance = Trainer.advance

    def and_then(self: Trainer, *arguments: Any) -> None:
        advance(self, *arguments)
        at.get(self.state.step, lambda: None)()

    with mock.patch.object(Trainer, "advance", and_then):
        yield


# What is left


def newest_run(logdir: Path) -> Path:
    return runs(logdir)[0].folder


def lines(path: Path) -> list[dict[str, Any]]:
    """Without the fields that tell the time."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def newest_checkpoint(run: Path) -> Path:
    path = folders(run / "checkpoints")[0]
    assert verify(path) == []
    return path


def assert_same_run(one: Path, other: Path) -> None:
    """The newest checkpoints byte for byte, every line of metrics.jsonl and schedule.jsonl, previews."""
    a, b = newest_checkpoint(one), newest_checkpoint(other)
    assert a.name == b.name
    manifests = [json.loads((path / "MANIFEST.json").read_bytes())["files"] for path in (a, b)]
    differing = [name for name in manifests[0].keys() | manifests[1].keys()
                 if manifests[0].get(name) != manifests[1].get(name)]  # fmt: skip
    assert not differing, f"not the same bytes: {differing}"
    for name in ("metrics.jsonl", "schedule.jsonl"):
        assert lines(one / name) == lines(other / name), name
    pictures = [{p.relative_to(run): p.read_bytes() for p in (run / "samples").rglob("*.png")} for run in (one, other)]
    assert pictures[0] == pictures[1]
