"""One thread for what may be slow or broken and must not hold up the training: trackers, the report."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

QUEUE_JOBS = 1000  # a tracker that hangs must not fill the memory; newer jobs are dropped then


class Background:
    """Jobs in order, on one daemon thread, started with the first. A job's exception goes to `failed(error)`.

    Python's own imports may run in it: they cost the training thread their processor time only where there is one core.
    """

    def __init__(self, name: str, failed: Callable[[Exception], None]) -> None:
        self.name, self.failed = name, failed
        self._jobs: queue.Queue[Callable[[], Any] | None] = queue.Queue(QUEUE_JOBS)
        self._thread: threading.Thread | None = None
        self.dropped = 0

    def do(self, job: Callable[[], Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self.dropped += 1

    @property
    def is_used(self) -> bool:
        return self._thread is not None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._run(job)

    def _run(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception as error:
            self.failed(error)

    def close(self, timeout_s: float) -> bool:
        """Waits for the jobs there are. False if they were not done in time: the thread dies with the process."""
        if self._thread is None:
            return True
        assert self._thread is not threading.current_thread(), f"{self.name} cannot wait for itself"
        try:
            self._jobs.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()
