"""What a run's log left in its folder: names, what is read from there, and cutting it back to a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from everydream.training import jsonl
from everydream.training.checkpoint import folders, step_of

SAMPLES = "samples"
EVENTS, METRICS, SCHEDULE = "events.jsonl", "metrics.jsonl", "schedule.jsonl"


def last_checkpoint(folder: Path) -> str:
    """In words, by its name alone: what is there under a checkpoint's name is whole."""
    newest = next(iter(folders(folder / "checkpoints")), None)
    return "there is no checkpoint yet" if newest is None else f"the last checkpoint is step {step_of(newest)}"


def cut_back(folder: Path, step: int) -> dict[str, int]:
    """Before a resume from the checkpoint of `step`: removes what the run logged after it, previews too.

    File → lines removed. Raises OSError where the folder cannot be written.
    """
    for preview_step, path in grid_files(folder).items():
        if preview_step > step:
            path.unlink()
    removed = {name: jsonl.cut_back(folder / name, step) for name in (EVENTS, METRICS, SCHEDULE)}
    return {name: count for name, count in removed.items() if count}


def has_finished(folder: Path) -> bool:
    """Whether the last process that ended in this run folder had nothing left to do."""
    codes = [record.get("code") for record in jsonl.read(folder / EVENTS) if record.get("kind") == "end"]
    return codes[-1:] == [0]


def grid_files(folder: Path) -> dict[int, Path]:
    """Step → the grid of its previews, in a run folder."""
    named = ((re.fullmatch(r"step-(\d+)\.png", path.name), path) for path in (folder / SAMPLES).glob("step-*.png"))
    return {int(name[1]): path for name, path in named if name and path.is_file()}
