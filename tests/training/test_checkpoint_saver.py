"""Saves in the background: what training does meanwhile does not reach them, one at a time, and none fails unseen."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from everydream.errors import SaveError
from everydream.training import checkpoint, hostmemory, snapshot
from everydream.training.saver import FAILURES, SPARE, Saved, Saver
from everydream.training.storage import Bytes, Copy, Files
from everydream.training.tensorfile import Tensors, read_tensors

PLENTY = 1 << 40


class SlowDisk(Files):
    """Waits at the first file of a save until it is let go."""

    def __init__(self) -> None:
        self.go, self.writers, self.most = threading.Event(), 0, 0

    def create(self, path: Path) -> int:
        self.writers += 1
        self.most = max(self.most, self.writers)
        assert self.go.wait(30)
        handle = super().create(path)
        self.writers -= 1
        return handle


class FullDisk(Files):
    full = True

    def write(self, handle: int, data: memoryview) -> None:
        if self.full:
            raise OSError(28, os.strerror(28))
        super().write(handle, data)


def saver_of(folder: Path, **options: Any) -> Saver:
    return Saver(folder, **{"background": True, "free_memory": lambda: PLENTY, **options})


def weights(value: float) -> dict[str, Tensors]:
    return {"w.safetensors": Tensors({"w": torch.full((100,), value)})}


def test_training_goes_on_while_the_disk_works(tmp_path: Path) -> None:
    disk = SlowDisk()
    saver = saver_of(tmp_path, files=disk)
    weight = torch.ones(100)
    saver.save(1, {"w.safetensors": Tensors({"w": weight})})  # returns: the disk has not moved yet
    saver.settle()
    weight.fill_(2)
    assert saver.outcomes() == [] and not list(tmp_path.glob("step-*"))
    disk.go.set()
    saver.join()
    [saved] = saver.outcomes()
    assert saved.background and saved.error is None and saved.path is not None
    assert torch.equal(read_tensors(saved.path / "w.safetensors")["w"], torch.ones(100))


def test_training_may_change_its_tensors_only_after_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, copy = threading.Event(), snapshot._copy

    def slow(*arguments: Any) -> None:
        assert go.wait(30)
        copy(*arguments)

    monkeypatch.setattr(snapshot, "_copy", slow)
    saver = saver_of(tmp_path)
    saver.save(1, weights(1))  # returns: the next forward and backward change nothing that is saved
    threading.Timer(0.1, go.set).start()
    saver.settle()
    assert go.is_set()
    saver.require()
    [saved] = saver.outcomes()
    assert 0.05 < saved.held_s < saved.seconds


def test_what_was_made_for_a_save_alone_is_let_go_once_it_is_copied(tmp_path: Path) -> None:
    disk = SlowDisk()
    saver = saver_of(tmp_path, files=disk)
    weight = torch.ones(100)
    seen = weakref.ref(weight)
    saver.save(1, {"w.safetensors": Tensors({"w": weight})})
    del weight
    saver.settle()
    deadline = time.monotonic() + 30
    while seen() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen() is None and saver.outcomes() == []
    disk.go.set()
    saver.require()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no more"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    ],
)
def test_memory_that_is_not_there_after_all_makes_training_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(snapshot, "_copy", broken)
    disk = SlowDisk()
    saver = saver_of(tmp_path, files=disk)
    contents = weights(1.0)
    saver.save(1, contents)
    assert not saver._copied.wait(0.05)  # the live tensors are being written
    disk.go.set()
    saver.settle()
    contents["w.safetensors"].tensors["w"].fill_(2.0)
    saver.join()
    [saved] = saver.outcomes()
    assert saved.path is not None and str(error) in saved.warnings[0]
    assert read_tensors(saved.path / "w.safetensors")["w"].eq(1.0).all()


def test_an_error_in_copying_lets_training_go_on_and_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise ValueError("no more")

    monkeypatch.setattr(snapshot, "_copy", broken)
    saver = saver_of(tmp_path)
    saver.save(1, weights(1))
    saver.settle()
    with pytest.raises(ValueError, match="no more"):
        saver.require()
    assert not os.listdir(tmp_path)


def test_at_most_one_save_is_under_way(tmp_path: Path) -> None:
    disk = SlowDisk()
    saver = saver_of(tmp_path, files=disk)
    saver.save(1, weights(1))
    threading.Timer(0.05, disk.go.set).start()
    saver.save(2, weights(2))  # waits for the first
    assert [saved.step for saved in saver.outcomes()] == [1] or disk.most == 1
    saver.join()
    assert disk.most == 1 and len(checkpoint.folders(tmp_path)) == 2


def test_blocking_saves_are_done_when_save_returns(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, background=False)
    saver.save(1, weights(1))
    [saved] = saver.outcomes()
    assert not saved.background and saved.held_s == saved.seconds > 0 and saved.warnings == ()


def test_the_last_save_is_waited_for_and_copies_nothing(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, free_memory=lambda: 0)
    saver.save(1, weights(1), wait=True)
    [saved] = saver.outcomes()
    assert saved.path is not None and not saved.background and saved.warnings == ()


def test_without_memory_for_a_snapshot_training_waits_and_it_is_said(tmp_path: Path) -> None:
    size = 100 << 20
    contents = {
        "a.safetensors": Tensors({"x": torch.zeros(size // 8)}),
        "b.safetensors": Tensors({"y": torch.zeros(size // 8)}),
    }
    for free, background in ((size, True), (size - 1, False)):
        saver = saver_of(tmp_path / str(free), free_memory=lambda free=free: free + SPARE)
        saver.save(1, contents)
        saver.join()
        [saved] = saver.outcomes()
        assert saved.background is background and saved.error is None
        expected = (
            [] if background else ["a background save would need 0.1 GB more memory and 0.1 GB are free: training"]
        )
        assert [warning[: len(expected[0])] for warning in saved.warnings] == expected


def test_memory_once_taken_for_snapshots_is_not_asked_for_again(tmp_path: Path) -> None:
    free = [PLENTY]
    saver = saver_of(tmp_path, free_memory=lambda: free[0])
    for step in (1, 2):
        saver.save(step, weights(step))
        free[0] = 0
    saver.require()
    assert [saved.background for saved in saver.outcomes()] == [True, True]


def test_failures_in_a_row_are_counted_and_one_success_forgets_them(tmp_path: Path) -> None:
    disk = FullDisk()
    saver = saver_of(tmp_path, files=disk)
    for step in range(1, FAILURES + 1):
        saver.save(step, weights(step))
        saver.join()
        assert saver.failures == step
    assert all(isinstance(saved.error, SaveError) for saved in saver.outcomes())
    with pytest.raises(SaveError, match=r"the last 3 saves failed: cannot save .*No space left"):
        saver.require()
    disk.full = False
    saver.save(9, weights(9))
    saver.require()
    assert saver.failures == 0 and os.listdir(tmp_path) == ["step-0000000009"]


def test_a_failed_save_keeps_the_older_ones_whatever_keep_last_says(tmp_path: Path) -> None:
    disk = FullDisk()
    disk.full = False
    saver = saver_of(tmp_path, files=disk, keep_last=1)
    saver.save(1, weights(1))
    saver.require()
    disk.full = True
    saver.save(2, weights(2))
    saver.join()
    assert os.listdir(tmp_path) == ["step-0000000001"]


def test_retention_comes_after_the_commit(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        saver.save(step, weights(step))
    saver.require()
    assert [len(saved.deleted) for saved in saver.outcomes()] == [0, 0, 1]
    assert len(checkpoint.folders(tmp_path)) == 2


def test_exports_are_made_from_the_checkpoint_and_their_failure_is_only_told(tmp_path: Path) -> None:
    def broken(folder: Path) -> Bytes:
        raise ValueError("no such layout")

    exports: dict[Path, Callable[[Path], Any]] = {
        tmp_path / "exports" / "a.safetensors": lambda folder: Tensors(read_tensors(folder / "w.safetensors")),
        tmp_path / "exports" / "b.safetensors": broken,
    }
    saver = saver_of(tmp_path / "checkpoints")
    saver.save(1, weights(3), exports)
    saver.require()
    [saved] = saver.outcomes()
    assert saved.exported == (tmp_path / "exports" / "a.safetensors",)
    assert saved.warnings == (f"cannot export {tmp_path}/exports/b.safetensors: no such layout",)
    assert read_tensors(saved.exported[0])["w"][0] == 3
    assert os.listdir(tmp_path / "exports") == ["a.safetensors"]


def test_an_error_of_ours_in_the_writer_is_raised_not_swallowed(tmp_path: Path) -> None:
    class Broken(Bytes):
        def write(self, out: object) -> None:
            raise AssertionError("got 3 != 4")

    saver = saver_of(tmp_path)
    saver.save(1, {"a": Broken(b"")})
    saver.join()
    with pytest.raises(AssertionError, match="got 3 != 4"):
        saver.outcomes()
    with pytest.raises(AssertionError, match="got 3 != 4"):
        saver.require()
    assert os.listdir(tmp_path) == []


def test_copied_files_come_from_the_last_checkpoint_so_the_base_model_may_vanish(tmp_path: Path) -> None:
    base = tmp_path / "vae"
    base.write_bytes(b"frozen")
    saver = saver_of(tmp_path / "run")
    saver.save(1, {"vae": Copy(base)})
    saver.require()
    base.write_bytes(b"another model")
    saver.save(2, {"vae": Copy(base)})
    saver.require()
    base.unlink()
    resumed = saver_of(tmp_path / "run", last=tmp_path / "run" / "step-0000000002", keep_last=1)
    resumed.save(3, {"vae": Copy(base)})
    resumed.require()
    assert (tmp_path / "run" / "step-0000000003" / "vae").read_bytes() == b"frozen"


def test_if_the_last_checkpoint_is_damaged_they_come_from_where_they_came_at_first(tmp_path: Path) -> None:
    base = tmp_path / "vae"
    base.write_bytes(b"frozen")
    saver = saver_of(tmp_path / "run")
    saver.save(1, {"vae": Copy(base)})
    saver.require()
    (tmp_path / "run" / "step-0000000001" / "vae").write_bytes(b"frozeM")
    saver.save(2, {"vae": Copy(base)})
    saver.require()
    assert [type(saved) for saved in saver.outcomes()] == [Saved, Saved]
    assert (tmp_path / "run" / "step-0000000002" / "vae").read_bytes() == b"frozen"


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert hostmemory.available(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert hostmemory.available(tmp_path) == pytest.approx(hostmemory.available(tmp_path / "none"), rel=0.5)
