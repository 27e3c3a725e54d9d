"""An original single file as base model: which model it is, told by its names and shapes."""

from __future__ import annotations

from pathlib import Path

from everydream.errors import ConfigError
from everydream.models.sources import Found


def read(path: Path, *, allow_pickle: bool, prediction_type: str | None) -> Found:
    raise ConfigError(f"base_model: {path}: single files are not read yet")
