"""A run's folder is never overwritten, holds one process at a time, and is found by its project and counter."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from everydream.errors import CheckpointError, ConfigError, SaveError
from everydream.training import checkpoint
from everydream.training.lock import Lock
from everydream.training.resuming import Start, check_settings, find_start
from everydream.training.runfolder import Run, make_run, model_in, resolve_resume, runs, title_of
from everydream.training.state import TrainState
from everydream.training.storage import Bytes
from tests.training.processes import on_processes

ROOT = Path(__file__).parents[2]
NOON = datetime(2026, 5, 1, 12, 0, 0, tzinfo=timezone.utc)


def record(lr: float = 1.0) -> dict[str, Any]:
    values = {"seed": 5, "lr": lr}
    settings = {key: {"value": value, "origin": "train.json"} for key, value in values.items()}
    return {"format": "everydream-config-1", "processes": 1, "settings": settings}


def make(logdir: Path, project: str = "cat", now: datetime = NOON, steps: tuple[int, ...] = ()) -> Run:
    run = make_run(logdir, project, project, record(), now=now)
    for step in steps:
        checkpoint.commit(run.checkpoints, step, {"state.json": Bytes(b"%d" % step)})
    run.lock.release()
    return run


def damage(path: Path) -> None:
    (path / "state.json").write_bytes(b"?")


def resume(what: str | Path, logdir: Path, project: str = "cat"):  # type: ignore[no-untyped-def]
    found = resolve_resume(str(what), logdir, project)
    if found.run:
        found.run.lock.release()
    return found


# Making


def test_folders_are_never_overwritten(tmp_path: Path) -> None:
    names = [make(tmp_path / "logs").folder.name for _ in range(3)]
    assert names == ["cat-20260501-120000", "cat-20260501-120000-2", "cat-20260501-120000-3"]


def test_config_holds_the_record_and_what_the_run_is(tmp_path: Path) -> None:
    run = make(tmp_path)
    about = {"counter": 1, "project_name": "cat", "created": "2026-05-01T12:00:00+00:00"}
    assert json.loads(run.config.read_text()) == {**record(), "run": about}
    run.write_config({**record(), "note": 2}, 3)
    assert json.loads(run.config.read_text()) == {**record(), "note": 2, "run": about}


def test_a_checkpoint_is_known_by_the_settings_that_it_was_trained_with(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step, lr in ((5, 2.0), (9, 3.0)):  # changed on the resume from step 5, and once more from step 9
        run.write_config(record(lr=lr), step)

    def lr_at(step: int) -> float:
        return run.record_at(step)["settings"]["lr"]["value"]

    assert [lr_at(step) for step in (3, 5, 6, 9, 10)] == [1.0, 1.0, 2.0, 2.0, 3.0]
    run.write_config(record(lr=1.0), 5)  # back to where the first change was made, without it
    assert [lr_at(step) for step in (3, 5, 6, 10)] == [1.0] * 4
    assert "earlier" not in run.about


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"run": {}, "settings": {}}', "[" * 100_000], ids=range(5))
def test_a_config_that_is_not_whole_is_named(tmp_path: Path, text: str) -> None:
    run = make(tmp_path, steps=(1,))
    run.config.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not whole"):
        run.record_at(1)
    if not run.about:
        with pytest.raises(CheckpointError, match=r"config\.json is missing or not whole"):
            resume("latest", tmp_path)


def test_a_record_that_lacks_what_is_compared_is_named(tmp_path: Path) -> None:
    run = make(tmp_path, steps=(1,))
    start = Start(run.folder, run.checkpoints / checkpoint.name_of(1), TrainState(step=1))

    def changes(old: Any, new: Any) -> Any:
        return old["settings"]["batch_size"], new

    with pytest.raises(CheckpointError, match=r"config\.json is not whole \(KeyError: 'batch_size'\)"):
        check_settings(start, record(), changes, resume_changed=False)


def test_a_counter_that_is_no_number_counts_as_none(tmp_path: Path) -> None:
    run = make(tmp_path, steps=(1,))
    run.config.write_text(json.dumps({**record(), "run": {"counter": "x", "project_name": "cat"}}))
    assert resume("latest", tmp_path).run == run and make(tmp_path).counter == 1


def test_order_is_the_counter_whatever_the_clock_says(tmp_path: Path) -> None:
    first = make(tmp_path, steps=(1,))
    other = make(tmp_path, "dog", steps=(1,))
    set_back = make(tmp_path, now=NOON.replace(year=2001), steps=(1,))
    assert [run.counter for run in (first, other, set_back)] == [1, 2, 3]
    assert runs(tmp_path, "cat") == [set_back, first]
    assert resume("latest", tmp_path).run == set_back


def test_what_is_no_run_is_not_counted(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text('{"run": 3')
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.json").write_text('{"format": "everydream-config-1"}')
    run = make(tmp_path)
    assert run.counter == 1 and runs(tmp_path) == [run]


def test_a_folder_that_cannot_be_made_is_an_error_of_saving(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(SaveError, match=r"cannot make a run folder in .*logs"):
        make(tmp_path / "logs")


# The lock


def hold(path: Path) -> subprocess.Popen[str]:
    code = f"""
