"""Where a run stands, in words: the fields of the progress line, the same on a terminal and in a log file."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

SMOOTHING_STEPS = 50  # the loss shown is an exponential mean over about this many updates
RATE_WINDOW_STEPS = 200  # speed and time left are means over this many, pauses for saves and previews included
RATE_FROM_STEPS = 5  # after the first, which warms up: before that the time left would be a guess, tenfold off
PARTS = {"unet": "unet", "text_encoder": "text"}


@dataclass
class Progress:
    """Fed with each update. `step`: updates done; the value `trained_epoch`: from 0, of its last micro-batch."""

    step: int
    max_steps: int
    max_epochs: int | None = None
    memory_total_bytes: int | None = None
    values: dict[str, float] = field(default_factory=dict)
    smoothed_loss: float | None = None
    data_wait_share: float | None = None
    _loss_step: int = -1
    _told: float = 0.0
    _times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW_STEPS))

    def begin(self, now: float) -> None:
        self._told = now

    def update(self, step: int, values: Mapping[str, float], now: float) -> None:
        """`now` in seconds, of any clock that only goes forward."""
        self.step = step
        if not self._times or self._times[-1][0] != step:
            self._times.append((step, now))
        self.values.update(values)
        if "data_wait_s" in values:  # seconds since the last time they were told
            since, self._told = now - self._told, now
            self.data_wait_share = min(1.0, values["data_wait_s"] / since) if since > 0 else None
        loss = values.get("loss")
        if loss is not None and math.isfinite(loss) and step != self._loss_step:
            old = loss if self.smoothed_loss is None else self.smoothed_loss
            keep = (1 - 1 / SMOOTHING_STEPS) ** max(1, step - self._loss_step)
            self.smoothed_loss, self._loss_step = keep * old + (1 - keep) * loss, step

    def steps_per_second(self) -> float | None:
        if not self._times:
            return None
        (first_step, began), (last_step, ended) = self._times[0], self._times[-1]
        steps = last_step - first_step
        return steps / (ended - began) if ended > began and steps >= RATE_FROM_STEPS else None

    def seconds_left(self) -> float | None:
        rate = self.steps_per_second()
        return None if rate is None else (self.max_steps - self.step) / rate

    def fields(self) -> list[str]:
        """In the order in which a narrow terminal keeps them: the last go first."""
        return [text for text in (make(self) for make in FIELDS) if text]


def _step(p: Progress) -> str:
    return f"step {p.step}/{p.max_steps}"


def _epoch(p: Progress) -> str:
    if "trained_epoch" not in p.values:
        return ""
    number = int(p.values["trained_epoch"]) + 1
    return f"epoch {number}" if p.max_epochs is None else f"epoch {number}/{p.max_epochs}"


def _loss(p: Progress) -> str:
    return "" if p.smoothed_loss is None else f"loss {p.smoothed_loss:.4f}"


def _time_left(p: Progress) -> str:
    seconds = p.seconds_left()
    return "" if seconds is None or p.step >= p.max_steps else f"{duration(seconds)} left"


def _speed(p: Progress) -> str:
    return f"{p.values['images_per_s']:.3g} images/s" if "images_per_s" in p.values else ""


def _learning_rates(p: Progress) -> str:
    rates = [f"{short} {p.values[f'lr_{part}']:.2g}" for part, short in PARTS.items() if f"lr_{part}" in p.values]
    return "lr " + " ".join(rates) if rates else ""


def _memory(p: Progress) -> str:
    if "memory_bytes" not in p.values:
        return ""
    used = f"memory {p.values['memory_bytes'] / 1e9:.1f}"
    return f"{used} GB" if p.memory_total_bytes is None else f"{used}/{p.memory_total_bytes / 1e9:.1f} GB"


def _data_wait(p: Progress) -> str:
    return "" if p.data_wait_share is None else f"data wait {p.data_wait_share:.0%}"


FIELDS = (_step, _epoch, _loss, _time_left, _speed, _learning_rates, _memory, _data_wait)


def duration(seconds: float) -> str:
    """12 s, 3:05, 1:02:03, 2 d 3 h."""
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{minutes}:{whole % 60:02d}"
    if days == 0:
        return f"{hours}:{minutes % 60:02d}:{whole % 60:02d}"
    return f"{days} d {hours % 24} h"
