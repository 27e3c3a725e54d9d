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
from everydream.training.tensorfile import Shape, Shapes, Tensors, as_bytes

# Torch rounds pinned memory, which copies from a card need to run at the bus's speed, up to a power of two: pieces
# of one waste little.
PIECE = 128 << 20  # bytes

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
    """Memory for one file's tensors, one after the other without gaps. `places`: where each goes, by name."""

    def __init__(self, file: Tensors) -> None:
        self.shapes, self.metadata = file.shapes, file.metadata
        order = file.order()
        self.header = file.header(order)
        self.pieces: list[Tensor] = []
        self.places: dict[str, Tensor] = {}
        pinned = any(tensor.is_cuda for tensor in file.tensors.values())
        for run in _runs({name: self.shapes[name] for name, _ in order}):
            piece = torch.empty(sum(map(_bytes, run.values())), dtype=torch.uint8, pin_memory=pinned)
            ends = 0
            for name, (dtype, lengths) in run.items():
                begin, ends = ends, ends + _bytes((dtype, lengths))
                self.places[name] = piece[begin:ends].view(dtype).view(lengths)
            self.pieces.append(piece)
        self.nbytes = sum(piece.nbytes for piece in self.pieces)

    def is_for(self, file: Tensors) -> bool:
        return self.shapes == file.shapes and self.metadata == file.metadata


class HostMemory:
    """Room for the files of one save. It is kept for the next: the system gives memory page by page as it is first
    touched, which takes longer than the copy, and pinned memory is slower still to get."""

    def __init__(self) -> None:
        self._rooms: dict[str, Room] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # one a card: each keeps memory of its own

    def missing(self, files: Mapping[str, Tensors]) -> int:
        """Bytes that copying these files' tensors would have to get from the system."""
        sizes = {name: sum(map(_bytes, file.shapes.values())) for name, file in files.items()}
        return sum(size for name, size in sizes.items() if name not in self._rooms or self._rooms[name].nbytes != size)

    def copy(self, files: Mapping[str, Tensors], ready: Ready | None = None) -> dict[str, Laid]:
        """The files, as their tensors are now. `ready`: when the cards have computed them. What an earlier call gave is
        written over."""
        laid, pairs = {}, list[tuple[Tensor, Tensor]]()
        for name, file in files.items():
            if name not in self._rooms or not self._rooms[name].is_for(file):
                self._rooms.pop(name, None)  # its memory serves the new one
                self._rooms[name] = Room(file)
            room = self._rooms[name]
            pairs += [(place, file.tensors[key]) for key, place in room.places.items()]
            laid[name] = Laid(room.header, room.pieces)
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


def _bytes(shape: Shape) -> int:
    dtype, lengths = shape
    return math.prod(lengths) * dtype.itemsize


def _runs(shapes: Shapes) -> Iterator[Shapes]:
    """What goes into one piece, of at most PIECE bytes, cut between tensors."""
    run, size = dict[str, Shape](), 0
    for name, shape in shapes.items():
        if run and size + _bytes(shape) > PIECE:
            yield run
            run, size = {}, 0
        run[name] = shape
        size += _bytes(shape)
    if run:
        yield run
