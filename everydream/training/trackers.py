"""Trackers through Accelerate: its tracker classes, with what this program adds to them. Imported in the background.

Each writes only where it is told to, never prints, and takes images as files. Metric names are those of metrics.jsonl.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.state import PartialState
from accelerate.tracking import TensorBoardTracker, WandBTracker


class TensorBoard(TensorBoardTracker):
    """Event files in the run folder itself: `tensorboard --logdir logs` shows each run under its folder's name."""

    main_process_only = False  # made on rank 0 alone, so nothing needs to ask which rank this is
    where = ""  # it is in the run folder

    def __init__(self, folder: Path, project: str, run_name: str, resumed_step: int | None) -> None:
        # purge_step hides what an earlier part of the run logged after the checkpoint that this one resumed from.
        purge_step = None if resumed_step is None else resumed_step + 1
        super().__init__(run_name=".", logging_dir=folder, purge_step=purge_step, flush_secs=10)

    def store_init_configuration(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        """`values`: name → {"value", "origin"}. Accelerate's own makes a second run and a file of its own for them."""
        from torch.utils.tensorboard.summary import hparams

        rows = [f"| `{name}` | {_cell(entry['value'])} | {entry['origin']} |" for name, entry in values.items()]
        self.writer.add_text("settings", "\n".join(["| setting | value | from |", "|---|---|---|", *rows]), 0)
        simple = {name: _simple(entry["value"]) for name, entry in values.items()}
        for summary in hparams(simple, {"loss": 0.0}):
            self.writer.file_writer.add_summary(summary)

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, global_step=step)

    def log_image_file(self, name: str, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self.writer.add_image(name, np.asarray(image.convert("RGB")), global_step=step, dataformats="HWC")


class WandB(WandBTracker):
    """Weights & Biases. `WANDB_MODE=offline` keeps all in the run folder, for a later `wandb sync`."""

    main_process_only = False

    def __init__(self, folder: Path, project: str, run_name: str, resumed_step: int | None) -> None:
        import wandb

        # Quiet, and without a hold on stdout and stderr: the progress bar is ours.
        settings = wandb.Settings(console="off", silent=True, show_info=False)
        super().__init__(
            project, name=run_name, dir=str(folder), id=_kept_id(folder), resume="allow", settings=settings
        )

    @property
    def where(self) -> str:
        """Where a person finds it."""
        if not self.run.offline:
            return self.run.url or ""
        return f"offline; send it later with `wandb sync {Path(self.run.dir).parent}`"

    def start(self) -> None:
        super().start()
        # W&B's own step only goes forward, which a resumed run does not: ours is a value like the others.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def store_init_configuration(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        plain = {name: entry["value"] for name, entry in values.items()}
        origins = {name: entry["origin"] for name, entry in values.items()}
        self.run.config.update({**plain, "origins": origins}, allow_val_change=True)

    def log(self, values: Mapping[str, float], step: int | None = None, **kwargs: Any) -> None:
        self.run.log({**values, "step": step})

    def log_image_file(self, name: str, path: Path, step: int) -> None:
        import wandb

        self.run.log({name: wandb.Image(str(path)), "step": step})


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def open_tracker(
    name: str,
    folder: Path,
    project: str,
    run_name: str,
    resumed_step: int | None,
    settings: Mapping[str, Mapping[str, Any]],
) -> TensorBoard | WandB:
    """One of TRACKERS, started, with the run's settings in it."""
    PartialState()  # Accelerate's trackers log through it; the accelerator's own if there is one
    tracker = TRACKERS[name](folder, project, run_name, resumed_step)
    tracker.start()
    tracker.store_init_configuration(settings)
    return tracker


def _kept_id(folder: Path) -> str:
    """A resumed run goes on in the same W&B run."""
    path = folder / ".wandb_id"
    if not path.exists():
        path.write_text(uuid4().hex[:12])
    return path.read_text().strip()


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace(os.linesep, " ")


def _simple(value: Any) -> bool | int | float | str:
    """TensorBoard takes no lists, and an empty string for what is not set."""
    return value if isinstance(value, bool | int | float | str) else "" if value is None else str(value)
