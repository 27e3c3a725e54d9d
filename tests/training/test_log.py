"""What a run tells survives full disks, broken trackers, kills and resumes, and never ends the run."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from everydream.training import jsonl, outlets, trackers
from everydream.training.console import Console
from everydream.training.log import NullLog, RunLog
from everydream.training.records import cut_back, grid_files
from everydream.training.worker import Background
from tests.tiny import make_pictures
from tests.training import runs


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def run_log(tmp_path: Path, stream: io.StringIO) -> Iterator[RunLog]:
    made = RunLog(tmp_path, Console("normal", stream))
    yield made
    made.close(0, "done")


def test_metrics_keep_every_digit(run_log: RunLog, tmp_path: Path) -> None:
    value = 0.1 + 0.2
    run_log.metrics(3, {"loss": value, "lr_unet": 1e-6 / 3})
    line = records(tmp_path / "metrics.jsonl")[0]
    assert line == {"step": 3, "loss": value, "lr_unet": 1e-6 / 3}
    assert list(line) == ["step", "loss", "lr_unet"]


def test_a_line_is_in_the_file_at_once(run_log: RunLog, tmp_path: Path) -> None:
    run_log.metrics(1, {"loss": 1.0})
    assert len(records(tmp_path / "metrics.jsonl")) == 1


def test_what_json_does_not_have_is_null() -> None:
    record = {"a": math.nan, "b": [math.inf, np.float32(0.5), np.int64(3)], "c": Path("/x"), "d": {"e": True}}
    assert json.loads(jsonl.encode(record)) == {"a": None, "b": [None, 0.5, 3], "c": "/x", "d": {"e": True}}


def test_events_carry_time_step_and_fields(run_log: RunLog, tmp_path: Path, stream: io.StringIO) -> None:
    run_log.progress(7)
    run_log.event("saved", "saved it", path=Path("/x"), seconds=0.25)
    event = records(tmp_path / "events.jsonl")[-1]
    assert event.pop("time").endswith("Z")
    assert event == {"step": 7, "kind": "saved", "level": "info", "message": "saved it", "path": "/x", "seconds": 0.25}
    assert "saved it" in stream.getvalue()


@pytest.mark.parametrize("level", ["warning", "error"])
def test_a_warning_says_what_to_do(run_log: RunLog, level: str, stream: io.StringIO) -> None:
    with pytest.raises(AssertionError, match="says what to do"):
        run_log.event("x", "something is wrong", level)
    run_log.event("x", "something is wrong", level, todo="Mend it.")
    assert stream.getvalue() == f"{level}: something is wrong\n  Mend it.\n"


def test_the_last_line_is_the_end(run_log: RunLog, tmp_path: Path) -> None:
    run_log.event("note", "hello")
    run_log.close(143, "stopped by signal 15")
    run_log.close(1, "only the first close counts")
    last = records(tmp_path / "events.jsonl")[-1]
    assert (last["kind"], last["code"], last["reason"]) == ("end", 143, "stopped by signal 15")


@pytest.mark.parametrize("code", [3, 5])
def test_a_run_that_lost_steps_names_the_last_checkpoint(tmp_path: Path, stream: io.StringIO, code: int) -> None:
    (tmp_path / "checkpoints" / "step-0000000300").mkdir(parents=True)
    RunLog(tmp_path, Console("quiet", stream)).close(code, "why")
    assert records(tmp_path / "events.jsonl")[-1]["reason"] == "why; the last checkpoint is step 300"
    assert stream.getvalue() == "warning: the last checkpoint is step 300\n"


def full_disk(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """The disk takes half of what is written to `path`, then nothing."""
    write = os.write

    def fails(fd: int, data: bytes) -> int:
        if os.path.samestat(os.fstat(fd), path.stat()):
            if len(data) > 8:
                return write(fd, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data)

    monkeypatch.setattr(jsonl.os, "write", fails)


def test_a_full_disk_is_told_once_and_no_line_is_lost(
    run_log: RunLog, tmp_path: Path, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_log.metrics(1, {"loss": 1.0})
    with monkeypatch.context() as patched:
        full_disk(patched, tmp_path / "metrics.jsonl")
        run_log.metrics(2, {"loss": 2.0})
        run_log.metrics(3, {"loss": 3.0})
        assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == [1], "half a line was left"
    run_log.metrics(4, {"loss": 4.0})
    assert [r["step"] for r in records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert stream.getvalue().count("cannot be written") == 1
    assert stream.getvalue().count("is written again") == 1


def test_a_folder_that_is_gone_is_told_once_for_each_file(tmp_path: Path, stream: io.StringIO) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run_log = RunLog(folder, Console("normal", stream), report=lambda folder: (folder / "report.html").write_text(""))
    folder.rmdir()
    for step in range(3):
        run_log.metrics(step, {"loss": 1.0})
        run_log.schedule([{"step": step}])
        run_log.event("note", "still here")
    run_log.sync()
    run_log.close(0, "done")
    for name in ("events", "metrics", "schedule"):
        assert stream.getvalue().count(f"{name}.jsonl cannot be written") == 1
    assert not folder.exists()


def test_a_closed_stderr_ends_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    run_log = RunLog(tmp_path, Console("normal", stream))
    stream.close()
    run_log.start(0, 2)
    run_log.metrics(1, {"loss": 1.0})
    run_log.close(0, "done")
    assert records(tmp_path / "events.jsonl")[-1]["kind"] == "end"


IN_THE_WAY = """
import shutil
class Vandal:
    def after_step(self, trainer):
        folder = trainer.log.folder
        if trainer.state.step == 2:
            for name in ("events.jsonl", "metrics.jsonl", "report.html", "samples", "profile"):
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                path.mkdir() if name.endswith(("jsonl", "html")) else path.write_text("")
"""


def test_a_run_goes_on_when_nothing_can_be_told_any_more(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_pictures(tmp_path / "pictures", 4, captions="red")
    (tmp_path / "vandal.py").write_text(IN_THE_WAY)
    (tmp_path / "prompts.txt").write_text("red\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"sample_prompts": "prompts.txt", "sample_steps": 2, "plugins": "vandal.Vandal", "write_schedule": True}
    words = runs.options(tiny_model, tmp_path / "pictures", tmp_path, profile_steps=1, **options)
    assert runs.start(*words) == 0
    assert (runs.only_run(tmp_path) / "checkpoints" / "step-0000000006" / "MANIFEST.json").exists()
    told = capfd.readouterr().err
    for what in ("events.jsonl cannot", "metrics.jsonl cannot", "report.html cannot", "no profile", "previews cannot"):
        assert told.count(what) == 1, (what, told)


# --- resume


def test_cut_back_leaves_what_the_checkpoint_knew(tmp_path: Path) -> None:
    lines = [b'{"step": %d, "loss": 0.30000000000000004}' % step for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": "start"}\n{"step": 2}\n{"step": 5, "kind": "e')
    (tmp_path / "samples").mkdir()
    for step in (0, 3, 5):
        (tmp_path / "samples" / f"step-{step:010d}.png").write_bytes(b"")
    assert cut_back(tmp_path, 3) == {"metrics.jsonl": 2, "events.jsonl": 1}
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join(lines[:3]) + b"\n"
    assert records(tmp_path / "events.jsonl") == [{"kind": "start"}, {"step": 2}]
    for name in ("step-0000000003 copy.png", "step-0000000009(1).png", "step-9.jpg"):  # a person's
        (tmp_path / "samples" / name).touch()
    assert sorted(grid_files(tmp_path)) == [0, 3]
    assert not list(tmp_path.glob(".*.new"))


def test_a_background_save_told_after_its_step_stays_with_its_checkpoint(tmp_path: Path) -> None:
    saves = [{"step": step + 1, "kind": "saved", "of_step": step} for step in (3, 6)]
    (tmp_path / "events.jsonl").write_bytes(b"".join(map(jsonl.encode, saves)))
    assert cut_back(tmp_path, 3) == {"events.jsonl": 1}
    assert records(tmp_path / "events.jsonl") == saves[:1]


def test_cut_back_does_not_touch_a_file_that_is_right(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino, path.stat().st_mtime_ns
    assert cut_back(tmp_path, 1) == {}
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before


def test_a_torn_line_is_removed_even_where_nothing_is_too_new(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1, "lo')
    assert cut_back(tmp_path, 9) == {"metrics.jsonl": 1}
    assert records(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_torn_lines_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\n[3]\n{"step": "x"}\n{"step": 2}\n{"st')
    assert [record["step"] for record in jsonl.read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert list(jsonl.read(tmp_path / "nothing.jsonl")) == []


# --- ranks, null object


def test_both_logs_have_the_same_methods_and_remember_the_newest_metrics(run_log: RunLog) -> None:
    public = {name for name in dir(RunLog) if not name.startswith("_")}
    assert public == {name for name in dir(NullLog) if not name.startswith("_")}
    for each in (NullLog(), run_log):
        each.metrics(4, {"loss": 1.0, "loss_val": 2.0})
        each.metrics(5, {"loss": 3.0})
        assert (each.latest, each.steps) == ({"loss": 3.0, "loss_val": 2.0}, {"loss": 5, "loss_val": 4})


def test_a_null_log_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    null = NullLog()
    with null.task("work", 3) as advance:
        advance(1)
    null.event("x", "x", "warning")
    null.images(1, "x", [tmp_path / "x.png"])
    null.schedule([{"step": 1}])
    null.sync()
    null.close(0, "done")
    assert capsys.readouterr() == ("", "")


# --- trackers


class FakeTracker:
    where = "https://example.org/run"

    def __init__(self, folder: Path, project: str, run_name: str, resumed_step: int | None) -> None:
        self.calls: list[Any] = [(folder, project, run_name, resumed_step)]
        made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, settings: Any) -> None:
        self.calls.append(settings)

    def log(self, values: dict[str, float], step: int) -> None:
        if "explode" in values:
            raise RuntimeError("no network")
        self.calls.append((step, values))

    def log_image_file(self, name: str, path: Path, step: int) -> None:
        self.calls.append((step, name, path))

    def finish(self) -> None:
        self.calls.append("finish")


made: list[FakeTracker] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[FakeTracker]:
    made.clear()
    monkeypatch.setitem(trackers.TRACKERS, "fake", FakeTracker)
    return made


def test_a_tracker_gets_settings_metrics_and_images(
    fake: list[FakeTracker], tmp_path: Path, stream: io.StringIO
) -> None:
    settings = {"seed": {"value": 1, "origin": "default"}}
    console = Console("normal", stream)
    options: dict[str, Any] = {"project": "p", "run_name": "r", "settings": settings, "resumed_step": 4}
    run_log = RunLog(tmp_path, console, trackers=["fake"], **options)
    assert not fake, "opened before there is anything to tell: its import would delay the first step"
    run_log.metrics(5, {"loss": 1.0})
    run_log.images(5, "preview", [tmp_path / "a.png", tmp_path / "b.png"])
    run_log.close(0, "done")
    assert fake[0].calls == [
        (tmp_path, "p", "r", 4),
        "start",
        settings,
        (5, {"loss": 1.0}),
        (5, "preview", tmp_path / "a.png"),
        (5, "preview/1", tmp_path / "b.png"),
        "finish",
    ]
    assert "fake: https://example.org/run" in stream.getvalue()


def test_a_broken_tracker_is_told_once_and_gets_nothing_more(
    fake: list[FakeTracker], tmp_path: Path, stream: io.StringIO
) -> None:
    run_log = RunLog(tmp_path, Console("normal", stream), trackers=["fake"])
    for step in range(1, 4):
        run_log.metrics(step, {"explode": 1.0})
    run_log.close(0, "done")
    assert stream.getvalue().count("fake failed and gets nothing more: RuntimeError: no network") == 1
    assert len(records(tmp_path / "metrics.jsonl")) == 3
    assert records(tmp_path / "events.jsonl")[-1]["kind"] == "end"
    assert "finish" not in fake[0].calls


def test_a_tracker_that_hangs_does_not_hold_the_run(
    fake: list[FakeTracker], tmp_path: Path, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlets, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(FakeTracker, "log", lambda *_, **__: time.sleep(1))
    run_log = RunLog(tmp_path, Console("normal", stream), trackers=["fake"])
    run_log.metrics(1, {"loss": 1.0})
    run_log.close(0, "done")
    assert "fake failed and gets nothing more: TimeoutError" in stream.getvalue()


def test_every_tracker_has_an_expectation() -> None:
    assert set(trackers.TRACKERS) == {"tensorboard", "wandb"}


def test_tensorboard_has_scalars_images_settings_and_hides_what_is_superseded(tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (4, 6), "red").save(tmp_path / "x.png")
    settings = {"seed": {"value": 7, "origin": "train.json"}, "betas": {"value": [0.9, 0.99], "origin": "default"}}
    for resumed, steps in ((None, (1, 2, 3)), (1, (2,))):
        run_log = RunLog(tmp_path, Console("quiet"), settings=settings, trackers=["tensorboard"], resumed_step=resumed)
        for step in steps:
            run_log.metrics(step, {"loss": 1.0 / step, "lr_unet": 1e-6})
        run_log.images(steps[0], "preview", [tmp_path / "x.png"])
        run_log.close(0, "done")
        assert "tracker" not in {event["kind"] for event in records(tmp_path / "events.jsonl")}
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert read.Images("preview")[-1].height == 6
    assert b"`seed` | 7 | train.json" in read.Tensors("settings/text_summary")[0].tensor_proto.string_val[0]
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "no second run beside this one"


@pytest.mark.long
def test_wandb_offline_keeps_all_in_the_run_folder_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: io.StringIO
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is an extra: pip install 'everydream[wandb]'")
    from PIL import Image

    monkeypatch.setenv("WANDB_MODE", "offline")
    Image.new("RGB", (4, 6), "red").save(tmp_path / "x.png")
    for resumed in (None, 1):
        settings = {"seed": {"value": 7, "origin": "train.json"}}
        run_log = RunLog(
            tmp_path, Console("normal", stream), settings=settings, trackers=["wandb"], resumed_step=resumed
        )
        run_log.metrics(2, {"loss": 0.5})
        run_log.images(2, "preview", [tmp_path / "x.png"])
        run_log.close(0, "done")
        assert wandb.run is None
    assert "failed" not in stream.getvalue()
    assert "wandb sync" in stream.getvalue()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 2
    assert len({path.name for path in runs}) == 1, "a resumed run goes on under its id"
    words = (b"seed", b"origins", b"train.json", b"loss")
    until = time.monotonic() + 30  # W&B's own process writes on for a moment after it was told to finish
    while not all(word in path.read_bytes() for path in runs for word in words):
        assert time.monotonic() < until, [[word in path.read_bytes() for word in words] for path in runs]
        time.sleep(0.1)


# --- the thread, the report


def test_background_jobs_run_in_order_and_their_failures_are_told() -> None:
    failures: list[Exception] = []
    done: list[int] = []
    background = Background("test", failures.append)
    for i in range(5):
        background.do(lambda i=i: done.append(i))
    background.do(lambda: 1 // 0)
    background.do(lambda: done.append(5))
    assert background.close(5)
    assert done == [0, 1, 2, 3, 4, 5]
    assert [type(error) for error in failures] == [ZeroDivisionError]


def test_background_drops_jobs_rather_than_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr("everydream.training.worker.QUEUE_JOBS", 2)
    gate = threading.Event()
    background = Background("test", lambda error: None)
    for _ in range(10):
        background.do(gate.wait)
    assert background.dropped >= 7
    gate.set()
    assert background.close(5)


def test_the_report_is_refreshed_with_previews_and_at_the_end(tmp_path: Path, stream: io.StringIO) -> None:
    written: list[list[str]] = []

    def report(folder: Path) -> None:
        written.append([event["kind"] for event in records(folder / "events.jsonl")])

    run_log = RunLog(tmp_path, Console("normal", stream), report=report)
    run_log.event("note", "hello")
    run_log.metrics(1, {"loss": 1.0})
    run_log.images(1, "preview", [])
    run_log.close(0, "done")
    assert written[0] == ["note"]
    assert written[-1] == ["note", "end"]


def test_a_report_that_fails_is_told_once(tmp_path: Path, stream: io.StringIO) -> None:
    def report(folder: Path) -> None:
        raise OSError("no space")

    run_log = RunLog(tmp_path, Console("normal", stream), report=report)
    for step in range(3):
        run_log.images(step, "preview", [])
    run_log.close(0, "done")
    assert stream.getvalue().count("report.html cannot be written") == 1
    assert records(tmp_path / "events.jsonl")[-1]["kind"] == "end"
