"""The run's state between two updates: state.json, besides the tensors' files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from everydream.errors import CheckpointError

FORMAT = "everydream-state-1"


@dataclass
class TrainState:
    """One clock: `step` counts optimizer updates, skipped ones too. All of it is plain JSON."""

    step: int = 0
    epoch: int = 0  # 0-based, of the next micro-batch
    class_epoch: int = 0  # the same for class pictures, whose plan has epochs of its own
    is_epoch_new: bool = False  # whether the next micro-batch is its epoch's first
    is_class_epoch_new: bool = False
    images_seen: int = 0  # subject pictures
    class_images_seen: int = 0
    loss_sum: float = 0.0  # over the pictures since the last line of metrics.jsonl, for the next line's mean
    loss_count: int = 0
    prior_sum: float = 0.0
    prior_count: int = 0
    previewed: int = -1  # the last step whose preview, and validation, came to its end: a stop may have cut it short,
    validated: int = -1  # and then the resumed run makes up for it
    skipped_steps: list[int] = field(default_factory=list)  # updates left out: their loss or gradient was not finite
    rollbacks: list[list[int]] = field(default_factory=list)  # [step it happened at, step that was loaded]
    lr_horizon: int | None = None  # the step at which the learning rates end their decay
    # "subject", "class" → [micro-batch, epoch] at which the present plan of these pictures began; [0, 0] where not said
    plan_starts: dict[str, list[int]] = field(default_factory=dict)
    # The same → what the plan cut from what, and micro-batches an update: what one must know to find its place in it
    plans: dict[str, list[Any]] = field(default_factory=dict)
    threads: int | None = None  # a sum's rounding depends on them
    processes: int = 1
    scaler: dict[str, Any] = field(default_factory=dict)  # float16's loss scale
    optimizers: dict[str, Any] = field(default_factory=dict)  # what optimizer.safetensors lacks (optimizer_state)

    @property
    def next_epoch(self) -> int:
        """The first epoch of which nothing was trained."""
        return self.epoch + (not self.is_epoch_new)

    @property
    def next_class_epoch(self) -> int:
        return self.class_epoch + (not self.is_class_epoch_new)

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, allow_nan=False).encode()

    @classmethod
    def from_json(cls, text: bytes, where: object = "state.json") -> TrainState:
        """Raises CheckpointError: the file is whole (its hash said so), so another program version wrote it."""
        content = json.loads(text)
        if content.pop("format", None) != FORMAT:
            raise CheckpointError(f"{where}: not of the format {FORMAT}; use the version that wrote it")
        unknown = content.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise CheckpointError(f"{where}: unknown {', '.join(sorted(unknown))}; use the version that wrote it")
        return cls(**content)
