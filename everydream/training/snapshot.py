"""Copies of tensors in the host's memory, taken between two updates and written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from everydream.training.tensorfile import identity

# The system gives memory page by page as it is first touched, which takes longer than the copy; and pinned memory,
# which copies from a card need to run at the bus's speed, is slower still to get. So it is kept from save to save.
# Torch rounds pinned blocks up to a power of two: pieces of one waste nothing.
PIECE = 128 << 20  # bytes
ALIGNMENT = 64


class HostMemory:
    """Memory for one snapshot at a time."""

    def __init__(self) -> None:
        self._pieces: list[Tensor] = []
        self._piece = self._used = 0

    def rewind(self) -> None:
        """What was handed out is given back: the next snapshot goes over it."""
        self._piece = self._used = 0

    def missing(self, sizes: Iterable[int]) -> int:
        """Bytes that a snapshot of tensors of these sizes would have to get from the system."""
        pieces, used = [piece.numel() for piece in self._pieces], 0
        place = new = 0
        for size in sizes:
            while place < len(pieces) and used + size > pieces[place]:
                place, used = place + 1, 0
            if place == len(pieces):
                pieces.append(max(PIECE, size))
                new += pieces[-1]
            used += -(-size // ALIGNMENT) * ALIGNMENT
        return new

    def like(self, tensor: Tensor) -> Tensor:
        """An uninitialised host tensor of this shape and type."""
        size = tensor.nbytes
        while self._piece < len(self._pieces) and self._used + size > self._pieces[self._piece].numel():
            self._piece, self._used = self._piece + 1, 0
        if self._piece == len(self._pieces):
            self._pieces.append(torch.empty(max(PIECE, size), dtype=torch.uint8, pin_memory=tensor.is_cuda))
        place = self._pieces[self._piece][self._used : self._used + size]
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return place.view(tensor.dtype).view(tensor.shape)


class Snapshot:
    """Copies; a tensor seen twice is copied once. Those from a card are queued, and there after `wait`."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._memory.rewind()
        self._copies: dict[tuple[object, ...], Tensor] = {}
        self._originals: list[Tensor] = []  # kept alive: a freed tensor's address may come again

    def of(self, tensor: Tensor) -> Tensor:
        key = identity(tensor)
        if key not in self._copies:
            tensor = tensor.detach()
            self._originals.append(tensor)
            self._copies[key] = self._memory.like(tensor).copy_(tensor, non_blocking=tensor.is_cuda)
        return self._copies[key]

    def wait(self) -> None:
        if any(tensor.is_cuda for tensor in self._originals):
            torch.cuda.synchronize()
        self._originals.clear()
