"""What a model writes, before it is written: relative file name → content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file to be made."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


@dataclass(frozen=True)
class CopyOf:
    """A file to be copied byte for byte. It is held open, so that it outlives the checkpoint that it came from.

    Read it with os.pread or after seek(0): the same object is handed out at every save.
    """

    file: BinaryIO


FileContent = bytes | TensorFile | CopyOf
