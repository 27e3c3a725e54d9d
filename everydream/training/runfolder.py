"""A run's folder: made with mkdir and never overwritten, one process at a time, found again by its project.

Runs are ordered by a counter in their config.json; the time in a folder's name is a label, for clocks go wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from everydream.errors import CheckpointError, ConfigError, SaveError
from everydream.training.checkpoint import MANIFEST, Skipped, find_latest, folders, step_of, verify
from everydream.training.lock import Lock
from everydream.training.storage import DISK, Bytes, Files, make_folders, removed_on_error, write_atomically

CONFIG = "config.json"
AVERAGE, MODEL = "ema.safetensors", "model"  # in a checkpoint


@dataclass(frozen=True)
class Run:
    """One run's folder and the names in it."""

    folder: Path
    lock: Lock = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lock", Lock(self.folder / ".lock"))

    @property
    def config(self) -> Path:
        return self.folder / CONFIG

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def about(self) -> dict[str, Any]:
        """Counter, project and time of creation, from config.json; empty where there is none."""
        try:
            about = json.loads(self.config.read_bytes())["run"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}
        return about if isinstance(about, dict) else {}

    @property
    def counter(self) -> int:
        counter = self.about.get("counter")
        return counter if type(counter) is int else 0

    def record_at(self, step: int) -> dict[str, Any]:
        """The record of the settings that a checkpoint of this step was trained with. Raises CheckpointError."""
        try:
            content = json.loads(self.config.read_bytes())
            earlier = [one for one in content["run"].get("earlier", []) if step <= one["until_step"]]
            record = {**content, **earlier[0]} if earlier else content
            record["settings"]["seed"]["value"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.config} is not whole ({type(error).__name__}: {error}): what this run was trained with is not "
                "known. Put a copy of it back, or start anew with base_model set to a checkpoint's model folder"
            ) from error
        return record

    def write_config(self, record: Mapping[str, Any], step: int, files: Files = DISK) -> None:
        """The settings from `step` on. Those of the checkpoints until then stay, where they are others."""
        about, before = self.about, self.record_at(step)
        earlier = [one for one in about.pop("earlier", []) if one["until_step"] < step]
        if _values(before) != _values(record):
            earlier.append({"until_step": step, **{key: before[key] for key in ("processes", "settings")}})
        about |= {"earlier": earlier} if earlier else {}
        _write_json(self.config, {**record, "run": about}, files)


def make_run(
    logdir: Path,
    name: str,
    project_name: str,
    record: Mapping[str, Any],
    *,
    now: datetime | None = None,
    files: Files = DISK,
) -> Run:
    """A new run's folder `<name>-<UTC time>[-n]`, with its config.json, locked. Raises SaveError."""
    now = now or datetime.now(timezone.utc)
    try:
        make_folders(files, logdir)
        run = Run(_make_new(logdir, f"{name}-{now:%Y%m%d-%H%M%S}", files))
        about = {"counter": 1 + max((run.counter for run in runs(logdir)), default=0), "project_name": project_name}
        with removed_on_error(run.folder, files), contextlib.ExitStack() as on_error:
            run.lock.take()
            on_error.callback(run.lock.release)
            _write_json(run.config, {**record, "run": {**about, "created": now.isoformat(timespec="seconds")}}, files)
            on_error.pop_all()
    except OSError as error:
        raise SaveError(f"cannot make a run folder in {logdir}: {error.strerror or error}") from error
    return run


def _make_new(logdir: Path, name: str, files: Files) -> Path:
    for n in itertools.count(1):
        folder = logdir / (name if n == 1 else f"{name}-{n}")
        with suppress(FileExistsError):
            files.make_folder(folder)
            files.sync_folder(logdir)
            return folder
    raise AssertionError


def _values(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: entry["value"] for key, entry in record["settings"].items()} | {"": record.get("processes")}


def _write_json(path: Path, content: Mapping[str, Any], files: Files) -> None:
    write_atomically(path, Bytes(json.dumps(content, indent=1, ensure_ascii=False).encode()), files)


def runs(logdir: Path, project_name: str | None = None) -> list[Run]:
    """The runs in a folder, newest first; one project's, or all."""
    if not logdir.is_dir():
        return []
    found = [(run.about, run) for run in map(Run, logdir.iterdir()) if run.about]
    chosen = [run for about, run in found if project_name in (None, about.get("project_name"))]
    return sorted(chosen, key=lambda run: (run.counter, run.folder.name), reverse=True)


# Models


