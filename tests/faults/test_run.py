"""What a run does when something goes wrong around it: exit codes, what is said, and what is left."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everydream.runtime import Ranks
from everydream.training import checkpoint
from everydream.training.bag import Bag
from everydream.training.previews import Previews
from everydream.training.runfolder import runs
from everydream.training.storage import DISK, Files
from everydream.training.turns import Trainer
from everydream.training.update import Update
from everydream.training.validation import Validation
from tests.faults.conftest import Inject
from tests.faults.running import CAPTIONS, World, assert_same_run, lines, newest_checkpoint, newest_run, stop
from tests.tiny import make_pictures


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world: World) -> Path:
    """Six steps without any fault."""
    config = world.settings("straight")
    assert world.train(config) == 0
    return newest_run(world.logdir(config))


def steps(run: Path) -> list[int]:
    return sorted(step for step in map(checkpoint.step_of, (run / "checkpoints").iterdir()) if step is not None)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["kind"] == kind]


def after_the_save(run: Path) -> Path:
    """The run's folder, once the save that is made beside the training is done."""
    for thread in threading.enumerate():
        if thread.name.startswith("save step"):
            thread.join()
    return run


def tensors_of(run: Path, step: int) -> dict[str, str]:
    """File → hash, of all that holds tensors."""
    files = json.loads((run / "checkpoints" / checkpoint.name_of(step) / "MANIFEST.json").read_bytes())["files"]
    return {name: file["sha256"] for name, file in files.items() if name.endswith(".safetensors")}


# Signals


