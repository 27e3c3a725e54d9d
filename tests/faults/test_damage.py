"""Each file of a checkpoint truncated at many lengths, or with one bit flipped: found, skipped, said."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from everydream.training import checkpoint
from everydream.training.state import TrainState
from everydream.training.storage import Bytes, Content
from everydream.training.tensorfile import Tensors
from tests.faults.conftest import Inject

FLIPS = 40  # in each file
RNG = random.Random(0)


def contents(step: int) -> dict[str, Content]:
    rng = torch.Generator().manual_seed(step)
    weights = {f"layer.{n}.weight": torch.randn(8, 8, generator=rng) for n in range(4)}
    return {
        "model/model_index.json": Bytes(b'{"_class_name": "StableDiffusionPipeline"}'),
        "model/unet/diffusion_pytorch_model.safetensors": Tensors(weights),
        "optimizer.safetensors": Tensors({f"unet/{name}/exp_avg": weight for name, weight in weights.items()}),
        "state.json": Bytes(TrainState(step=step).to_json()),
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for step in (1, 2):
        checkpoint.commit(folder, step, contents(step))
    return folder


def truncations(data: bytes) -> Iterator[bytes]:
    """truncated at many lengths"""
    lengths = {0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, *RNG.sample(range(len(data)), 20)}
    for length in sorted(lengths):
        yield data[:length]


def flips(data: bytes) -> Iterator[bytes]:
    """one bit flipped"""
    for bit in RNG.sample(range(8 * len(data)), FLIPS):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def overwritten(data: bytes) -> Iterator[bytes]:
    """overwritten from the middle, or with zeros"""
    # What a file system may leave of a file whose size it knew and whose bytes it had not written.
    for start in (0, len(data) // 3, len(data) - 1):
        yield data[:start] + bytes([255] * (len(data) - start))
    yield bytes(len(data))


@pytest.mark.parametrize("kind", [truncations, flips, overwritten])
@pytest.mark.parametrize("name", [*contents(2), "MANIFEST.json"])
def test_damage_is_found_skipped_and_said(
    checkpoints: Path, name: str, kind: Callable[[bytes], Iterator[bytes]], injected: Inject
) -> None:
    newer, older = checkpoint.folders(checkpoints)
    whole = (newer / name).read_bytes()
    count = 0
    try:
        for damaged in kind(whole):
            (newer / name).write_bytes(damaged)
            found = checkpoint.find_latest(checkpoints)
            assert found.path == older
            [skipped] = found.skipped
            assert skipped.path == newer and len(skipped.problems) == 1 and skipped.problems[0].startswith(f"{name}: ")
            count += 1
    finally:
        (newer / name).write_bytes(whole)
    assert checkpoint.find_latest(checkpoints).path == newer
    assert count >= 4
    injected(f"file of a checkpoint: {kind.__doc__ or kind.__name__}".split("\n")[0], count)
