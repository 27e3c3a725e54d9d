"""A snapshot is exact, does not change with training, holds shared memory once, and uses its own memory again."""

from __future__ import annotations

import pytest
import torch

from everydream.training.snapshot import PIECE, HostMemory, Snapshot
from everydream.training.tensorfile import DTYPES, as_bytes

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def some_tensors(device: str) -> list[torch.Tensor]:
    odd = [torch.randint(0, 2, (3, 5)).to(device=device, dtype=dtype) for dtype in DTYPES]
    return [
        *odd,
        torch.zeros(0, 3, device=device),
        torch.tensor(0.5, device=device),
        torch.rand(4, 6, device=device).t(),
    ]


@devices
def test_copies_are_exact_and_lie_apart(device: str) -> None:
    tensors, snapshot = some_tensors(device), Snapshot(HostMemory())
    copies = [snapshot.of(tensor) for tensor in tensors]
    snapshot.wait()
    for copy, tensor in zip(copies, tensors, strict=True):
        assert (copy.dtype, copy.shape, copy.device.type) == (tensor.dtype, tensor.shape, "cpu")
        assert as_bytes(copy) == as_bytes(tensor.cpu())
        assert copy.numel() == 0 or copy.is_pinned() == (device == "cuda")


def test_training_does_not_reach_the_copies_and_shared_memory_is_copied_once() -> None:
    weight = torch.arange(4.0, requires_grad=True)
    snapshot = Snapshot(HostMemory())
    first, second, view = snapshot.of(weight), snapshot.of(weight), snapshot.of(weight[:2])
    snapshot.wait()
    with torch.no_grad():
        weight.zero_()
    assert first is second and view is not first
    assert first.tolist() == [0, 1, 2, 3] and view.tolist() == [0, 1]


def test_the_next_snapshot_takes_the_same_memory() -> None:
    memory, tensors = HostMemory(), [torch.rand(1000), torch.rand(PIECE // 4 + 1), torch.rand(10)]
    sizes = [tensor.nbytes for tensor in tensors]
    assert memory.missing(sizes) == PIECE + sizes[1] + PIECE
    places = []
    for _ in range(2):
        snapshot = Snapshot(memory)
        places.append([snapshot.of(tensor).data_ptr() for tensor in tensors])
        snapshot.wait()
    assert places[0] == places[1]
    assert memory.missing(sizes) == 0 and memory.missing([*sizes, PIECE]) == PIECE
