"""What a model writes, before it is written: relative file name → content."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be made."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


class HeldFile:
    """A file held open for reading: it can still be copied after its folder was removed. Closed with its last user."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    @property
    def name(self) -> str:
        """A path that opens this very file: on Linux also when it was removed or replaced."""
        held = f"/proc/self/fd/{self.descriptor}"
        return held if os.path.exists(held) else str(self.path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True)
class CopyOf:
    """A file to be copied byte for byte. The same one is handed out at every save."""

    file: HeldFile


@dataclass(frozen=True)
class Unchanged:
    """A safetensors file of a part that is not trained, the same at every save: read only when it is written."""

    read: Callable[[], Mapping[str, Tensor]]


FileContent = bytes | TensorFile | CopyOf | Unchanged
