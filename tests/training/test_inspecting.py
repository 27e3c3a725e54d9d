"""What scripts/show.py prints is of one mould: times too."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

from everydream.training import checkpoint
from everydream.training.inspecting import check, show_run, show_runs
from everydream.training.runfolder import make_run
from everydream.training.storage import Bytes


def test_times_have_one_form(tmp_path: Path) -> None:
    noon = datetime(2026, 5, 1, 14, 0, 0, tzinfo=timezone(timedelta(hours=2)))
    run = make_run(tmp_path, "cat", "cat", {"settings": {}}, now=noon)
    run.lock.release()
    path = checkpoint.commit(run.checkpoints, 3, {"state.json": Bytes(b"{}")})
    told = "\n".join((*show_runs(tmp_path), *show_run(run, check([path], quick=True), quick=True)))
    assert told.count("2026-05-01 12:00:00") == 2
    assert len(re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", told)) == 3
    assert not re.search(r"\dT\d", told)
