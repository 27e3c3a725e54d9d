"""A power cut at any instant leaves the old checkpoint or the new one; once a save is reported, the new one.

The file operations of a run are recorded: making its folder, a first save, a second one with the first deleted after
it, an export. Every prefix of them is replayed with what was not synced lost, in part or whole. Then again with each
sync left out in turn: the test must notice every one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from everydream.training import checkpoint
from everydream.training.retention import Retention
from everydream.training.runfolder import Run, make_run, runs
from everydream.training.storage import Bytes, write_atomically
from tests.faults.conftest import Inject
from tests.faults.powercut import Recorder, State, lay_out, states

RECORD = {"format": "everydream-config-1"}


def contents(step: int) -> dict[str, Bytes]:
    return {
        "model/model_index.json": Bytes(b"{}"),
        "model/unet/weights.safetensors": Bytes(b"weights of step %d" % step),
        "state.json": Bytes(b'{"step": %d}' % step),
    }


def record(root: Path, without: int | None = None) -> Recorder:
    root.mkdir()
    disk = Recorder(without)
    run = make_run(root / "logs", "cat", "cat", RECORD, files=disk)
    disk.mark("run")
    checkpoint.commit(run.checkpoints, 1, contents(1), disk)
    disk.mark("first")
    checkpoint.commit(run.checkpoints, 2, contents(2), disk)
    disk.mark("second")
    Retention(run.checkpoints, 1, disk).apply()
    disk.mark("deleted")
    write_atomically(run.folder / "exports" / "cat.safetensors", Bytes(b"export"), disk)
    disk.mark("exported")
    run.lock.release()
    return disk


def broken_law(found: Path, done: set[str]) -> str:
    """What a state breaks, given which steps had been reported as done; empty for none."""
    left = runs(found / "logs")
    if not left:
        return "the run is gone" if "run" in done else ""
    [run] = left
    if run.about["counter"] != 1:
        return "config.json is not whole"
    latest = checkpoint.find_latest(run.checkpoints)
    if latest.skipped:
        return f"half a checkpoint has a checkpoint's name: {latest.skipped[0]}"
    if "first" in done and latest.path is None:
        return "no checkpoint is left"
    if "second" in done and checkpoint.step_of(latest.path or Path()) != 2:
        return "a save that was reported is gone"
    for path in checkpoint.folders(run.checkpoints):
        problem = checkpoint.verify(path) or _differs(path)
        if problem:
            return f"{path.name}: {problem}"
    export = run.folder / "exports" / "cat.safetensors"
    if export.exists() and export.read_bytes() != b"export":
        return "half an export has an export's name"
    return "the export is gone" if "exported" in done and not export.exists() else ""


def _differs(path: Path) -> str:
    expected = {name: content.data for name, content in contents(checkpoint.step_of(path) or 0).items()}
    return "" if all((path / name).read_bytes() == data for name, data in expected.items()) else "other content"


def goes_on(run: Run) -> str:
    """After the cut the run must be able to clear up and save again."""
    checkpoint.clean(run.checkpoints)
    checkpoint.commit(run.checkpoints, 3, contents(3), Recorder())
    latest = checkpoint.find_latest(run.checkpoints)
    names = {path.name for path in run.checkpoints.iterdir()}
    leftovers = [name for name in names if not name.startswith("step-")]
    return "" if checkpoint.step_of(latest.path or Path()) == 3 and not leftovers else f"cannot go on: {names}"


@pytest.fixture
def fast() -> Iterator[Path]:
    """In memory where there is such a place: thousands of small files are made and removed."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_every_state_after_a_cut_loads_the_old_or_the_new_checkpoint(fast: Path, injected: Inject) -> None:
    disk = record(fast / "disk")
    count = 0
    for n, cut, state in states(disk, fast / "disk", randoms=20):
        lay_out(state, fast / "found")
        done = {name for name, mark in disk.marks.items() if n >= mark}
        problem = broken_law(fast / "found", done)
        if not problem and (left := runs(fast / "found" / "logs")):
            problem = goes_on(left[0])
        assert not problem, f"after operation {n}, {cut}, done {done}: {problem}\n{_listing(state)}"
        shutil.rmtree(fast / "found")
        count += 1
    injected("power cut: different states of the disk afterwards", count)
    assert count > 2 * len(disk.operations)


def test_each_sync_is_needed(fast: Path, injected: Inject) -> None:
    syncs = record(fast / "all").syncs
    assert syncs > 20
    for without in range(syncs):
        root = fast / str(without)
        disk = record(root, without)
        assert _is_noticed(disk, root, fast / "found"), f"without sync {without} nothing was ever lost"
    injected("sync left out: the power-cut test notices", syncs)


def _is_noticed(disk: Recorder, root: Path, found: Path) -> bool:
    for n, _, state in states(disk, root, randoms=0):
        lay_out(state, found)
        problem = broken_law(found, {name for name, mark in disk.marks.items() if n >= mark})
        shutil.rmtree(found)
        if problem:
            return True
    return False


def _listing(state: State) -> str:
    return "\n".join(f"  {name} {'' if content is None else content!r}" for name, content in state.items())


def test_the_model_of_a_power_cut_loses_what_is_not_synced(tmp_path: Path) -> None:
    """The test above proves nothing with a disk that keeps everything."""
    disk = Recorder()
    (tmp_path / "root").mkdir()
    handle = disk.create(tmp_path / "root" / "a")
    disk.write(handle, memoryview(b"data"))
    disk.close(handle)
    found = [state for _, _, state in states(disk, tmp_path / "root", randoms=20)]
    assert {} in found and {"a": b""} in found and {"a": bytes(4)} in found and {"a": b"data"} in found
    assert any(state.get("a") in (b"d", b"da", b"dat") for state in found)


def test_a_rename_from_folder_to_folder_is_no_atomic_change(tmp_path: Path) -> None:
    disk = Recorder()
    for name in ("root", "root/a", "root/b"):
        (tmp_path / name).mkdir() if name == "root" else disk.make_folder(tmp_path / name)
    disk.rename(tmp_path / "root" / "a", tmp_path / "root" / "b" / "a")
    with pytest.raises(AssertionError, match="half happen"):
        list(states(disk, tmp_path / "root", randoms=0))
