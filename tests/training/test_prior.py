from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from everydream.errors import ConfigError, DataError, Stopped
from everydream.training import lock, prior
from everydream.training.lock import Lock
from everydream.training.prior import PassingLock, file_name, generate_missing, missing
from tests.training.processes import on_processes


class Generator:
    """A pipeline whose picture depends on its generator and, as a real one's rounding does, on its batch's size."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[Image.Image]:
        assert list(prompts) == ["photo of a dog"] * len(generators)
        self.batches.append(len(prompts))
        pixels = [torch.randint(0, 200, (8, 8, 3), generator=g).numpy() + len(prompts) for g in generators]
        return [Image.fromarray(p.astype(np.uint8)) for p in pixels]


def fill(folder: Path, wanted: int, ranks: Any = None, **options: Any) -> Any:
    def run(ranks: Any) -> int:
        return generate_missing(
            folder,
            wanted,
            "photo of a dog",
            ranks=ranks,
            **{
                "seed": 5,
                "generate": Generator(),
                "stop": lambda: 0,
                "present": lambda: [path.name for path in folder.glob("*.png")],
                **options,
            },
        )

    if ranks is not None:
        return run(ranks)
    (result,) = on_processes(1, run)
    if isinstance(result, Exception):
        raise result
    return result


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_the_folder_is_filled_with_pictures_named_by_number_and_seed(tmp_path: Path) -> None:
    told: list[int] = []
    assert fill(tmp_path / "class", 5, batch_size=2, advance=told.append, about={"base_model": "sd15"}) == 5
    assert sorted(pictures(tmp_path / "class")) == [f"class-00000{i}-seed-5.png" for i in range(5)]
    assert told == [2, 2, 1]
    with Image.open(tmp_path / "class" / file_name(3, 5)) as picture:
        assert picture.info == {"prompt": "photo of a dog", "seed": "5", "number": "3", "base_model": "sd15"}
    assert len(set(pictures(tmp_path / "class").values())) == 5


def test_a_full_folder_is_not_touched_and_needs_no_model(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    before = tmp_path.stat().st_mtime_ns
    assert fill(tmp_path, 1, generate=None) == 0
    assert os.listdir(tmp_path) == ["a.png"] and tmp_path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("present", "wanted", "expected"),
    [
        ([], 3, [0, 1, 2]),
        (["a.png", "sub/b.jpg"], 3, [0]),
        (["a.png", "b.png", "c.png", "d.png"], 3, []),
        ([file_name(1, 5)], 3, [0, 2]),
        ([file_name(1, 5), "a.png"], 3, [0]),
        ([file_name(0, 6), file_name(1, 6)], 3, [0]),
        ([file_name(0, 5), file_name(7, 5)], 2, [1]),
    ],
)
def test_what_is_missing_is_wanted_less_what_is_there(present: list[str], wanted: int, expected: list[int]) -> None:
    assert missing(present, wanted, 5) == expected


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_several_processes_make_the_pictures_of_one(tmp_path: Path, count: int, batch_size: int) -> None:
    fill(tmp_path / "one", 7, batch_size=batch_size)
    told: list[int] = []

    def work(ranks: Any) -> Any:
        return fill(tmp_path / "many", 7, ranks, batch_size=batch_size, advance=told.append if ranks.is_main else int)

    assert on_processes(count, work) == [7] * count
    assert pictures(tmp_path / "many") == pictures(tmp_path / "one")
    assert sum(told) == 7


@pytest.mark.parametrize("made", range(5))
def test_an_interrupted_run_goes_on_with_the_same_pictures(tmp_path: Path, made: int) -> None:
    fill(tmp_path / "whole", 5, batch_size=2)
    folder, signals = tmp_path / "cut", iter([0] * -(-made // 2) + [15])
    with pytest.raises(Stopped):
        fill(folder, 5, batch_size=2, stop=lambda: next(signals))
    if made % 2:  # killed between the two pictures of a batch
        (folder / file_name(made, 5)).unlink()
    assert len(pictures(folder)) == made
    assert fill(folder, 5, batch_size=2) == 5 - made
    assert pictures(folder) == pictures(tmp_path / "whole")


def test_a_failed_write_leaves_no_half_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.write, []

    def full(handle: int, data: Any) -> int:
        if bytes(data[:4]) == b"\x89PNG":
            calls.append(len(data))
            if len(calls) == 2:
                real(handle, data[:10])
                raise OSError(28, "No space left on device")
        return real(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match=r"class-000001-seed-5\.png cannot be written .*No space left"):
        fill(tmp_path, 3)
    assert os.listdir(tmp_path) == [file_name(0, 5)]


def test_two_runs_do_not_fill_one_folder_at_once(tmp_path: Path) -> None:
    with Lock(tmp_path / ".everydream.lock"), pytest.raises(ConfigError, match="another run is making pictures"):
        fill(tmp_path, 3)
    assert fill(tmp_path, 3) == 3
    assert fill(tmp_path, 4) == 1, "the lock was given back"
    assert not list(tmp_path.glob(".*")), "and its file removed"


def test_a_lock_whose_file_its_holder_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, taken = tmp_path / ".everydream.lock", lock._lock, []

    def late(handle: int) -> None:
        """The first time the holder ends between our opening the file and our locking it."""
        if not taken:
            path.unlink()
        taken.append(handle)
        real(handle)

    monkeypatch.setattr(lock, "_lock", late)
    with PassingLock(path) as ours:
        assert len(taken) == 2
        assert ours._handle is not None and os.fstat(ours._handle).st_ino == path.stat().st_ino
    assert not path.exists()


def test_an_error_on_one_process_ends_all_and_gives_the_lock_back(tmp_path: Path) -> None:
    class Failing(Generator):
        def __call__(self, prompts: Sequence[str], generators: Sequence[torch.Generator]) -> list[Image.Image]:
            if generators[0].initial_seed() == prior.torch_generator(5, "class", 1).initial_seed():
                raise RuntimeError("out of memory")
            return super().__call__(prompts, generators)

    results = on_processes(2, lambda ranks: fill(tmp_path, 4, ranks, generate=Failing()))
    assert ["out of memory" in str(result) for result in results] == [True, True]
    assert fill(tmp_path, 4) == 3


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "class").touch()
    with pytest.raises(DataError, match="class_data_root"):
        fill(tmp_path / "class", 3, present=list)
