"""Whole runs in this process, on a tiny model: what a launch does, without its start."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from everydream.config.cli import settings_or_exit


@contextmanager
def clean_process() -> Iterator[None]:
    """Accelerate keeps its state in singletons, and a run installs signal handlers."""
    from accelerate.state import AcceleratorState, PartialState

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(*argv: object) -> int:
    """One run; returns its exit code."""
    from everydream.training.run import run

    torch.manual_seed(torch.initial_seed() ^ 12345)  # whatever the process drew before must not matter
    with clean_process():
        try:
            resolved = settings_or_exit([str(word) for word in argv])
        except SystemExit as end:
            return int(end.code or 0)
        return run(resolved)


def options(model: Path, pictures: Path, folder: Path, **settings: Any) -> list[str]:
    """Command-line words for a short, quiet run into `folder`."""
    chosen = {
        "base_model": model,
        "data_root": pictures,
        "logdir": folder / "logs",
        "cache_dir": folder / "cache",
        "batch_size": 2,
        "max_steps": 6,
        "log_step": 1,
        "lr": 1e-3,
        "save_every_n_epochs": 0,
        "save_single_file": False,
        "tensorboard": False,
        "quiet": True,
        **settings,
    }
    words = []
    for key, value in chosen.items():
        text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
        words += [f"--{key}", text]
    return words


def only_run(folder: Path) -> Path:
    runs = sorted(path for path in (folder / "logs").iterdir() if path.is_dir())
    assert len(runs) == 1, runs
    return runs[0]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TIMES = ("images_per_s", "data_wait_s", "memory_bytes")


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the machine says."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines(run / "metrics.jsonl")]


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    from safetensors.torch import load_file

    return {
        f"{path.relative_to(checkpoint)}:{name}": tensor
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]
    assert not different, different[:5]
