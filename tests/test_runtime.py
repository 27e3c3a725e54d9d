"""What the processes of a run say to each other, and what is said when one of them no longer answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed

from everydream.errors import ConfigError
from everydream.runtime import Ranks, is_lost_process, set_determinism, settled_objects
from tests.training.processes import on_processes


def test_different_files_are_refused_on_every_process_and_named() -> None:
    def work(ranks: Any) -> None:
        files = {f"{i}.png": "same" for i in range(9)}
        if ranks.rank == 1:
            files |= {"3.png": "other"}
        if ranks.rank == 2:
            files = dict(list(files.items())[7:]) | {"more.png": "same"}
        ranks.refuse_difference(files, "pictures")

    for error in on_processes(3, work):
        assert isinstance(error, ConfigError)
        assert error.problems == (
            "pictures are not the same for all processes:",
            "  process 1 differs from process 0 in 1: 3.png",
            "  process 2 differs from process 0 in 8: 0.png, 1.png, 2.png, 3.png, 4.png …",
            "Give all machines the same files.",
        )


def test_the_same_files_are_not_refused() -> None:
    assert on_processes(3, lambda ranks: ranks.refuse_difference({"a": 1, "b": [2]}, "settings")) == [None] * 3


def test_a_process_leaves_the_group_it_is_in(tmp_path: Path) -> None:
    """Left to the end of the process, gloo's threads abort it now and then: "terminate called"."""
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, device="cpu", is_main_process=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    Ranks(accelerator).leave()
    assert not torch.distributed.is_initialized()
    Ranks(accelerator).leave()  # a run of one process is in none


def two_of_gloo() -> list[Any]:
    """Two processes played by threads, which wait a second for each other."""
    store, groups = torch.distributed.HashStore(), [None, None]

    def join(rank: int) -> None:
        groups[rank] = torch.distributed.ProcessGroupGloo(store, rank, 2, timedelta(seconds=1))  # type: ignore[attr-defined]

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return groups


def hangs(groups: list[Any]) -> None:
    """It is there, and says nothing."""


def dies(groups: list[Any]) -> None:
    groups[1] = None


@pytest.mark.parametrize("fault", [hangs, dies])
def test_a_process_that_is_lost_is_known_by_torchs_error(fault: Callable[[list[Any]], None]) -> None:
    groups = two_of_gloo()
    fault(groups)
    for _ in range(2):  # what is tried next fails in other words
        with pytest.raises(RuntimeError) as error:
            groups[0].allreduce([torch.ones(2)]).wait()
        assert is_lost_process(error.value)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("/gloo/"), AssertionError("1 != 2")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_lost_process(error)


TWICE = """
import os, signal, sys
from pathlib import Path
from everydream.runtime import StopRequest
from everydream.training.console import Console
from everydream.training.log import RunLog
StopRequest().install()
if len(sys.argv) > 1:
    log = RunLog(Path(sys.argv[1]), Console("quiet"))
    log.progress(317)
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("checkpoints", "words"),
    [
        (None, "stopped at once: nothing was saved"),
        ([], "stopped without saving; there is no checkpoint yet"),
        ([200, 300], "stopped without saving; the last checkpoint is step 300"),
    ],
)
def test_a_second_interrupt_says_what_is_lost(tmp_path: Path, checkpoints: list[int] | None, words: str) -> None:
    for step in checkpoints or []:
        (tmp_path / "checkpoints" / f"step-{step:010d}").mkdir(parents=True)
    arguments = [] if checkpoints is None else [str(tmp_path)]
    ended = subprocess.run([sys.executable, "-c", TWICE, *arguments], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr == words + "\n"
    if checkpoints is not None:
        end = json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])
        assert (end["step"], end["kind"], end["code"], end["reason"]) == (317, "end", 130, words)


def test_determinism_is_torchs_switch_without_its_filling_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    set_determinism(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        set_determinism(True)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled(), "the next run in this process is its own"


def test_objects_are_settled_while_training_and_no_longer() -> None:
    import gc

    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyboardInterrupt), settled_objects():
        assert gc.get_freeze_count() > 1000
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0
