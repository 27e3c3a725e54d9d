"""Where an update's time goes: a table of phases, and a trace of torch.profiler. `--profile_steps N`.

The first WARM_UP updates are left out (allocators, kernels, compiled graphs), N are timed, then TRACED traced: the
profiler itself slows a step down (twofold on a small model on a CPU), so the timed ones run without it.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everydream.training.log import NullLog

WARM_UP = 3
TRACED = 1  # an update of a small UNet is some 30,000 events, seconds to write and 1 MB of gzipped JSON
PHASES = ("data wait", "forward", "backward", "agree", "optimizer", "ema", "validation", "preview", "save")


class NoProfile:
    """Costs nothing: `with profile("forward"):` gives one shared empty context."""

    _nothing = contextlib.nullcontext()

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[None]:
        return self._nothing

    def step(self) -> None:
        """An update and its turn are done."""

    def close(self) -> None:
        """The run is over, maybe before N updates."""


class Profile(NoProfile):
    """`folder` is made when there is a result. The device is waited for at a phase's borders: its time is its own."""

    def __init__(self, steps: int, folder: Path, log: NullLog, device_type: str) -> None:
        self.steps, self.folder, self.log, self.device_type = steps, folder, log, device_type
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.updates = 0  # timed so far
        self.total_s = 0.0
        self._seen = 0  # updates since the start, warm-up included
        self._open: list[float] = []  # seconds of phases inside each open phase: a phase's time is its own
        self._began = 0.0
        self._tracer: Any = None
        self._is_done = self._has_failed = False

    def synchronize(self) -> None:
        if self.device_type == "cuda":
            import torch

            torch.cuda.synchronize()

    @property
    def is_timing(self) -> bool:
        return WARM_UP <= self._seen < WARM_UP + self.steps

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self.synchronize()
        began = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            self.synchronize()
            took = time.perf_counter() - began
            self.seconds[phase] = self.seconds.get(phase, 0.0) + took - self._open.pop()
            if self._open:
                self._open[-1] += took

    def __call__(self, phase: str) -> contextlib.AbstractContextManager[Any]:
        if self.is_timing:
            return self._timed(phase)
        if self._tracer is not None:
            from torch.profiler import record_function

            return record_function(f"phase: {phase}")
        return self._nothing

    def step(self) -> None:
        self._seen += 1
        if self._seen == WARM_UP:
            self.synchronize()
            self._began = time.perf_counter()
        elif self._seen > WARM_UP and self.updates < self.steps:
            self.synchronize()
            self.updates += 1
            self.total_s = time.perf_counter() - self._began
            if self.updates == self.steps:
                self._finish_timing()
        elif self._seen == WARM_UP + self.steps + TRACED:
            self._finish_trace()

    def close(self) -> None:
        if not self._is_done and 0 < self.updates < self.steps:
            self._report()
        self._finish_trace()

    def _finish_timing(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._report()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device_type == "cuda")
        with self._failure_is_reported():
            self._tracer = profile(activities=activities)
            self._tracer.__enter__()

    def _report(self) -> None:
        self._is_done = True
        rows = phase_rows(self.seconds, self.total_s, self.updates)
        self.log.event("profile", phase_table(rows, self.updates), updates=self.updates, phases=rows)
        with self._failure_is_reported():
            self.folder.mkdir(exist_ok=True)
            text = json.dumps({"updates": self.updates, "phases": rows}, indent=2)
            (self.folder / "phases.json").write_text(text + "\n")

    def _finish_trace(self) -> None:
        tracer, self._tracer = self._tracer, None
        if tracer is None:
            return
        self.synchronize()
        with self._failure_is_reported():
            tracer.__exit__(None, None, None)
            self.folder.mkdir(exist_ok=True)
            tracer.export_chrome_trace(str(self.folder / "trace.json"))
            with open(self.folder / "trace.json", "rb") as plain, gzip.open(self.folder / "trace.json.gz", "wb") as gz:
                shutil.copyfileobj(plain, gz)
            (self.folder / "trace.json").unlink()
            sort_by = f"self_{'device' if self.device_type == 'cuda' else 'cpu'}_time_total"
            (self.folder / "operators.txt").write_text(tracer.key_averages().table(sort_by=sort_by, row_limit=40))
            self.log.event("profile", f"Trace: {self.folder / 'trace.json.gz'} (open it at ui.perfetto.dev)")

    @contextlib.contextmanager
    def _failure_is_reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a full disk; a profiler that the driver refuses
            if not self._has_failed:
                todo = "The run goes on. Make the run folder writable, or leave profile_steps out."
                self.log.event("profile", f"{self.folder}: no profile: {error}", "warning", todo=todo)
            self._has_failed = True


def phase_rows(seconds: dict[str, float], total_s: float, updates: int) -> list[dict[str, Any]]:
    """Name, seconds an update, share of the time; what no phase covers is "other"."""
    named = {name: value for name, value in seconds.items() if value > 0}
    named["other"] = max(0.0, total_s - sum(named.values()))
    return [
        {"phase": name, "seconds": value / updates, "share": value / total_s if total_s else 0.0}
        for name, value in named.items()
    ]


def phase_table(rows: list[dict[str, Any]], updates: int) -> str:
    """Plain text: `forward   12.3 ms  41.0 %`."""
    width = max(len(row["phase"]) for row in rows)
    total = sum(row["seconds"] for row in rows)
    lines = [f"  {row['phase']:{width}} {row['seconds'] * 1e3:10.2f} ms {row['share']:7.1%}" for row in rows]
    return "\n".join([f"An update, mean of {updates}:", *lines, f"  {'all':{width}} {total * 1e3:10.2f} ms"])


def make_profile(steps: int | None, folder: Path, log: NullLog, device_type: str) -> NoProfile:
    """`steps` None or 0: off."""
    return Profile(steps, folder / "profile", log, device_type) if steps else NoProfile()