@pytest.fixture
def hangup() -> Iterator[None]:
    """As in a terminal: nohup, which the tests may run under, has the signal ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_at_the_boundary_and_is_the_exit_code(
    world: World, signum: int, code: int, injected: Inject
) -> None:
    config = world.settings(f"signal-{code}", save_every_n_steps=None)
    assert world.train(config, at={3: stop(signum)}) == code
    run = newest_run(world.logdir(config))
    assert steps(run) == [3] and newest_checkpoint(run)
    [end] = events(run, "end")
    assert end["code"] == code and lines(run / "events.jsonl")[-1] == end
    injected("SIGTERM or SIGINT to script, launcher or process", 1)


def test_before_the_first_update_there_is_nothing_to_save_and_it_is_said(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = world.settings("too-early")
    monkeypatch.setattr(Trainer, "preview", lambda self: stop()())
    assert world.train(config) == 143
    run = newest_run(world.logdir(config))
    assert not (run / "checkpoints").exists()
    assert events(run, "end")[0]["reason"] == "stopped by signal 15, before there was anything to save"


@pytest.mark.parametrize(("full_until", "code"), [(1, 143), (99, 5)])
def test_a_stop_tries_again_to_save_what_the_last_save_could_not(
    world: World, monkeypatch: pytest.MonkeyPatch, full_until: int, code: int
) -> None:
    full(monkeypatch, set(range(1, full_until + 1)))
    config = world.settings(f"stop-after-failure-{code}", save_every_n_steps=4, max_steps=9)
    original = Update.micro_batches

    def stopped(self: Update) -> Any:  # in the update after the failed save, before its first micro-batch
        if self._indices[0] == 4:
            stop()()
        yield from original(self)

    monkeypatch.setattr(Update, "micro_batches", stopped)
    assert world.train(config) == code
    run = newest_run(world.logdir(config))
    assert steps(run) == ([4] if code == 143 else [])
    assert len(events(run, "save_failed")) == (1 if code == 143 else 2)
    assert events(run, "end")[0]["code"] == code


VALIDATION = {"val_split_mode": "automatic", "auto_split_proportion": 0.3, "every_n_epochs": 0, "every_n_steps": 3}


def test_a_signal_in_a_validation_that_ends_all_the_same_repeats_no_line(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world.folder / "val.json").write_text(json.dumps(VALIDATION))
    straight = world.settings("validated", validation_config="val.json", max_steps=4)
    assert world.train(straight) == 0
    config = world.settings("validated-stopped", validation_config="val.json", max_steps=4)
    original = Validation.__call__

    def stopped(self: Validation, step: int) -> Any:
        values = original(self, step)
        if step == 3:
            stop()()
        return values

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "__call__", stopped)
        assert world.train(config) == 143
    assert steps(newest_run(world.logdir(config)))[-1] == 3, "it ends at once"
    assert world.train(config, "--resume", "latest") == 0
    assert_same_run(newest_run(world.logdir(straight)), newest_run(world.logdir(config)))


def test_a_signal_in_the_last_preview_is_made_up_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    previews = {"sample_prompts": "prompts.json", "sample_steps": 2, "max_steps": 4}
    straight, config = world.settings("previewed", **previews), world.settings("previewed-stopped", **previews)
    assert world.train(straight) == 0
    original = Previews.__call__

    def stopped(self: Previews, step: int) -> Any:
        if step == 4:
            stop()()
        return original(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Previews, "__call__", stopped)
        assert world.train(config) == 143
    run = newest_run(world.logdir(config))
    assert steps(run)[-1] == 4 and not list((run / "samples").glob("*4*.png"))
    assert world.train(config, "--resume", "latest") == 0
    pictures = [{p.name: p.read_bytes() for p in (newest_run(world.logdir(one)) / "samples").rglob("*.png")}
                for one in (straight, config)]  # fmt: skip
    assert pictures[0] == pictures[1]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert world.train(config, "--resume", "latest") == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, "now it is finished"


# Resuming


def test_a_change_that_no_checkpoint_has_seen_is_asked_for_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
    config = world.settings("changed", before)
    assert world.train(config, at={2: stop()}) == 143
    world.settings("changed", {**before, "weight_decay": 0.5})
    report = Trainer.report
    with monkeypatch.context() as patch:  # stopped before its first update
        patch.setattr(Trainer, "report", lambda self: (stop()(), report(self)))
        assert world.train(config, "--resume", "latest", "--resume_changed") == 143
    capfd.readouterr()
    assert world.train(config, "--resume", "latest") == 2
    assert "weight_decay" in capfd.readouterr().err
    world.settings("changed", before)
    assert world.train(config, "--resume", "latest") == 0


def test_trained_parts_may_change_with_an_average(world: World) -> None:
    config = world.settings("averaged", ema_decay_rate=0.9, max_steps=2)
    assert world.train(config) == 0
    for more in ({"disable_textenc_training": True, "max_steps": 3}, {"max_steps": 4}):
        world.settings("averaged", **{"ema_decay_rate": 0.9, **more})
        assert world.train(config, "--resume", "latest", "--resume_changed") == 0


def test_a_disk_that_is_full_when_a_resume_begins_leaves_the_checkpoints_as_they_were(
    world: World, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = world.settings("full-resume")
    shutil.copytree(straight, world.logdir(config) / straight.name)
    run = newest_run(world.logdir(config))

    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("everydream.training.runfolder.write_atomically", full)
    assert world.train(config, "--resume", str(run / "checkpoints" / "step-0000000002")) == 5
    assert steps(run) == [2, 4, 6]


def test_two_runs_that_export_into_one_folder_keep_each_others_files(world: World) -> None:
    for seed in (5, 77):
        config = world.settings(f"shared-{seed}", save_ckpt_dir="shared", save_single_file=True, max_steps=2, seed=seed)
        assert world.train(config) == 0
    names = sorted(path.name for path in (world.folder / "shared").iterdir())
    other = newest_run(world.logdir(config)).name
    assert names == sorted(["faults-step-0000000002.safetensors", f"{other}-step-0000000002.safetensors"])


def test_a_picture_that_goes_away_under_way_costs_nothing_that_was_learnt(world: World) -> None:
    own, name = Path(shutil.copytree(world.folder / "pictures", world.folder / "going")), "going"
    config = world.settings(name, data_root=str(own), crop_jitter=0.1, save_every_n_steps=None, max_steps=9)
    gone = {path: path.read_bytes() for path in own.glob("*.png")}
    assert world.train(config, at={2: lambda: [path.unlink() for path in gone]}) == 2  # type: ignore[func-returns-value]
    run = newest_run(world.logdir(config))
    assert steps(run) == [2] and newest_checkpoint(run)
    for path, content in gone.items():
        path.write_bytes(content)
    straight = world.settings(f"{name}-straight", data_root=str(own), crop_jitter=0.1, save_every_n_steps=None,
                              max_steps=9)  # fmt: skip
    assert world.train(straight) == 0
    assert world.train(config, "--resume", "latest") == 0
    assert_same_run(newest_run(world.logdir(straight)), run)


def test_accepted_changes_begin_with_the_first_epoch_of_which_nothing_was_trained(world: World) -> None:
    own = world.folder / "epochs"
    make_pictures(own, 8, size=(64, 64), captions=CAPTIONS)
    config = world.settings("epochs", data_root=str(own), batch_size=4, max_epochs=1, max_steps=None,
                            write_schedule=True)  # fmt: skip
    assert world.train(config) == 0
    next(own.glob("*.txt")).write_text("another")
    world.settings("epochs", data_root=str(own), batch_size=4, max_epochs=3, max_steps=None, write_schedule=True)
    assert world.train(config, "--resume", "latest", "--accept_data_changes") == 0
    schedule = lines(newest_run(world.logdir(config)) / "schedule.jsonl")
    assert [set(line["epochs"]) for line in schedule] == [{0}, {0}, {1}, {1}, {2}, {2}]


def test_finished_already_does_nothing(world: World, straight: Path) -> None:
    config = world.folder / "straight.json"
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    assert world.train(config, "--resume", "latest") == 0
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*")}


def test_nothing_there_starts_anew(world: World) -> None:
    config = world.settings("anew", max_steps=1)
    assert world.train(config, "--resume", "latest") == 0
    assert steps(newest_run(world.logdir(config))) == [1]


def test_none_valid_is_exit_4_and_touches_nothing(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    config = world.settings("none-valid", max_steps=2)
    assert world.train(config) == 0
    run = newest_run(world.logdir(config))
    (run / "checkpoints" / "step-0000000002" / "state.json").write_bytes(b"")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}
    assert world.train(config, "--resume", "latest") == 4
    assert "state.json: 0 bytes" in capfd.readouterr().err
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file()}


def test_a_damaged_latest_is_said_and_trained_again(world: World, straight: Path, injected: Inject) -> None:
    config = world.settings("damaged")
    assert world.train(config, at={5: stop()}) == 143
    run = newest_run(world.logdir(config))
    with open(run / "checkpoints" / "step-0000000005" / "optimizer.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert world.train(config, "--resume", "latest") == 0
    assert_same_run(straight, run)
    assert any("step-0000000005 cannot be used: optimizer.safetensors" in e["message"] for e in events(run, "resume"))
    assert (run / "checkpoints" / "superseded-step-0000000005").is_dir()
    injected("latest checkpoint damaged before a resume", 1)


def test_an_earlier_checkpoint_by_name_sets_the_later_ones_aside(world: World, straight: Path) -> None:
    config = world.settings("earlier")
    shutil.copytree(straight, world.logdir(config) / straight.name)
    run = newest_run(world.logdir(config))
    assert world.train(config, "--resume", str(run / "checkpoints" / "step-0000000002")) == 0
    assert_same_run(straight, run)
    aside = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith("superseded-")]
    assert sorted(aside) == ["superseded-step-0000000004", "superseded-step-0000000006"]
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_another_seed_is_refused_unless_asked_for(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    config = world.settings("reseeded", max_steps=4, save_every_n_steps=2)
    assert world.train(config, at={2: stop()}) == 143
    assert world.train(config, "--resume", "latest", "--seed", "6") == 2
    assert "seed" in capfd.readouterr().err
    assert world.train(config, "--resume", "latest", "--seed", "6", "--resume_changed") == 0
    assert steps(newest_run(world.logdir(config))) == [2, 4]


@pytest.mark.parametrize(
    "changed", [{"grad_accum": 2}, {"batch_size": 1}, {"seed": 77}], ids=lambda one: next(iter(one))
)
def test_batches_cut_otherwise_begin_with_the_next_epoch(world: World, changed: dict[str, int]) -> None:
    """No picture is passed over, trained twice in an epoch, or left out because steps are counted otherwise."""
    name = f"recut-{next(iter(changed))}"
    config = world.settings(name, max_steps=None, max_epochs=6, save_every_n_steps=None, write_schedule=True)
    assert world.train(config, at={4: stop()}) == 143
    words = [word for key, value in changed.items() for word in (f"--{key}", str(value))]
    assert world.train(config, "--resume", "latest", "--resume_changed", *words) == 0
    run = newest_run(world.logdir(config))
    every = lines(run / "schedule.jsonl")
    drawn = {at: [pair for line in every if (line["step"] > 4) == at
                  for pair in zip(line["samples"], line["epochs"], strict=True)] for at in (False, True)}  # fmt: skip
    assert len(set(drawn[True])) == len(drawn[True]) and not set(drawn[True]) & set(drawn[False])
    first = 1 + max(epoch for _, epoch in drawn[False])
    assert {epoch for _, epoch in drawn[True]} == set(range(first, 6))
    counts = [sum(one == epoch for _, one in drawn[True]) for epoch in range(first, 6)]
    assert sum(counts) >= 7 * len(counts) - 2 * 2, "but for what fills no last batch of each size"
    assert any("begin anew with epoch" in event["message"] for event in events(run, "note"))


def test_a_longer_run_goes_on(world: World, straight: Path) -> None:
    config = world.settings("longer", max_steps=3)
    assert world.train(config) == 0
    assert world.train(config, "--resume", "latest", "--max_steps", "6") == 0
    assert tensors_of(newest_run(world.logdir(config)), 6) == tensors_of(straight, 6)


def test_changed_pictures_are_refused_or_accepted_from_the_next_epoch(
    world: World, capfd: pytest.CaptureFixture[str], injected: Inject
) -> None:
    pictures = world.folder / "changing"
    make_pictures(pictures, 6, captions="a star")
    config = world.settings("changed", data_root="changing", max_steps=8, write_schedule=True)
    assert world.train(config, at={4: stop()}) == 143  # step 4 of 3 an epoch: in the middle of the second
    (pictures / "picture_000.txt").write_text("a red bar")
    (pictures / "picture_001.png").unlink()
    make_pictures(world.folder / "more", 1, captions="a bar", seed=9)
    shutil.copy(world.folder / "more" / "picture_000.png", pictures / "new.png")
    assert world.train(config, "--resume", "latest") == 2
    said = capfd.readouterr().err
    assert all(name in said for name in ("picture_000", "picture_001", "new.png", "--accept_data_changes"))
    assert world.train(config, "--resume", "latest", "--accept_data_changes") == 0
    schedule = lines(newest_run(world.logdir(config)) / "schedule.jsonl")
    after = [line for line in schedule if line["step"] > 4]
    assert all(epoch >= 2 for line in after for epoch in line["epochs"])
    assert any("new.png" in name for line in after for name in line["samples"])
    injected("pictures or captions changed before a resume", 3)


def test_subject_and_class_pictures_change_each_by_themselves(
    world: World, capfd: pytest.CaptureFixture[str], injected: Inject
) -> None:
    """New pictures of one begin with that one's next epoch; the other's stream is what it would have been."""
    subject, others = (Path(shutil.copytree(world.folder / name, world.folder / f"own {name}"))
                       for name in ("pictures", "class"))  # fmt: skip
    config = world.settings("both", data_root=str(subject), class_data_root=str(others), class_prompt="a star",
                            max_steps=12, write_schedule=True)  # fmt: skip

    def drawn(kind: str) -> list[dict[str, Any]]:
        every = lines(newest_run(world.logdir(config)) / "schedule.jsonl")
        return [line for line in every if line.get("class", False) == (kind == "class")]

    assert world.train(config) == 0
    straight = {kind: drawn(kind) for kind in ("subject", "class")}
    config = world.settings("both again", data_root=str(subject), class_data_root=str(others), class_prompt="a star",
                            max_steps=12, write_schedule=True)  # fmt: skip
    assert world.train(config, at={4: stop()}) == 143
    (subject / "picture_000.txt").write_text("a red bar")
    assert world.train(config, "--resume", "latest", "--accept_data_changes", at={8: stop()}) == 143
    assert drawn("class") == straight["class"][:8], "class pictures go on as they would have"
    assert drawn("subject")[4:] != straight["subject"][4:8]
    seen = max(max(line["epochs"]) for line in drawn("class"))
    (others / "picture_000.png").unlink()
    capfd.readouterr()
    assert world.train(config, "--resume", "latest") == 2
    said = capfd.readouterr().err
    assert "class/picture_000.png" in said and "--accept_data_changes" in said and "subject" not in said
    assert world.train(config, "--resume", "latest", "--accept_data_changes") == 0
    after = [line for line in drawn("class") if line["step"] > 8]
    assert min(min(line["epochs"]) for line in after) > seen, "no draw comes twice"
    assert all("picture_000" not in name for line in after for name in line["samples"])
    since = [pair for line in drawn("subject")[4:] for pair in zip(line["samples"], line["epochs"], strict=True)]
    assert len(since) == len(set(since)), "nor does one of the subject"
    injected("pictures or captions changed before a resume", 2)


def test_a_second_run_in_the_folder_is_refused(
    world: World, capfd: pytest.CaptureFixture[str], injected: Inject
) -> None:
    config = world.settings("locked", max_steps=2)
    assert world.train(config, at={1: stop()}) == 143
    [run] = runs(world.logdir(config))
    with run.lock:
        assert world.train(config, "--resume", "latest") == 2
    assert "is in use by" in capfd.readouterr().err
    assert world.train(config, "--resume", "latest") == 0
    injected("second run in the same folder", 1)


# Numbers that are not finite


def poisoned(monkeypatch: pytest.MonkeyPatch, where: str, at: set[int]) -> None:
    """NaN in the loss, or in the gradients, of the updates that end at these steps."""
    begin, loss, current = Update.begin, Update.loss, [0]

    def remember(self: Update, step: int, *arguments: Any) -> None:
        current[0] = step + 1
        begin(self, step, *arguments)

    def spoil(self: Update, batch: Any) -> torch.Tensor:
        if current[0] not in at:
            return loss(self, batch)
        if where == "loss":
            batch.weights_B[0] = float("nan")
            return loss(self, batch)
        value = loss(self, batch)
        value.register_hook(lambda gradient: gradient * float("nan"))
        return value

    monkeypatch.setattr(Update, "begin", remember)
    monkeypatch.setattr(Update, "loss", spoil)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_is_not_finite_leaves_the_weights_and_names_the_pictures(
    world: World, monkeypatch: pytest.MonkeyPatch, where: str, fused: bool, injected: Inject
) -> None:
    poisoned(monkeypatch, where, {3})
    config = world.settings(f"nan-{where}-{fused}", save_every_n_steps=1, fused_backward=fused, max_steps=4)
    assert world.train(config) == 0
    run = newest_run(world.logdir(config))
    assert tensors_of(run, 2) == tensors_of(run, 3)
    assert tensors_of(run, 3) != tensors_of(run, 4)
    state = json.loads((run / "checkpoints" / "step-0000000004" / "state.json").read_bytes())
    assert state["skipped_steps"] == [3]
    [skipped] = events(run, "skipped")
    assert skipped["samples"] and all(name.startswith("subject/") for name in skipped["samples"])
    assert len(skipped["samples"]) == (1 if where == "loss" else 2)
    injected("NaN in a loss or in gradients", 1)


def test_three_in_a_row_go_back_to_the_last_checkpoint_and_past_the_pictures(
    world: World, monkeypatch: pytest.MonkeyPatch, injected: Inject
) -> None:
    poisoned(monkeypatch, "loss", {3, 4, 5})
    config = world.settings("rolled-back", max_steps=8, save_every_n_steps=2)
    assert world.train(config) == 0
    run = newest_run(world.logdir(config))
    [back] = events(run, "rolled_back")
    assert back["to"] == 2  # step 4 was saved while no update was made: it would lead here again
    state = json.loads((run / "checkpoints" / "step-0000000008" / "state.json").read_bytes())
    assert state["skipped_steps"] == [3, 4, 5] and state["rollbacks"] == [[5, 2]]
    assert steps(run) == [2, 4, 6, 8]
    left_out = [line["step"] for line in lines(run / "metrics.jsonl") if line["loss"] is None]
    assert left_out == [3, 4, 5]
    injected("NaN in a loss or in gradients", 3)


def test_a_roll_back_finds_a_checkpoint_however_few_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, "loss", {3, 4, 5})
    config = world.settings("few-kept", max_steps=7, save_every_n_steps=1, keep_last=1)
    assert world.train(config) == 0
    run = newest_run(world.logdir(config))
    [back] = events(run, "rolled_back")
    assert back["to"] == 4  # its weights are those of step 2: the updates since were left out
    null = [line for line in lines(run / "metrics.jsonl") if line["step"] in (3, 4)]
    assert [line["loss"] for line in null] == [None, None]


@pytest.mark.parametrize("new", ["adamw", "lion"])
def test_a_roll_back_past_changed_settings_keeps_the_new_ones(
    world: World, monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    config = world.settings(f"changed-{new}", max_steps=7, save_every_n_steps=2, ema_decay_rate=0.9)
    assert world.train(config, at={2: stop()}) == 143
    changed = {"optimizer": new, "lr": 1e-3, "weight_decay": 0.5}
    (world.folder / f"changed-{new}.optimizer.json").write_text(json.dumps(changed))
    poisoned(monkeypatch, "loss", {3, 4, 5})
    assert world.train(config, "--resume", "latest", "--resume_changed") == 0
    run = newest_run(world.logdir(config))
    assert events(run, "rolled_back")[0]["to"] == 2
    told = [event["message"] for event in events(run, "roll_back")]
    assert [("starts afresh" in line) for line in told] == ([True] * 2 if new == "lion" else [])
    state = json.loads((run / "checkpoints" / "step-0000000007" / "state.json").read_bytes())
    for part in state["optimizers"].values():
        [leaf] = part["leaves"]
        assert new in leaf["class"].lower() and leaf["groups"][0]["values"]["weight_decay"] == 0.5


def test_without_a_checkpoint_to_go_back_to_it_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, "loss", {1, 2, 3})
    config = world.settings("no-way-back", save_every_n_steps=None)
    assert world.train(config) == 3
    assert "no checkpoint to go back to" in events(newest_run(world.logdir(config)), "end")[0]["reason"]


@pytest.mark.parametrize("elsewhere", [None, 1])
def test_processes_that_see_unlike_checkpoints_do_not_go_back(
    world: World, monkeypatch: pytest.MonkeyPatch, elsewhere: int | None
) -> None:
    """As on two machines whose logdir is not one folder: `elsewhere` is what the other one found."""
    poisoned(monkeypatch, "loss", {3, 4, 5})
    found: list[int | None] = []
    reload_latest, gather = Bag.reload_latest, Ranks.gather

    def reloaded(bag: Bag, before: int) -> tuple[int | None, list[str]]:
        step, told = reload_latest(bag, before)
        found.append(step)
        return step, told

    def gathered(ranks: Ranks, value: Any) -> list[Any]:
        values: list[Any] = gather(ranks, value)
        return [*values, elsewhere] if found and value == found.pop() else values

    monkeypatch.setattr(Bag, "reload_latest", reloaded)
    monkeypatch.setattr(Ranks, "gather", gathered)
    config = world.settings(f"unlike-{elsewhere}", max_steps=8, save_every_n_steps=2)
    assert world.train(config) == 3
    run = newest_run(world.logdir(config))
    assert "logdir is not one folder for all machines" in events(run, "end")[0]["reason"]
    assert not events(run, "rolled_back") and steps(run) == [2, 4]


def test_two_roll_backs_end_the_run(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, "gradient", set(range(3, 100)))
    config = world.settings("diverged", max_steps=20, save_every_n_steps=2)
    assert world.train(config) == 3
    run = newest_run(world.logdir(config))
    assert len(events(run, "rolled_back")) == 1
    assert events(run, "end")[0]["code"] == 3


# The disk


class Full(Files):
    """`fails`: which saves, counted from 1, find the disk full."""

    def __init__(self, fails: set[int]) -> None:
        self.fails, self.saves = fails, 0

    def make_folder(self, path: Path) -> None:
        self.saves += path.name.startswith(checkpoint.SAVING)
        super().make_folder(path)

    def write(self, handle: int, data: memoryview) -> None:
        if self.saves in self.fails:
            raise OSError(28, os.strerror(28))
        super().write(handle, data)


def full(monkeypatch: pytest.MonkeyPatch, fails: set[int]) -> None:
    disk = Full(fails)
    for name in ("make_folder", "write"):
        monkeypatch.setattr(DISK, name, getattr(disk, name), raising=True)


def test_one_failed_save_is_said_and_the_run_goes_on(
    world: World, straight: Path, monkeypatch: pytest.MonkeyPatch, injected: Inject
) -> None:
    full(monkeypatch, {2})
    config = world.settings("once-full")
    assert world.train(config) == 0
    run = newest_run(world.logdir(config))
    assert steps(run) == [2, 6]
    [failed] = events(run, "save_failed")
    assert "No space left on device" in failed["message"] and failed["level"] == "warning"
    assert_same_run(straight, run)
    injected("disk full in a run's save", 1)


def test_three_failed_saves_in_a_row_are_exit_5(
    world: World, monkeypatch: pytest.MonkeyPatch, injected: Inject
) -> None:
    full(monkeypatch, set(range(2, 100)))
    config = world.settings("full", max_steps=50, save_every_n_steps=2)
    assert world.train(config) == 5
    run = newest_run(world.logdir(config))
    assert steps(run) == [2] and "3 saves in a row failed" in events(run, "end")[0]["reason"]
    assert os.listdir(run / "checkpoints") == ["step-0000000002"]
    injected("disk full in a run's save", 3)


@pytest.mark.parametrize("at", [{}, {3: stop()}], ids=["the last", "on a signal"])
def test_a_failed_last_save_is_exit_5(
    world: World, monkeypatch: pytest.MonkeyPatch, at: dict[int, Callable[[], object]], injected: Inject
) -> None:
    full(monkeypatch, {1})
    config = world.settings(f"full-last-{len(at)}", save_every_n_steps=None)
    assert world.train(config, at=at) == 5
    assert steps(newest_run(world.logdir(config))) == []
    injected("disk full in a run's save", 1)


def test_the_checkpoints_removed_under_way_come_again(world: World, straight: Path, injected: Inject) -> None:
    config = world.settings("removed")

    def remove() -> None:
        os.rename(after_the_save(newest_run(world.logdir(config))) / "checkpoints", world.folder / "taken away")

    assert world.train(config, at={3: remove}) == 0
    run = newest_run(world.logdir(config))
    assert steps(run) == [4, 6]
    assert tensors_of(run, 6) == tensors_of(straight, 6)
    injected("checkpoint folder removed under way", 1)


def test_a_run_whose_folder_was_moved_away_under_way_can_be_resumed(world: World, straight: Path) -> None:
    config = world.settings("moved")

    def move() -> None:
        os.rename(after_the_save(newest_run(world.logdir(config))), world.folder / "moved away")

    assert world.train(config, at={3: move, 5: stop()}) == 143
    assert steps(world.folder / "moved away") == [2]
    run = newest_run(world.logdir(config))
    assert steps(run) == [4, 5] and any("was gone" in event["message"] for event in events(run, "save"))
    assert world.train(config, "--resume", "latest") == 0
    assert tensors_of(run, 6) == tensors_of(straight, 6)


def test_blocking_and_background_saves_write_the_same(world: World, straight: Path) -> None:
    config = world.settings("blocking", background_save=False)
    assert world.train(config) == 0
    run = newest_run(world.logdir(config))
    assert_same_run(straight, run)
    assert [event["held_s"] == event["seconds"] for event in events(run, "saved")] == [True] * 3


def test_the_base_model_may_vanish_after_the_start(world: World, straight: Path, injected: Inject) -> None:
    shutil.copytree(world.folder / "model", world.folder / "vanishing")
    config = world.settings("vanished", base_model="vanishing")
    assert world.train(config, at={3: lambda: shutil.rmtree(world.folder / "vanishing")}) == 0
    assert tensors_of(newest_run(world.logdir(config)), 6) == tensors_of(straight, 6)
    injected("base model removed under way", 1)


@pytest.mark.parametrize("name", ["gone", "models/gone"])
def test_a_resume_does_not_need_the_base_model(world: World, straight: Path, name: str) -> None:
    shutil.copytree(world.folder / "model", world.folder / name)
    config = world.settings(name.replace("/", "-"), base_model=name)
    assert world.train(config, at={3: stop()}) == 143
    shutil.rmtree(world.folder / name)
    assert world.train(config, "--resume", "latest") == 0
    assert tensors_of(newest_run(world.logdir(config)), 6) == tensors_of(straight, 6)
    shutil.rmtree(world.logdir(config))
    assert world.train(config, "--resume", "latest") == 2, "a new run needs it"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_base_model_is_a_clean_error(
    world: World, part: str, keep: int, capfd: pytest.CaptureFixture[str], injected: Inject
) -> None:
    name = f"truncated-{part}-{keep}"
    shutil.copytree(world.folder / "model", world.folder / name)
    [weights] = (world.folder / name / part).glob("*.safetensors")
    os.truncate(weights, keep if keep >= 0 else weights.stat().st_size - 1)
    assert world.train(world.settings(name, base_model=name)) == 2
    said = capfd.readouterr().err
    assert weights.name in said and "Traceback" not in said
    assert not world.logdir(world.folder / f"{name}.json").exists()
    injected("base model truncated", 1)


def test_a_single_file_that_a_kill_left_half_written_is_removed(world: World) -> None:
    config = world.settings("half-exported", save_single_file=True, save_ckpt_dir="half", max_steps=3)
    assert world.train(config, at={2: stop()}) == 143
    mine, other = (world.folder / "half" / f".saving-{p}-step-0000000002.safetensors" for p in ("faults", "other"))
    for path in (mine, other):
        path.write_bytes(b"half")
    assert world.train(config, "--resume", "latest") == 0
    assert not mine.exists() and other.exists()


# Formats


def test_nothing_is_ever_unpickled(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint may come from anywhere; only safetensors and JSON are read."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    config = world.settings("no-pickle", ema_decay_rate=0.9)
    assert world.train(config, at={3: stop()}) == 143
    assert world.train(config, "--resume", "latest") == 0


def test_a_failure_between_updates_leaves_the_lock_free(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = world.settings("crashed", max_steps=4)

    def crash(self: Trainer) -> None:
        raise AssertionError("a bug of ours")

    with monkeypatch.context() as patched, pytest.raises(AssertionError, match="a bug of ours"):
        patched.setattr(Trainer, "report", crash)
        world.train(config)
    assert world.train(config, "--resume", "latest") == 0
