"""Plugins: named moments, checked before anything is loaded, named where they fail; early stop as the example."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from everydream.errors import ConfigError, DivergedError
from everydream.training import jsonl
from everydream.training.early_stop import EarlyStop, validations_since_best
from everydream.training.log import NullLog
from everydream.training.plugins import MOMENTS, PluginError, Plugins
from tests.tiny import make_pictures
from tests.training import runs

SOURCE = """
calls = []

class Recorder:
    def after_build(self, trainer): calls.append(("after_build", trainer))
    def after_step(self, trainer): calls.append(("after_step", trainer))
    def after_save(self, trainer): calls.append(("after_save", trainer))
    def before_exit(self, trainer): calls.append(("before_exit", trainer))

class Second:
    def after_step(self, trainer): calls.append(("second", trainer))

class Broken:
    def after_step(self, trainer): raise ValueError("my bug")

class Diverged:
    def after_step(self, trainer):
        from everydream.errors import DivergedError
        raise DivergedError("enough")

class Misspelt:
    def after_steps(self, trainer): pass

class Nothing:
    pass

class WithArguments:
    def __init__(self, patience): pass
    def after_step(self, trainer): pass

not_a_class = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """my_plugins.py in the working directory, and the path and the modules as they were afterwards."""
    (tmp_path / "my_plugins.py").write_text(SOURCE)
    (tmp_path / "half.py").write_text("import not_installed_anywhere\nclass A:\n    def after_step(self, t): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("my_plugins", "half", "stopper"):
        sys.modules.pop(name, None)


class FakeTrainer:
    def __init__(self, folder: Path | None = None, total: int = 100) -> None:
        self.state = SimpleNamespace(step=0)
        self.clock = SimpleNamespace(total_steps=total)
        self.ranks = SimpleNamespace(broadcast=lambda item: item)
        self.log = NullLog()
        self.log.folder = folder
        self.reason = ""

    def stop_after_this_step(self, reason: str) -> None:
        self.reason = reason


def test_each_moment_calls_each_plugin_in_order() -> None:
    plugins, trainer = Plugins(["my_plugins.Recorder", "my_plugins.Second"]), FakeTrainer()
    for moment in MOMENTS:
        getattr(plugins, moment)(trainer)
    calls = sys.modules["my_plugins"].calls
    assert [name for name, _ in calls] == ["after_build", "after_step", "second", "after_save", "before_exit"]
    assert all(given is trainer for _, given in calls)


def test_no_plugins_do_nothing() -> None:
    for moment in MOMENTS:
        getattr(Plugins(), moment)(FakeTrainer())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("my_plugins.Recordr", "no class Recordr. Did you mean 'Recorder'?"),
        ("my_plugins.not_a_class", "no class not_a_class"),
        ("nowhere.Plugin", "nowhere cannot be imported"),
        ("half.A", "No module named 'not_installed_anywhere'"),
        ("my_plugins.Misspelt", "after_steps is no moment of a run. Moments: after_build, "),
        ("my_plugins.Nothing", "has none of the methods"),
        ("my_plugins.WithArguments", "is made without arguments"),
    ],
)
def test_a_plugin_that_cannot_work_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Plugins([name])
    assert f"plugins: {name}" in str(caught.value)
    assert told in str(caught.value)


def test_all_refusals_come_together() -> None:
    with pytest.raises(ConfigError) as caught:
        Plugins(["nowhere.Plugin", "my_plugins.Recorder", "my_plugins.Nothing"])
    assert len(caught.value.problems) == 2


def test_an_exception_names_the_plugin_the_moment_and_the_line() -> None:
    trainer = FakeTrainer()
    trainer.state.step = 12
    with pytest.raises(PluginError) as caught:
        Plugins(["my_plugins.Broken"]).after_step(trainer)  # type: ignore[arg-type]
    line = next(i for i, text in enumerate(SOURCE.splitlines(), 1) if "my bug" in text)
    told = str(caught.value)
    assert told.startswith("plugin my_plugins.Broken failed in after_step at step 12: ValueError: my bug")
    assert f"my_plugins.py, line {line}" in told
    assert "--resume latest" in told
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_plugin_may_end_the_run_with_an_error_of_ours() -> None:
    with pytest.raises(DivergedError, match="enough"):
        Plugins(["my_plugins.Diverged"]).after_step(FakeTrainer())  # type: ignore[arg-type]


RUN = """
class Stopper:
    def __init__(self): self.told = []
    def after_build(self, trainer): self.told.append(f"build {trainer.state.step}")
    def after_step(self, trainer):
        self.told.append(f"step {trainer.state.step}")
        if trainer.state.step == 3:
            trainer.stop_after_this_step("three are enough")
    def after_save(self, trainer): self.told.append(f"save {trainer.state.step}")
    def before_exit(self, trainer):
        with open("told.txt", "w") as file:
            file.write("; ".join(self.told))
"""