from pathlib import Path
from everydream.training.lock import Lock
Lock(Path({str(path)!r})).take()
print("held", flush=True)
input()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout and child.stdout.readline() == "held\n"
    return child


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    run = make(tmp_path, steps=(1,))
    with hold(run.lock.path) as child:
        with pytest.raises(ConfigError, match=rf'in use by another process \(.*"pid": {child.pid}'):
            resolve_resume("latest", tmp_path, "cat")
        child.kill()
    run.lock.take()
    run.lock.release()


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with Lock(tmp_path / ".lock"), pytest.raises(ConfigError, match="in use by this very process"):
        Lock(tmp_path / ".lock").take()
    with Lock(tmp_path / ".lock"):
        pass


def test_a_file_system_without_locks_is_said_and_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("everydream.training.lock._lock", refuse)
    with Lock(tmp_path / ".lock") as lock:
        assert "without locks" in lock.warning


def test_a_forked_worker_does_not_hold_the_lock_on(tmp_path: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    code = f"""
import os, time
from pathlib import Path
from everydream.training.lock import Lock
Lock(Path({str(tmp_path / ".lock")!r})).take()
worker = os.fork()
if worker == 0:
    os.close(1)
    time.sleep(60)
print(worker, flush=True)
"""
    worker = int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE).stdout)
    with Lock(tmp_path / ".lock"):
        os.kill(worker, 9)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no file modes here")
def test_a_read_only_run_is_said() -> None:
    with tempfile.TemporaryDirectory() as name:
        logdir = Path(name)
        logdir.chmod(0o755)
        run = make(logdir, steps=(1,))
        run.lock.path.unlink()
        run.folder.chmod(0o555)
        # No mode keeps root from writing, so the child gives root up.
        code = f"""
import os
from pathlib import Path
from everydream.errors import SaveError
from everydream.training import runfolder
if os.getuid() == 0:
    os.setgid(65534), os.setuid(65534)
try:
    runfolder.resolve_resume("latest", Path({name!r}), "cat")
except SaveError as error:
    print(error)
"""
        said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE).stdout
        run.folder.chmod(0o755)
    assert said.strip() == f"cannot write to the run's folder {run.folder}: Permission denied"


# Models


def test_a_run_stands_for_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (1, 2, 3):
        checkpoint.commit(run.checkpoints, step, {"model/model_index.json": Bytes(b"{}"), "state.json": Bytes(b"")})
    damage(run.checkpoints / "step-0000000003")
    newest = run.checkpoints / "step-0000000002"
    for name in (run.folder, newest):
        assert model_in(str(name)) == (str(newest / "model"), newest / "ema.safetensors")
    assert model_in("owner/name")[0] == "owner/name"
    damage(newest)
    damage(run.checkpoints / "step-0000000001")
    with pytest.raises(CheckpointError, match="has no valid checkpoint"):
        model_in(str(run.folder))


