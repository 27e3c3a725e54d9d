"""The table of phases adds up, the trace is written, and nothing of it costs anything when it is off."""

from __future__ import annotations

import gzip
import io
import json
import time
from pathlib import Path

import pytest
import torch

from everydream.training.console import Console
from everydream.training.log import NullLog, RunLog
from everydream.training.profile import TRACED, WARM_UP, NoProfile, Profile, make_profile, phase_rows


def test_off_is_a_null_object(tmp_path: Path) -> None:
    for steps in (None, 0):
        profile = make_profile(steps, tmp_path, NullLog(), "cpu")
        assert type(profile) is NoProfile
        assert profile("forward") is profile("backward"), "one shared context, nothing made"
        with profile("forward"), profile("backward"):
            profile.step()
        profile.close()
    assert not list(tmp_path.iterdir())


def train(profile: NoProfile, updates: int) -> None:
    weight = torch.ones(8, 8, requires_grad=True)
    for _ in range(updates):
        with profile("forward"):
            loss = (weight @ weight).sum()
            time.sleep(0.002)
        with profile("backward"):
            loss.backward()
        with profile("save"), profile("preview"):
            time.sleep(0.001)
        profile.step()
    profile.close()


def test_phases_of_n_updates_and_a_trace(tmp_path: Path) -> None:
    stream = io.StringIO()
    profile = make_profile(4, tmp_path, RunLog(tmp_path, Console("normal", stream)), "cpu")
    train(profile, WARM_UP + 4 + TRACED + 3)
    told = json.loads((tmp_path / "profile" / "phases.json").read_text())
    seconds = {row["phase"]: row["seconds"] for row in told["phases"]}
    assert told["updates"] == 4
    assert seconds["forward"] >= 0.002
    assert seconds["preview"] >= 0.001
    assert seconds["save"] < seconds["preview"], "a phase inside another is not counted twice"
    assert sum(row["share"] for row in told["phases"]) == pytest.approx(1.0)
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("phase: forward") == TRACED
    assert "aten::mm" in names
    assert "aten::mm" in (tmp_path / "profile" / "operators.txt").read_text()
    assert not (tmp_path / "profile" / "trace.json").exists()
    assert "An update, mean of 4:" in stream.getvalue()


def test_a_run_that_ends_early_tells_what_it_has(tmp_path: Path) -> None:
    train(make_profile(100, tmp_path, NullLog(), "cpu"), WARM_UP + 2)
    assert json.loads((tmp_path / "profile" / "phases.json").read_text())["updates"] == 2
    train(make_profile(100, tmp_path / "none", NullLog(), "cpu"), WARM_UP)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    (tmp_path / "profile").write_text("in the way")
    profile = make_profile(1, tmp_path, RunLog(tmp_path, Console("normal", stream)), "cpu")
    train(profile, WARM_UP + 1 + TRACED)
    assert "no profile" in stream.getvalue()


def test_an_exception_leaves_a_phase_in_order(tmp_path: Path) -> None:
    profile = Profile(5, tmp_path, NullLog(), "cpu")
    for _ in range(WARM_UP):
        profile.step()
    with pytest.raises(ZeroDivisionError), profile("forward"):
        raise ZeroDivisionError
    with profile("forward"):
        pass
    assert profile.seconds["forward"] > 0


def test_what_no_phase_covers_is_other() -> None:
    assert phase_rows({"forward": 3.0, "save": 0.0}, 4.0, 2) == [
        {"phase": "forward", "seconds": 1.5, "share": 0.75},
        {"phase": "other", "seconds": 0.5, "share": 0.25},
    ]
