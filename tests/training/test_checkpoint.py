"""A checkpoint is whole or is not there; the newest that is whole is found, and each that is not is named with why."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from everydream.errors import SaveError
from everydream.training import checkpoint
from everydream.training.storage import Bytes, ChangedFile, Content, Copy, Files, sha256_of

CONTENTS: dict[str, Content] = {
    "model/unet/config.json": Bytes(b"{}"),
    "model/model_index.json": Bytes(b"{}"),
    "optimizer.safetensors": Bytes(bytes(range(256)) * 20),
    "state.json": Bytes(b'{"step": 1}'),
}


def commit(folder: Path, step: int, **options: Files) -> Path:
    return checkpoint.commit(folder, step, CONTENTS, **options)


def test_committed_has_its_name_its_files_and_a_manifest(tmp_path: Path) -> None:
    path = commit(tmp_path / "deep" / "checkpoints", 1200)
    assert path.name == "step-0000001200"
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    manifest = json.loads(files.pop("MANIFEST.json"))
    assert files == {name: content.data for name, content in CONTENTS.items() if isinstance(content, Bytes)}
    for name, entry in manifest["files"].items():
        written = sha256_of(path / name)
        assert entry == {"bytes": written.size, "sha256": written.sha256}
    assert os.listdir(path.parent) == [path.name]
    assert checkpoint.verify(path) == []


def test_latest_is_by_step_not_by_time_or_name_length(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        commit(tmp_path, step)
    os.utime(tmp_path / "step-0000000009", (2e9, 2e9))
    found = checkpoint.find_latest(tmp_path)
    assert found.path == tmp_path / "step-0000000100" and found.skipped == ()


def test_nothing_there_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.find_latest(tmp_path / "none") == checkpoint.Found(None, ())
    (tmp_path / "step-1").mkdir()  # not a checkpoint's name
    (tmp_path / ".saving-step-0000000001").mkdir()
    assert checkpoint.find_latest(tmp_path) == checkpoint.Found(None, ())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _manifest_edit(key: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "MANIFEST.json").read_text())
        content[key] = value
        (folder / "MANIFEST.json").write_text(json.dumps(content))

    return edit


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (lambda p: _flip(p / "optimizer.safetensors"), "optimizer.safetensors: its bytes have changed"),
    "truncated": (lambda p: os.truncate(p / "state.json", 3), "state.json: 3 bytes, 11 were written"),
    "appended": (lambda p: os.truncate(p / "state.json", 12), "state.json: 12 bytes, 11 were written"),
    "a file missing": (lambda p: (p / "state.json").unlink(), "state.json: is missing"),
    "a folder for a file": (
        lambda p: ((p / "state.json").unlink(), (p / "state.json").mkdir()),
        "state.json: is missing",
    ),
    "no manifest": (lambda p: (p / "MANIFEST.json").unlink(), "MANIFEST.json: No such file"),
    "an empty manifest": (lambda p: os.truncate(p / "MANIFEST.json", 0), "MANIFEST.json: not whole"),
    "half a manifest": (lambda p: os.truncate(p / "MANIFEST.json", 200), "MANIFEST.json: not whole"),
    "a manifest of zeros": (lambda p: (p / "MANIFEST.json").write_bytes(bytes(400)), "MANIFEST.json: not whole"),
    "a manifest that is a list": (lambda p: (p / "MANIFEST.json").write_text("[]"), "MANIFEST.json: not whole"),
    "its own hash wrong": (_manifest_edit("step", 6), "its own hash does not match"),
    "another format": (_manifest_edit("format", "other-9"), "format 'other-9', this program reads"),
    "renamed": (lambda p: p.rename(p.with_name("step-0000000006")), "MANIFEST.json: of step 5"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_skipped_and_said(tmp_path: Path, damage: str) -> None:
    older, newer = commit(tmp_path, 4), commit(tmp_path, 5)
    inflict, expected = DAMAGE[damage]
    inflict(newer)
    found = checkpoint.find_latest(tmp_path)
    assert found.path == older
    [skipped] = found.skipped
    assert expected in str(skipped) and "cannot be used" in str(skipped)


def test_a_name_that_points_out_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    content = json.loads((path / "MANIFEST.json").read_text())
    del content["sha256"]
    content["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    content["sha256"] = checkpoint._own_hash(content)
    (path / "MANIFEST.json").write_text(json.dumps(content))
    assert checkpoint.verify(path) == ["../../etc/passwd: points out of the checkpoint"]


def test_a_users_file_in_a_checkpoint_does_no_harm(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    (path / "KEEP").touch()
    assert checkpoint.verify(path) == []


def test_a_valid_checkpoint_of_the_step_is_left_as_it_is(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    before = (path / "MANIFEST.json").stat().st_mtime_ns
    assert checkpoint.commit(tmp_path, 1, {"other": Bytes(b"")}) == path
    assert (path / "MANIFEST.json").stat().st_mtime_ns == before


def test_a_damaged_one_of_the_step_is_replaced(tmp_path: Path) -> None:
    _flip(commit(tmp_path, 1) / "state.json")
    path = commit(tmp_path, 1)
    assert checkpoint.verify(path) == [] and os.listdir(tmp_path) == [path.name]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = commit(tmp_path, 1)
    for name in (".saving-step-0000000002", ".deleting-step-0000000000"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "half").write_bytes(b"")
    (tmp_path / "notes").mkdir()
    assert [left.name for left in checkpoint.clean(tmp_path)] == [
        ".deleting-step-0000000000",
        ".saving-step-0000000002",
    ]
    assert sorted(os.listdir(tmp_path)) == ["notes", path.name]
    assert checkpoint.clean(tmp_path / "none") == []


def test_a_leftover_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".saving-step-0000000001" / "model").mkdir(parents=True)
    assert checkpoint.verify(commit(tmp_path, 1)) == []


class FailingDisk(Files):
    """The nth operation fails, and all that add to the disk after it."""

    def __init__(self, fails_at: int, code: int = errno.ENOSPC) -> None:
        self.count, self.fails_at, self.code = 0, fails_at, code

    def _tick(self) -> None:
        self.count += 1
        if self.count >= self.fails_at:
            raise OSError(self.code, os.strerror(self.code))

    def make_folder(self, path: Path) -> None:
        self._tick()
        super().make_folder(path)

    def create(self, path: Path) -> int:
        self._tick()
        return super().create(path)

    def write(self, handle: int, data: memoryview) -> None:
        if self.count + 1 == self.fails_at:
            super().write(handle, data[: len(data) // 2])
        self._tick()
        super().write(handle, data)

    def sync(self, handle: int) -> None:
        self._tick()

    def sync_folder(self, path: Path) -> None:
        self._tick()

    def rename(self, source: Path, target: Path) -> None:
        self._tick()
        super().rename(source, target)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS], ids=os.strerror)
def test_a_disk_that_fails_at_any_operation_costs_that_save_only(tmp_path: Path, code: int) -> None:
    counting = FailingDisk(10**9)
    commit(tmp_path / "0", 1, files=FailingDisk(10**9))
    commit(tmp_path / "0", 2, files=counting)
    assert counting.count > 3 * len(CONTENTS)
    for n in range(1, counting.count + 1):
        checkpoints = tmp_path / str(n)
        older = commit(checkpoints, 1, files=FailingDisk(10**9))
        with pytest.raises(SaveError, match=r"cannot save .*step-0000000002: ") as raised:
            commit(checkpoints, 2, files=FailingDisk(n, code))
        assert os.strerror(code) in str(raised.value)
        left = sorted(os.listdir(checkpoints))
        if n == counting.count:  # the name of a folder that is whole by then could not be made durable
            assert left == [older.name, "step-0000000002"] and checkpoint.verify(checkpoints / left[1]) == []
        else:
            assert left == [older.name], f"operation {n} left something"
        assert checkpoint.verify(older) == []


def test_a_file_system_that_cannot_sync_folders_can_still_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    assert checkpoint.verify(commit(tmp_path, 1)) == []


def test_a_full_disk_is_named_with_what_is_free(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"No space left on device \(\d+\.\d\d GB free there\): make room"):
        commit(tmp_path, 1, files=FailingDisk(5))


def test_a_copied_file_must_be_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "vae").write_bytes(b"weights")
    good = Copy(tmp_path / "vae", sha256_of(tmp_path / "vae").sha256)
    path = checkpoint.commit(tmp_path / "checkpoints", 1, {"vae": good})
    assert (path / "vae").read_bytes() == b"weights"
    assert (path / "vae").stat().st_ino != (
        tmp_path / "vae"
    ).stat().st_ino  # never hard-linked: one flip would hit both
    _flip(tmp_path / "vae")
    with pytest.raises(SaveError, match="vae is no longer what it was") as raised:
        checkpoint.commit(tmp_path / "checkpoints", 2, {"vae": good})
    assert isinstance(raised.value.__cause__, ChangedFile)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="No such file"):
        checkpoint.commit(tmp_path / "checkpoints", 1, {"vae": Copy(tmp_path / "none")})


def test_the_folder_removed_under_way_is_made_again(tmp_path: Path) -> None:
    import shutil

    checkpoints = tmp_path / "run" / "checkpoints"
    commit(checkpoints, 1)
    shutil.rmtree(tmp_path / "run")
    assert checkpoint.verify(commit(checkpoints, 2)) == []


def test_listing_needs_no_torch() -> None:
    code = "import sys, everydream.training.checkpoint, everydream.training.runfolder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
