"""Tensors to and from a safetensors file: written one after the other, so a save never holds a second copy of them.

The format (github.com/huggingface/safetensors): 8 bytes of header length, a JSON header of name → dtype, shape and
offsets, then the data without holes. The library's own save_file builds the whole file in memory and never syncs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from everydream.training.storage import Output

assert sys.byteorder == "little", "safetensors files are little-endian"

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


Shape = tuple[torch.dtype, torch.Size]
Shapes = Mapping[str, Shape]  # by name


@dataclass(frozen=True)
class Tensors:
    """A safetensors file.

    Transformers refuses a weights file whose metadata does not name its framework, hence the default.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    def write(self, out: Output) -> None:
        order = self.order()
        out.write(self.header(order))
        for _, tensor in order:
            out.write(as_bytes(tensor.detach().cpu()))

    @cached_property
    def shapes(self) -> Shapes:
        """Of each tensor, as it stands in the file."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}

    def order(self) -> list[tuple[str, Tensor]]:
        """As they stand in the file: wide types first, then every tensor starts at a multiple of its own width."""
        return sorted(self.tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))

    def header(self, order: Sequence[tuple[str, Tensor]]) -> bytes:
        """All that comes before the tensors' bytes. `order`: this file's, which takes some time to find."""
        header: dict[str, object] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        start = 0
        for name, tensor in order:
            end = start + tensor.numel() * tensor.dtype.itemsize
            header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class UnchangedTensors:
    """A safetensors file whose tensors are read as it is written; the same at every save of a run."""

    read: Callable[[], Mapping[str, Tensor]]

    def write(self, out: Output) -> None:
        Tensors(self.read()).write(out)


def identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same memory seen the same way; an empty tensor is only itself."""
    where = tensor.data_ptr() if tensor.numel() else id(tensor)
    return where, tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride()


def as_bytes(tensor: Tensor) -> memoryview:
    """A host tensor's elements in order, without a copy where they already lie so."""
    # as_strided, not view: a tensor of one element may have any stride, and is contiguous all the same.
    return tensor.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, in memory of their own: the library's are maps of a file that may be deleted."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name).clone() for name in names}