def model_in(name: str) -> tuple[str, Path]:
    """What scripts take as MODEL → what to read of it, and where its averaged weights would be.

    A run's folder stands for its newest whole checkpoint; what is neither that nor a checkpoint stays as it is. Raises
    CheckpointError for a run without a whole one.
    """
    path = Path(name)
    if (path / "checkpoints").is_dir():
        found = find_latest(path / "checkpoints")
        if found.path is None:
            raise CheckpointError(f"MODEL: {path} has no valid checkpoint: python scripts/show.py {path} says why")
        path = found.path
    is_checkpoint = (path / MODEL / "model_index.json").is_file()
    return str(path / MODEL) if is_checkpoint else name, path / AVERAGE


def require_average(path: Path) -> Path:
    """Raises ConfigError where MODEL has no averaged weights."""
    if not path.is_file():
        raise ConfigError(f"--average: {path} is not there: only checkpoints of runs with ema_decay_rate have one")
    return path


def title_of(model: str) -> str:
    """A model's name for people: of a checkpoint, its run and step."""
    folder = Path(model).absolute()
    step = step_of(folder.parent)
    if folder.name != MODEL or step is None or folder.parents[1].name != "checkpoints":
        return Path(model).name
    return f"{folder.parents[2].name}, step {step}"


# Resuming


@dataclass(frozen=True)
class Resume:
    """What --resume points at. Without a checkpoint there is nothing to go on from: start anew, and say `note`."""

    run: Run | None
    checkpoint: Path | None
    skipped: tuple[Skipped, ...] = ()
    note: str = ""


def resolve_resume(resume: str, logdir: Path, project_name: str) -> Resume:
    """`latest`, a run's folder, or a checkpoint → the run, locked, and the checkpoint to go on from.

    Raises ConfigError (no such path, or another process is in that run), CheckpointError (some checkpoints, none
    valid: nothing is touched).
    """
    if resume == "latest":
        found = runs(logdir, project_name)
        refuse_nameless(logdir, project_name)
        if not found:
            others = sorted({str(run.about.get("project_name")) for run in runs(logdir)})
            there = f" (runs of {', '.join(map(repr, others))} are there)" if others else ""
            return Resume(None, None, note=f"no run of {project_name!r} in {logdir} yet: starting anew{there}")
        return _latest_of(found[0], found[1:])
    path = Path(resume)
    if not path.is_dir():
        raise ConfigError(f"resume: {path} is not a folder. Give 'latest', a run's folder, or one of its checkpoints")
    path = path.resolve()
    if (path / CONFIG).is_file() and not (path / MANIFEST).exists():
        return _latest_of(Run(path))
    run = Run(path.parent.parent)
    if step_of(path) is None or not run.config.is_file():
        raise ConfigError(
            f"resume: {path} is neither a run's folder (with {CONFIG}) nor a checkpoint in one "
            "(<run>/checkpoints/step-…)"
        )
    return _this_one(run, path)


def refuse_nameless(logdir: Path, project_name: str) -> None:
    """Raises CheckpointError where a folder called like this project's runs holds checkpoints, and no config.json that
    tells when it was made: it may be the latest."""
    its_runs = re.compile(re.escape(project_name) + r"-\d{8}-\d{6}(-\d+)?")
    for path in sorted(logdir.iterdir()) if logdir.is_dir() else ():
        run = Run(path)
        if its_runs.fullmatch(path.name) and folders(run.checkpoints) and not run.about:
            raise CheckpointError(
                f"{run.config} is missing or not whole, so that the latest run cannot be told. Put a copy of it back, "
                "move the folder away, or name the run with --resume"
            )


def _latest_of(run: Run, older: Sequence[Run] = ()) -> Resume:
    run.lock.take(sign=False)  # nothing is touched before it is known that the run goes on
    found = find_latest(run.checkpoints)
    if found.path:
        return Resume(run, found.path, found.skipped)
    run.lock.release()
    if found.skipped:
        lines = "\n".join(f"  {skipped}" for skipped in found.skipped)
        raise CheckpointError(
            f"{run.folder} has no valid checkpoint:\n{lines}\nNothing was changed. Start anew without --resume."
        )
    before = next((other.folder for other in older if folders(other.checkpoints)), None)
    there = f" (an older run has: --resume {before})" if before else ""
    return Resume(run, None, note=f"{run.folder} has no checkpoint yet: starting anew{there}")


def _this_one(run: Run, checkpoint: Path) -> Resume:
    run.lock.take(sign=False)
    problems = verify(checkpoint)
    if not problems:
        return Resume(run, checkpoint)
    run.lock.release()
    others = ", ".join(path.name for path in folders(run.checkpoints) if path != checkpoint and not verify(path))
    raise CheckpointError(f"{Skipped(checkpoint, tuple(problems))}\nValid ones of this run: {others or 'none'}")
