"""Where a log's lines go besides its files, each from a thread of its own: trackers, and the report."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everydream.training.console import Console
from everydream.training.worker import Background

if TYPE_CHECKING:
    from everydream.training.log import RunLog
    from everydream.training.trackers import TensorBoard, WandB

CLOSE_SECONDS = 120.0  # for trackers to send what they have; then the run ends without them
REPORT_SECONDS = 60.0  # between two refreshes during training
REPORT_SHARE = 0.01  # and at most this share of the time


class Tracker:
    """One tracker, opened and fed in the background. After its first failure it is told nothing more."""

    def __init__(self, name: str, make: Callable[[], TensorBoard | WandB], log: RunLog) -> None:
        self.name, self.log, self._make = name, log, make
        self._tracker: TensorBoard | WandB | None = None
        self._broken = False
        self._background = Background(f"tracker-{name}", self._failed)

    def do(self, method: str, *arguments: Any) -> None:
        if not self._broken:
            self._background.do(partial(self._call, method, *arguments))

    def _call(self, method: str, *arguments: Any) -> None:
        if self._broken:
            return
        if self._tracker is None:
            self._tracker = self._make()
            if self._tracker.where:
                self.log.event("tracker", f"{self.name}: {self._tracker.where}")
        getattr(self._tracker, method)(*arguments)

    def _finish(self) -> None:
        if self._tracker is not None and not self._broken:
            self._tracker.finish()

    def _failed(self, error: Exception) -> None:
        self._broken = True
        what = f"{self.name} failed and gets nothing more: {type(error).__name__}: {error}"
        todo = f"The run goes on; metrics.jsonl has every number. Turn it off with --no_{self.name}."
        if isinstance(error, ModuleNotFoundError):
            todo = f"Install it (pip install 'everydream[{self.name}]') or turn it off with --no_{self.name}."
        self.log.event("tracker", what, "warning", todo=todo)

    def close(self) -> None:
        if self._background.is_used:
            self._background.do(self._finish)
        if not self._background.close(CLOSE_SECONDS):
            self._failed(TimeoutError(f"not done after {CLOSE_SECONDS:.0f} s"))


def open_tracker(name: str, *arguments: Any) -> TensorBoard | WandB:
    from everydream.training import trackers  # TensorBoard's and W&B's imports take a second

    return trackers.open_tracker(name, *arguments)


class ReportRefresher:
    """Rewrites the report in the background: with each preview, else now and then, and at the end."""

    def __init__(self, report: Callable[[Path], object] | None, folder: Path, log: RunLog) -> None:
        self._write, self._folder, self._log = report, folder, log
        self._background = Background("report", self._failed)
        self._due = time.monotonic() + REPORT_SECONDS
        self._is_waiting = self._has_failed = False

    def refresh(self, now: bool = False) -> None:
        if self._write is None or self._is_waiting or not (now or time.monotonic() >= self._due):
            return
        self._is_waiting = True
        self._background.do(self._work)

    def _work(self) -> None:
        self._is_waiting = False
        if self._has_failed:
            return
        assert self._write is not None
        began = time.monotonic()
        self._write(self._folder)
        took = time.monotonic() - began
        self._due = time.monotonic() + max(REPORT_SECONDS, took / REPORT_SHARE)

    def _failed(self, error: Exception) -> None:
        self._has_failed = True
        self._log.event(
            "report",
            f"report.html cannot be written: {error}",
            "warning",
            todo="The run goes on. Write it later with `python -m everydream.training.report RUN_FOLDER`.",
        )

    def close(self) -> None:
        self._background.close(CLOSE_SECONDS)

    def write(self, console: Console) -> None:
        """The last one, with the run's end in it. Not an event: the end is the last line of events.jsonl."""
        if self._write is None or self._has_failed:
            return
        try:
            self._write(self._folder)
        except Exception as error:
            console.say(f"report.html cannot be written: {error}", "warning")
