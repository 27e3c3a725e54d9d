"""A safetensors file read with numpy alone: names and shapes at once, values one tensor at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
         "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?"}  # fmt: skip


@dataclass(frozen=True)
class RawTensor:
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def values(self) -> np.ndarray:
        """1-D float64. Raises ValueError for a type that numpy cannot hold."""
        if self.dtype not in NUMPY:
            raise ValueError(f"{self.path}: {self.dtype} cannot be read here")
        raw = np.fromfile(self.path, NUMPY[self.dtype], count=self.size, offset=self.start)
        if self.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float64)


def read_header(path: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """(tensors by name, metadata). Raises ValueError if this is no safetensors file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise ValueError(f"{path} is no safetensors file")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, _ = entry["data_offsets"]
        tensors[name] = RawTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start)
    return tensors, metadata
