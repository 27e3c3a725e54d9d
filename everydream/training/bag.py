"""A checkpoint's content, named: gathered from a run, and put back into one.

model/  optimizer.safetensors  ema.safetensors  state.json  data.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from everydream.data.fingerprint import Fingerprint
from everydream.errors import CheckpointError
from everydream.models.family import Family
from everydream.models.files import CopyOf, FileContent, TensorFile, Unchanged
from everydream.optim.ema import EMA, NoEMA
from everydream.training import optimizer_state
from everydream.training.checkpoint import find_latest
from everydream.training.saver import Contents, Exports
from everydream.training.state import TrainState
from everydream.training.storage import Bytes, Content, Copy
from everydream.training.tensorfile import Tensors, UnchangedTensors, read_tensors

MODEL, OPTIMIZER, EMA_FILE, STATE, DATA = "model", "optimizer.safetensors", "ema.safetensors", "state.json", "data.json"
WEIGHTS = {"unet": "unet/diffusion_pytorch_model.safetensors", "text_encoder": "text_encoder/model.safetensors"}

Captured = tuple[dict[str, Tensor], dict[str, Any]]


def no_exports(step: int) -> Exports:
    return {}


class Bag:
    """`trained`: part → published name → parameter, of the parts with an optimizer. `exports(step)`: single files.
    `changed_at`: the step at which the run went on with settings that were changed on purpose, if it did."""

    def __init__(
        self,
        *,
        checkpoints: Path,
        family: Family,
        state: TrainState,
        optimizers: Mapping[str, Optimizer],
        trained: Mapping[str, Mapping[str, Parameter]],
        ema: EMA | NoEMA,
        fingerprints: Mapping[str, Fingerprint],
        scaler: torch.amp.GradScaler | None = None,
        exports: Callable[[int], Exports] = no_exports,
        changed_at: int = -1,
    ) -> None:
        self.checkpoints, self.family, self.state = checkpoints, family, state
        self.optimizers, self.trained, self.ema, self.scaler = optimizers, trained, ema, scaler
        self.exports, self.changed_at = exports, changed_at
        self._data = Bytes(json.dumps(fingerprints, ensure_ascii=False, indent=0, sort_keys=True).encode())

    # Out

    def capture(self) -> Captured:
        """The optimizers' state, with the training weights of those that keep two sets."""
        return optimizer_state.capture(self.optimizers, self.trained)

    def contents(self, captured: Captured) -> tuple[Contents, Exports]:
        """Live tensors: whoever saves them copies or writes them before the next update."""
        tensors, self.state.optimizers = captured
        self.state.scaler = self.scaler.state_dict() if self.scaler is not None else {}
        weights = {part: {n: p.detach() for n, p in named.items()} for part, named in self._whole_parts().items()}
        contents: dict[str, Content] = {
            f"{MODEL}/{name}": as_content(content) for name, content in self.family.files(weights).items()
        }
        contents[OPTIMIZER] = Tensors(tensors)
        averages = self.ema.tensors()
        if averages:
            contents[EMA_FILE] = Tensors(averages)
        contents[DATA] = self._data
        contents[STATE] = Bytes(self.state.to_json())
        return contents, self.exports(self.state.step)

    def _whole_parts(self) -> dict[str, dict[str, Parameter]]:
        """A trained part is written whole, with its frozen layers."""
        return {part: self.family.parameters_of(part) for part in self.trained}

    # In

    def restore(self, checkpoint: Path, *, weights: bool) -> list[str]:
        """Optimizers, average and (if `weights`) the trained parts, bit for bit. Returns what could not be put back."""
        saved = read_state(checkpoint)
        changed = saved.step <= self.changed_at
        if weights:
            for part, named in self._whole_parts().items():
                put(read_tensors(checkpoint / MODEL / WEIGHTS[part]), named)
        tensors = read_tensors(checkpoint / OPTIMIZER)
        notes = optimizer_state.restore(self.optimizers, self.trained, tensors, saved.optimizers, changed=changed)
        if (checkpoint / EMA_FILE).is_file():
            notes += self.ema.load(read_tensors(checkpoint / EMA_FILE), changed=changed)
        if self.scaler is not None and saved.scaler:
            self.scaler.load_state_dict(saved.scaler)
        return notes

    def reload_latest(self, before: int) -> tuple[int | None, list[str]]:
        """For a roll-back: weights, optimizers and average of the newest valid checkpoint of a step before `before`.

        Returns its step, and what could not be used or put back, a line each. The clock goes on.
        """
        found = find_latest(self.checkpoints, before)
        told = [f"{skipped}: an older one is used" for skipped in found.skipped]
        if found.path is None:
            return None, told
        told += self.restore(found.path, weights=True)
        return read_state(found.path).step, told


def read_state(checkpoint: Path) -> TrainState:
    return TrainState.from_json((checkpoint / STATE).read_bytes(), checkpoint / STATE)


@torch.no_grad()
def put(tensors: Mapping[str, Tensor], named: Mapping[str, Parameter]) -> None:
    """In place, so that optimizers and compiled graphs keep their tensors. Raises CheckpointError."""
    for name, parameter in named.items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{name} is not in the checkpoint as this model has it; resume with the same settings"
            )
        parameter.copy_(tensors[name])


def as_content(content: FileContent) -> Content:
    if isinstance(content, TensorFile):
        return Tensors(content.tensors, content.metadata)
    if isinstance(content, CopyOf):
        return Copy(Path(content.file.name))
    if isinstance(content, Unchanged):
        return UnchangedTensors(content.read)
    return Bytes(content)
