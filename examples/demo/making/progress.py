"""One line of progress every few seconds, for trainings of minutes."""

import time

import torch


class Progress:
    def __init__(self, name: str, steps: int, every_seconds: float = 15) -> None:
        self.name, self.steps, self.every_seconds = name, steps, every_seconds
        self.started = self.reported = time.monotonic()

    def report(self, step: int, **figures: torch.Tensor) -> None:
        """Prints when it is time, reading the figures from the device only then."""
        now = time.monotonic()
        if now - self.reported < self.every_seconds and step + 1 < self.steps:
            return
        self.reported = now
        values = "  ".join(f"{name} {value.item():.4f}" for name, value in figures.items())
        speed = (step + 1) / (now - self.started)
        print(f"{self.name} {step + 1}/{self.steps}  {speed:.2f} steps/s  {values}", flush=True)
