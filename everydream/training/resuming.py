"""Where a run begins: a new folder, or a checkpoint of an old one whose settings and pictures still agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from everydream.data.fingerprint import Fingerprint
from everydream.data.fingerprint import changes as data_changes
from everydream.errors import CheckpointError, ConfigError, DataError, SaveError
from everydream.runtime import Ranks
from everydream.training.bag import DATA, MODEL, read_state
from everydream.training.checkpoint import clean
from everydream.training.divided import on_main
from everydream.training.records import cut_back
from everydream.training.retention import supersede
from everydream.training.runfolder import Run, make_run, resolve_resume
from everydream.training.state import TrainState


@dataclass(frozen=True)
class Start:
    """`checkpoint` None: from the base model; `anew`: although a resume was asked for, and why."""

    folder: Path | None = None  # of the run that goes on
    checkpoint: Path | None = None
    state: TrainState = field(default_factory=TrainState)
    seed: int | None = None  # of the run that goes on
    anew: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def model(self) -> str | None:
        """All parts come from the checkpoint; the base model is not read again."""
        return None if self.checkpoint is None else str(self.checkpoint / MODEL)


def find_start(resume: str | None, logdir: Path, project_name: str, ranks: Ranks) -> tuple[Start, Run | None]:
    """What --resume points at; rank 0 holds the run's lock from here on. Raises ConfigError, CheckpointError."""
    run: list[Run] = []

    def find() -> Start:
        if resume is None:
            return Start()
        found = resolve_resume(resume, logdir, project_name)
        skipped = tuple(map(str, found.skipped))
        if found.run is None or found.checkpoint is None:
            if found.run is not None:
                found.run.lock.release()
            return Start(anew=found.note, warnings=skipped)
        run.append(found.run)
        state = read_state(found.checkpoint)
        seed = found.run.record_at(state.step)["settings"]["seed"]["value"]
        return Start(found.run.folder, found.checkpoint, state, seed, warnings=skipped)

    start: Start = on_main(ranks, find)
    return start, run[0] if run else None


def check_settings(start: Start, record: Mapping[str, Any], changes: Any, resume_changed: bool) -> list[str]:
    """Lines to print on what changed since the run was started. Raises ConfigError on what makes it another run."""
    if start.folder is None:
        return []
    run = Run(start.folder)
    try:
        safe, refused = changes(run.record_at(start.state.step), record)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run.config} is not whole ({type(error).__name__}: {error}): put a copy back"
        ) from error
    if refused and not resume_changed:
        raise ConfigError(
            [
                f"these settings are not those of the run in {start.folder}:",
                *(f"  {line}" for line in refused),
                "Set them back, or add --resume_changed to go on with the new ones.",
            ]
        )
    return [f"changed since the run was started: {line}" for line in (*safe, *refused)]


def check_data(start: Start, name: str, now: Fingerprint, accept: bool) -> list[str]:
    """Lines to print on changed pictures that were accepted. Raises DataError with the list of those that were not."""
    if start.checkpoint is None:
        return []
    before = json.loads((start.checkpoint / DATA).read_bytes()).get(name)
    if before is None:  # class pictures that --resume_changed brings in
        return []
    lines = data_changes(before, now).lines()
    if lines and not accept:
        raise DataError(
            [
                f"{name} pictures or captions are not those that {start.checkpoint} was trained on:",
                *(f"  {line}" for line in lines),
                "Put them back, or add --accept_data_changes to go on with the new ones from the next epoch.",
            ]
        )
    return lines


def what_differs(start: Start, processes: int, threads: int) -> list[str]:
    """What makes a resume equal only up to rounding."""
    if start.checkpoint is None:
        return []
    was = {"processes": start.state.processes, "threads a process": start.state.threads}
    now = {"processes": processes, "threads a process": threads}
    return [
        f"resumed with {now[what]} {what}, the checkpoint was written with {was[what]}: the pictures and noise are the "
        "same, sums are rounded differently"
        for what in was
        if was[what] is not None and was[what] != now[what]
    ]


def begin_run(
    start: Start, run: Run | None, record: Mapping[str, Any], logdir: Path, project_name: str, ranks: Ranks
) -> tuple[Path, Run | None]:
    """The run's folder, on all processes: a new one, or the old one cut back to the checkpoint. Raises SaveError."""

    def begin() -> tuple[Path, Run]:
        if run is None:
            made = make_run(logdir, project_name, project_name, record)
            return made.folder, made
        run.lock.sign()
        try:
            clean(run.checkpoints)
            run.write_config(record, start.state.step)  # before all that cannot be taken back: a full disk shows here
            supersede(run.checkpoints, start.state.step)
            cut_back(run.folder, start.state.step)
        except OSError as error:
            raise SaveError(f"cannot go on in {run.folder}: {error.strerror or error}") from error
        return run.folder, run

    made: list[Run] = []

    def on_rank_0() -> Path:
        folder, mine = begin()
        made.append(mine)
        return folder

    folder: Path = on_main(ranks, on_rank_0)
    return folder, made[0] if made else None