def test_a_checkpoint_is_called_by_its_run_and_step() -> None:
    assert title_of("/logs/cat-2026/checkpoints/step-0000000300/model") == "cat-2026, step 300"
    assert [title_of(name) for name in ("/models/sd15", "owner/name", "x.safetensors")] == [
        "sd15", "name", "x.safetensors",
    ]  # fmt: skip


# Resuming


def test_nothing_there_is_a_new_start(tmp_path: Path) -> None:
    found = resume("latest", tmp_path / "logs")
    assert (found.run, found.checkpoint) == (None, None) and "no run of 'cat'" in found.note
    make(tmp_path / "logs", "dog", steps=(1,))
    assert resume("latest", tmp_path / "logs").checkpoint is None
    empty = make(tmp_path / "logs")
    for what in ("latest", empty.folder):
        found = resume(what, tmp_path / "logs")
        assert found.checkpoint is None and found.run == empty and "has no checkpoint yet" in found.note


def test_a_new_start_warns_where_it_looked_and_what_else_is_there(tmp_path: Path) -> None:
    def said() -> str:
        [(start, _)] = on_processes(1, lambda ranks: find_start("latest", tmp_path, "cat", ranks))
        return str(start.anew)

    assert said() == f"no run of 'cat' in {tmp_path} yet: starting anew"
    make(tmp_path, "dog", steps=(1,))
    assert said() == f"no run of 'cat' in {tmp_path} yet: starting anew (runs of 'dog' are there)"
    older = make(tmp_path, steps=(1,))
    newest = make(tmp_path)
    assert said() == (
        f"{newest.folder} has no checkpoint yet: starting anew (an older run has: --resume {older.folder})"
    )


def test_latest_skips_what_is_damaged_and_says_so(tmp_path: Path) -> None:
    run = make(tmp_path, steps=(1, 2, 3))
    damage(run.checkpoints / "step-0000000003")
    for what in ("latest", run.folder):
        found = resume(what, tmp_path)
        assert found.checkpoint == run.checkpoints / "step-0000000002"
        assert [skipped.path.name for skipped in found.skipped] == ["step-0000000003"]


def test_some_but_none_valid_is_an_error_and_nothing_is_touched(tmp_path: Path) -> None:
    run = make(tmp_path, steps=(1, 2))
    for path in checkpoint.folders(run.checkpoints):
        damage(path)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in run.checkpoints.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"no valid checkpoint:\n.*step-0000000002.*\n.*step-0000000001"
    ) as raised:
        resolve_resume("latest", tmp_path, "cat")
    assert raised.value.exit_code == 4
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in run.checkpoints.rglob("*"))
    run.lock.take()  # the failed attempt does not hold it
    run.lock.release()


def test_a_checkpoint_by_name_is_that_one_or_an_error_naming_the_valid_ones(tmp_path: Path) -> None:
    run = make(tmp_path, steps=(1, 2, 3))
    one = run.checkpoints / "step-0000000001"
    assert resume(one, tmp_path / "elsewhere").checkpoint == one
    damage(one)
    with pytest.raises(CheckpointError, match=r"Valid ones of this run: step-0000000003, step-0000000002"):
        resolve_resume(str(one), tmp_path, "cat")


def test_a_path_relative_or_through_a_link_finds_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path, steps=(1,))
    (tmp_path / "link").symlink_to(run.folder)
    monkeypatch.chdir(run.checkpoints)
    for what in ("step-0000000001", "..", tmp_path / "link"):
        assert resume(what, tmp_path).run == Run(run.folder.resolve())


def test_a_path_that_is_none_of_them_says_what_it_should_be(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"is not a folder\. Give 'latest', a run's folder, or one of its checkpoints"
    ):
        resolve_resume(str(tmp_path / "typo"), tmp_path, "cat")
    with pytest.raises(ConfigError, match="neither a run's folder"):
        resolve_resume(str(tmp_path), tmp_path, "cat")
    loose = checkpoint.commit(tmp_path, 1, {"state.json": Bytes(b"")})
    with pytest.raises(ConfigError, match="neither a run's folder"):
        resolve_resume(str(loose), tmp_path, "cat")
