"""A tensors' file is the library's own format, byte by byte what was given, and costs no second copy of the tensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from everydream.training.storage import write_atomically
from everydream.training.tensorfile import DTYPES, Tensors, as_bytes, identity, read_tensors


def some_tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = {
        str(dtype): torch.randint(0, 2, (3, 5), generator=rng).to(dtype) for dtype in DTYPES
    }  # odd sizes, so that what follows a narrow type would be misaligned
    return {
        **made,
        "scalar": torch.tensor(0.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6, generator=rng).t(),
        "channels last": torch.randn(1, 2, 3, 4, generator=rng).contiguous(memory_format=torch.channels_last),
        "a slice with a stride": torch.randn(9, generator=rng)[::8][:1],
        'ünïcode/and "quotes"': torch.randn(2, generator=rng),
    }


def test_the_library_reads_every_type_and_layout(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_atomically(tmp_path / "a.safetensors", Tensors(tensors, {"format": "pt", "recipe": '{"lr": 1}'}))
    for read in (load_file(tmp_path / "a.safetensors"), read_tensors(tmp_path / "a.safetensors")):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            assert as_bytes(read[name]) == as_bytes(tensor)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "recipe": '{"lr": 1}'}


def test_the_bytes_are_those_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16), "c": torch.ones(2, dtype=torch.float64)}
    write_atomically(tmp_path / "ours", Tensors(tensors))
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_hash_and_size_are_of_what_lies_on_the_disk(tmp_path: Path) -> None:
    written = write_atomically(tmp_path / "a", Tensors(some_tensors()))
    content = (tmp_path / "a").read_bytes()
    assert (written.size, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_read_tensors_outlive_their_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", Tensors({"w": torch.arange(1000)}))
    read = read_tensors(tmp_path / "a")
    with open(tmp_path / "a", "r+b") as file:  # a map of the file would see this, or be killed by it
        file.truncate(8)
    assert torch.equal(read["w"], torch.arange(1000))


def test_empty_tensors_are_never_taken_for_one_another() -> None:
    a, b = torch.zeros(0), torch.zeros(0)
    assert identity(a) == identity(a) != identity(b)
