"""What a run tells: events.jsonl and metrics.jsonl for machines, the console for a person, trackers, the report.

Rank 0 has a RunLog, the others a NullLog. No failure of any of these ends a run: each is reported once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from everydream.runtime import StopRequest
from everydream.training import jsonl
from everydream.training.console import Advance, Console
from everydream.training.outlets import ReportRefresher, Tracker, open_tracker
from everydream.training.progress import Progress
from everydream.training.records import EVENTS, METRICS, SCHEDULE, last_checkpoint

LEVELS = ("debug", "info", "warning", "error")
LOST = (3, 5)  # exit codes of runs that end with steps that no checkpoint has


class NullLog:
    """A log that keeps the newest metrics and tells nobody: for ranks other than 0, and for tests."""

    def __init__(self) -> None:
        self.step = 0
        self.folder: Path | None = None
        self.latest: dict[str, float] = {}  # metric → its newest value
        self.steps: dict[str, int] = {}  # metric → the step of that value

    def start(self, step: int, max_steps: int, max_epochs: int | None = None, memory_total: int | None = None) -> None:
        """Training begins, or goes on, at `step`."""
        self.step = step

    def event(
        self, kind: str, message: str = "", level: str = "info", *, todo: str = "", show: bool = True, **fields: Any
    ) -> None:
        """Something happened. A warning or an error says with `todo` what to do about it. `show`: on the console."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, and what the trackers get."""
        self.step = step
        self.latest.update(values)
        self.steps.update(dict.fromkeys(values, step))

    def progress(self, step: int, values: Mapping[str, float] | None = None) -> None:
        """Once an update; cheap. `values` as for metrics, those that are known."""
        self.step = step

    def schedule(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Lines of schedule.jsonl."""

    def images(self, step: int, name: str, paths: Iterable[Path]) -> None:
        """Pictures that were written, for the trackers and the report."""

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A bar for work beside the training: `with log.task("caching latents", 64) as advance: advance(4)`."""
        yield lambda n: None

    def sync(self) -> None:
        """Before a checkpoint: what was logged up to it survives a power cut with it."""

    def close(self, code: int, reason: str) -> None:
        """The run is over: exit code and why, the last line of events.jsonl."""


class RunLog(NullLog):
    """`settings`: name → {"value", "origin"}. `trackers`: names of trackers.TRACKERS, opened in the background with the
    first metrics (their imports take seconds). `report(folder)` writes the run's report. `resumed_step`: the checkpoint
    this run goes on from; metrics, events and schedule are to be cut back to it before (`cut_back`)."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        project: str = "everydream",
        run_name: str | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        trackers: Sequence[str] = (),
        report: Callable[[Path], object] | None = None,
        resumed_step: int | None = None,
    ) -> None:
        super().__init__()
        self.folder: Path = folder
        self.console = console
        self.step = resumed_step or 0
        self._files = {name: jsonl.JsonLines(folder / name) for name in (EVENTS, METRICS, SCHEDULE)}
        self._lock = threading.RLock()  # trackers report their failures from a thread of their own
        self._failing: set[str] = set()
        self._closed = self._ended = False
        self._trackers = [
            Tracker(
                name,
                partial(open_tracker, name, folder, project, run_name or folder.name, resumed_step, settings or {}),
                self,
            )
            for name in trackers
        ]
        self._report = ReportRefresher(report, folder, self)
        StopRequest.last_words = self._last_words

    def start(self, step: int, max_steps: int, max_epochs: int | None = None, memory_total: int | None = None) -> None:
        super().start(step, max_steps, max_epochs, memory_total)
        self.console.start(Progress(step, max_steps, max_epochs, memory_total))
        self.event("training", max_steps=max_steps, max_epochs=max_epochs)

    def event(
        self, kind: str, message: str = "", level: str = "info", *, todo: str = "", show: bool = True, **fields: Any
    ) -> None:
        assert level in LEVELS, level
        assert todo or LEVELS.index(level) < LEVELS.index("warning"), f"{kind}: a {level} says what to do"
        if message and show:
            self.console.say(f"{message}\n  {todo}" if todo else message, level)
        self._write(EVENTS, [{**self._record(kind, level, message), **({"todo": todo} if todo else {}), **fields}])

    def _record(self, kind: str, level: str = "info", message: str = "") -> dict[str, Any]:
        return {"time": utc_now(), "step": self.step, "kind": kind, "level": level, "message": message}

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        super().metrics(step, values)
        self.console.update(step, values)
        self._write(METRICS, [{"step": step, **values}])
        numbers = {name: float(value) for name, value in values.items()}
        for tracker in self._trackers:
            tracker.do("log", numbers, step)
        self._report.refresh()

    def progress(self, step: int, values: Mapping[str, float] | None = None) -> None:
        super().progress(step, values)
        self.console.update(step, values or {})

    def schedule(self, records: Sequence[Mapping[str, Any]]) -> None:
        self._write(SCHEDULE, records)

    def images(self, step: int, name: str, paths: Iterable[Path]) -> None:
        for i, path in enumerate(paths):
            label = name if i == 0 else f"{name}/{i}"
            for tracker in self._trackers:
                tracker.do("log_image_file", label, path, step)
        self._report.refresh(now=True)

    @contextlib.contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        with self.console.task(title, total) as advance:
            yield advance

    def sync(self) -> None:
        for name, file in self._files.items():
            if file.path.exists():
                self._told(name, file.sync())

    def close(self, code: int, reason: str) -> None:
        if self._closed:
            return
        self._closed = True
        self.console.close()
        for tracker in self._trackers:
            tracker.close()
        self._report.close()
        if code in LOST:
            newest = last_checkpoint(self.folder)
            self.console.say(newest, "warning")
            reason += f"; {newest}"
        self._ended = True
        self.event("end", reason if code == 0 else "", code=code, reason=reason)
        StopRequest.last_words = StopRequest.nothing_saved
        self._report.write(self.console)

    def _last_words(self) -> str:
        """Of a run that ends this instant, in a signal's handler: no lock is waited for, nothing of ours is flushed."""
        if self._ended:
            return ""
        reason = f"stopped without saving; {last_checkpoint(self.folder)}"
        with contextlib.suppress(OSError):
            jsonl.append_now(self.folder / EVENTS, {**self._record("end"), "code": 130, "reason": reason})
        return reason

    def _write(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._told(name, self._files[name].write(records))

    def _told(self, name: str, error: OSError | None) -> None:
        """Says once that a file cannot be written, and once that it can again."""
        if error is None and name in self._failing:
            self._failing.discard(name)
            self.event("log", f"{name} is written again, with the lines that waited")
        elif error is not None and name not in self._failing:
            self._failing.add(name)
            self.event(
                "log",
                f"{self._files[name].path} cannot be written: {error.strerror}",
                "warning",
                todo="The run goes on, and lines are kept in memory: free disk space or make the folder writable.",
            )


def utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
