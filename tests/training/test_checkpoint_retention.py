"""Retention counts checkpoints that verify, deletes nothing while the newest is damaged, and never one marked KEEP."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from everydream.training import checkpoint
from everydream.training.retention import KEEP, Retention, supersede
from everydream.training.storage import Bytes, Files


def commit(folder: Path, *steps: int) -> list[Path]:
    return [checkpoint.commit(folder, step, {"state.json": Bytes(b"%d" % step)}) for step in steps]


def steps(folder: Path) -> list[int]:
    return sorted(step for step in map(checkpoint.step_of, folder.iterdir()) if step is not None)


def damage(path: Path) -> None:
    """One bit, same size, and the times as they were: only reading shows it."""
    file = path / "state.json"
    stat = file.stat()
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_the_newest_stay(tmp_path: Path) -> None:
    a, b, *_ = commit(tmp_path, 1, 2, 3, 10)
    assert Retention(tmp_path, 2).apply() == [b, a]
    assert sorted(os.listdir(tmp_path)) == ["step-0000000003", "step-0000000010"]


def test_none_keeps_all(tmp_path: Path) -> None:
    commit(tmp_path, 1, 2, 3)
    assert Retention(tmp_path, None).apply() == []
    assert steps(tmp_path) == [1, 2, 3]


def test_a_damaged_one_is_not_counted(tmp_path: Path) -> None:
    _, _, c, _ = commit(tmp_path, 1, 2, 3, 4)
    damage(c)
    Retention(tmp_path, 2).apply()
    assert steps(tmp_path) == [2, 3, 4]


def test_nothing_is_deleted_while_the_newest_is_damaged(tmp_path: Path) -> None:
    *_, newest = commit(tmp_path, 1, 2, 3)
    retention = Retention(tmp_path, 1)
    damage(newest)
    assert retention.apply() == []
    assert steps(tmp_path) == [1, 2, 3]


def test_the_newest_is_read_each_time_and_the_others_when_they_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int | None] = []

    def verify(path: Path) -> list[str]:
        read.append(checkpoint.step_of(path))
        return checkpoint.verify(path)

    monkeypatch.setattr("everydream.training.retention.verify", verify)
    retention = Retention(tmp_path, 3)
    *_, third, _ = commit(tmp_path, 1, 2, 3, 4)
    retention.apply()
    assert read == [4, 3, 2] and steps(tmp_path) == [2, 3, 4]
    read.clear()
    damage(third)
    os.utime(third / "state.json")  # now its times show it
    commit(tmp_path, 5)
    retention.apply()
    assert read == [5, 3] and steps(tmp_path) == [2, 3, 4, 5]


def test_keep_stays_and_does_not_count(tmp_path: Path) -> None:
    a, *_ = commit(tmp_path, 1, 2, 3, 4)
    (a / KEEP).touch()
    Retention(tmp_path, 2).apply()
    assert steps(tmp_path) == [1, 3, 4]


def test_deleting_renames_before_it_removes(tmp_path: Path) -> None:
    """Killed in the middle of a deletion, no half checkpoint has a checkpoint's name."""

    class Killed(Files):
        def unlink(self, path: Path) -> None:
            raise KeyboardInterrupt

    commit(tmp_path, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        Retention(tmp_path, 1, Killed()).apply()
    assert steps(tmp_path) == [2]
    assert [left.name for left in checkpoint.clean(tmp_path)] == [".deleting-step-0000000001"]


@pytest.mark.parametrize("again", [lambda folder: commit(folder, 20), lambda folder: None], ids=["twice", "once"])
def test_later_checkpoints_are_set_aside_not_lost(tmp_path: Path, again: Callable[[Path], object]) -> None:
    commit(tmp_path, 10, 20, 30)
    aside = supersede(tmp_path, 10)
    assert [path.name for path in aside] == ["superseded-step-0000000030", "superseded-step-0000000020"]
    assert checkpoint.find_latest(tmp_path).path == tmp_path / "step-0000000010"
    assert all(checkpoint.verify(path) == [] for path in aside)
    again(tmp_path)
    for path in supersede(tmp_path, 10):
        assert path.name == "superseded-step-0000000020-2"
    assert steps(tmp_path) == [10]
