"""Copies of tensors in the host's memory, taken beside the next forward and backward, written while training goes on.

What is saved does not change before the next optimizer step, so the copying has that long: CheckFreq (Mohan et al.
2021, FAST '21) found it so. Each file's copy lies as the file will, so that writing it touches no single tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everydream.training.storage import Output
from everydream.training.tensorfile import Tensors, as_bytes

# Torch rounds pinned memory, which copies from a card need to run at the bus's speed, up to a power of two: pieces
# of one waste little.
PIECE = 128 << 20  # bytes

Layout = Sequence[tuple[torch.dtype, torch.Size]]
Ready = Mapping[torch.device, torch.cuda.Event]


@dataclass(frozen=True)
class Laid:
    """A safetensors file that only has to be written down."""

    header: bytes
    pieces: Sequence[Tensor]

    def write(self, out: Output) -> None:
        out.write(self.header)
        for piece in self.pieces:
            out.write(as_bytes(piece))


class Room:
    """Memory for tensors of a layout, one after the other without gaps. `places`: where each goes."""

    def __init__(self, layout: Layout, *, pinned: bool) -> None:
        self.layout = layout
        self.pieces: list[Tensor] = []
        self.places: list[Tensor] = []
        for run in _runs(layout):
            piece = torch.empty(sum(map(_bytes, run)), dtype=torch.uint8, pin_memory=pinned)
            ends = 0
            for dtype, shape in run:
                begin, ends = ends, ends + _bytes((dtype, shape))
                self.places.append(piece[begin:ends].view(dtype).view(shape))
            self.pieces.append(piece)
        self.nbytes = sum(piece.nbytes for piece in self.pieces)


class HostMemory:
    """Room for the files of one save. It is kept for the next: the system gives memory page by page as it is first
    touched, which takes longer than the copy, and pinned memory is slower still to get."""

    def __init__(self) -> None:
        self._rooms: dict[str, Room] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # one a card: each keeps memory of its own

    def missing(self, files: Mapping[str, Tensors]) -> int:
        """Bytes that copying these files' tensors would have to get from the system."""
        sizes = {name: file.nbytes for name, file in files.items()}
        return sum(size for name, size in sizes.items() if name not in self._rooms or self._rooms[name].nbytes != size)

    def copy(self, files: Mapping[str, Tensors], ready: Ready | None = None) -> dict[str, Laid]:
        """The files, as their tensors are now. `ready`: when the cards have computed them. What an earlier call gave is
        written over."""
        laid, pairs = {}, list[tuple[Tensor, Tensor]]()
        for name, file in files.items():
            order = file.order()
            layout = [(file.dtype_of(tensor), tensor.shape) for _, tensor in order]
            if name not in self._rooms or self._rooms[name].layout != layout:
                self._rooms.pop(name, None)  # its memory serves the new one
                self._rooms[name] = Room(layout, pinned=any(t.is_cuda for t in file.tensors.values()))
            room = self._rooms[name]
            pairs += [(place, t.detach()) for place, (_, t) in zip(room.places, order, strict=True)]
            laid[name] = Laid(file.header(order), room.pieces)
        _copy(pairs, ready or {}, self._streams)
        return laid


def finished(files: Mapping[str, Tensors]) -> Ready:
    """The moments when the cards that these tensors are on have done what they were given so far."""
    devices = {tensor.device for file in files.values() for tensor in file.tensors.values() if tensor.is_cuda}
    return {device: torch.cuda.current_stream(device).record_event() for device in devices}


@torch.no_grad()
def _copy(pairs: Sequence[tuple[Tensor, Tensor]], ready: Ready, streams: dict[torch.device, torch.cuda.Stream]) -> None:
    here = [pair for pair in pairs if not pair[1].is_cuda]
    if here:  # one call, for each call would wait for its turn beside the training's
        torch._foreach_copy_([place for place, _ in here], [tensor for _, tensor in here])
    devices = {tensor.device for _, tensor in pairs if tensor.is_cuda}
    for device in devices:
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)  # beside what the card computes
        stream = streams[device]
        if device in ready:
            stream.wait_event(ready[device])
        with torch.cuda.stream(stream):
            for place, tensor in pairs:
                if tensor.device == device:
                    place.copy_(tensor, non_blocking=True)
        stream.synchronize()


def _bytes(entry: tuple[torch.dtype, torch.Size]) -> int:
    dtype, shape = entry
    return math.prod(shape) * dtype.itemsize


def _runs(layout: Layout) -> Iterator[Layout]:
    """Pieces of at most PIECE bytes, cut between tensors."""
    run, size = list[tuple[torch.dtype, torch.Size]](), 0
    for entry in layout:
        if run and size + _bytes(entry) > PIECE:
            yield run
            run, size = [], 0
        run.append(entry)
        size += _bytes(entry)
    if run:
        yield run