def test_a_run_calls_its_plugins_and_one_may_end_it(tiny_model: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 4, captions="red")
    (tmp_path / "stopper.py").write_text(RUN)
    assert runs.start(*runs.options(tiny_model, tmp_path / "pictures", tmp_path, plugins="stopper.Stopper")) == 0
    assert (tmp_path / "told.txt").read_text() == "build 0; step 1; step 2; step 3; save 3"
    run = runs.only_run(tmp_path)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000000003"]
    assert [line["message"] for line in runs.lines(run / "events.jsonl") if line["kind"] == "stopped_by_plugin"] == [
        "three are enough"
    ]


def test_a_run_refuses_a_plugin_before_it_writes_anything(tiny_model: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "pictures", 4, captions="red")
    assert runs.start(*runs.options(tiny_model, tmp_path / "pictures", tmp_path, plugins="stopper.Nothing")) == 2
    assert not (tmp_path / "logs").exists()


# --- early stop


def stops_at(values: list[float], plugin: EarlyStop, folder: Path | None = None, start: int = 0) -> int | None:
    """The step at which the plugin asks to stop: a validation every 10 steps, seen with the step after it."""
    trainer: Any = FakeTrainer(folder)
    plugin.after_build(trainer)
    for step in range(start + 1, 10 * len(values) + 1):
        if (step - 1) % 10 == 0:
            trainer.log.metrics(step - 1, {"loss_val": values[(step - 1) // 10]})
        trainer.state.step = step
        plugin.after_step(trainer)
        if trainer.reason:
            assert "loss_val has not become lower than" in trainer.reason
            return step
    return None


class Soon(EarlyStop):
    patience = 2


def test_early_stop_waits_for_its_patience() -> None:
    assert stops_at([3, 2, 1, 1.5, 1.5, 0.5], Soon()) == 41
    assert stops_at([3, 2, 1, 1.5, 0.9, 1.5, 0.8], Soon()) is None


def test_early_stop_counts_validations_not_steps() -> None:
    assert stops_at([1.0, 1.0], Soon()) is None


def test_early_stop_decides_the_same_after_a_resume(tmp_path: Path) -> None:
    values = [3.0, 2.0, 1.0, 1.5, 1.5, 1.5]
    whole = stops_at(values, Soon())
    lines = [{"step": 10 * i, "loss_val": value} for i, value in enumerate(values[:4])]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{"step": 0, "loss": 0.1}, *lines])
    )
    assert stops_at(values, Soon(), tmp_path, start=30) == whole == 41


@pytest.mark.parametrize("last", [1.5, math.nan])
def test_early_stop_after_a_resume_looks_at_the_validation_of_the_checkpoints_own_step(
    tmp_path: Path, last: float
) -> None:
    values = [3.0, 2.0, 1.0, 1.5, last]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(jsonl.encode({"step": 10 * i, "loss_val": value}).decode() for i, value in enumerate(values))
    )
    trainer: Any = FakeTrainer(tmp_path)
    trainer.state.step = 40
    plugin = Soon()
    plugin.after_build(trainer)
    assert not trainer.reason
    trainer.state.step = 41  # nothing new was measured
    plugin.after_step(trainer)
    assert trainer.reason
    assert stops_at(values * 2, Soon()) == 41


def test_a_run_that_was_stopped_early_is_finished(tmp_path: Path) -> None:
    lines = [{"step": 10 * i, "loss_val": value} for i, value in enumerate([3.0, 2.0, 1.0, 1.5, 1.5])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step, stops in ((41, True), (40, False)):  # at 40 the last validation has only just been made
        trainer: Any = FakeTrainer(tmp_path)
        trainer.state.step = step
        Soon().after_build(trainer)
        assert bool(trainer.reason) is stops


def test_a_small_change_may_count_as_none() -> None:
    assert validations_since_best([3, 2, 1.99]) == 0
    assert validations_since_best([3, 2, 1.99], min_change=0.1) == 1
    assert validations_since_best([1.0]) == 0
    assert validations_since_best([math.nan, 2.0, math.nan]) == 1


def test_early_stop_without_validation_says_so() -> None:
    told: list[tuple[Any, ...]] = []
    trainer: Any = FakeTrainer()
    trainer.log.event = lambda *arguments, **fields: told.append((*arguments, fields))
    plugin = EarlyStop()
    plugin.after_build(trainer)
    plugin.after_step(trainer)
    plugin.before_exit(trainer)
    assert "never measured" in told[0][1]
    assert "validation_config" in told[0][-1]["todo"]
