"""kill -9 at any instant, during saves too: the latest checkpoint always loads, nothing older is lost, and the run that
was killed again and again ends as the one that was not, bit for bit.

Each kill is a process of its own, forked from one that has torch imported already: what the signal ends is the trainer,
what starts again is the trainer with --resume latest, as a requeued job does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from everydream.training import checkpoint
from everydream.training.runfolder import runs
from everydream.training.storage import Files
from tests.faults.conftest import Inject
from tests.faults.running import World, assert_same_run, newest_run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and SIGKILL")

SETTINGS: dict[str, Any] = {
    "grad_accum": 2, "flip_p": 0.5, "ema_decay_rate": 0.9, "save_every_n_steps": 2, "keep_last": 3,
    "save_single_file": True, "log_step": 1,
}  # fmt: skip
SAVE_OPERATIONS = 90  # a save's disk operations with its export and the deletion after it, about


def child(folder: Path, config: Path, dies_at: int | None) -> None:
    """One life of the run. `dies_at`: the number of the disk operation before which it kills itself."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    world = World.__new__(World)
    world.folder = folder
    if dies_at is not None:
        _die_at(dies_at)
    os._exit(world.train(config, "--resume", "latest"))


def _die_at(n: int) -> None:
    left = [n]

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def instead(self: Files, *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if method.__name__ == "write":
                    method(self, arguments[0], arguments[1][: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return method(self, *arguments)

        return instead

    for name in (
        "make_folder",
        "create",
        "write",
        "sync",
        "sync_folder",
        "rename",
        "replace",
        "unlink",
        "remove_folder",
    ):
        setattr(Files, name, dying(getattr(Files, name)))


class Lives:
    """The lives of one run, each checked when it has ended."""

    def __init__(self, world: World, config: Path) -> None:
        self.world, self.config = world, config
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["everydream.training.run", "tests.faults.running"])
        self.best = 0  # the highest step that was ever safe
        self.kills = 0

    def start(self, dies_at: int | None = None) -> BaseProcess:
        process = self.context.Process(target=child, args=(self.world.folder, self.config, dies_at))
        process.start()
        return process

    def killed_after(self, updates: int, seconds: float) -> None:
        """So many updates from where it begins, and a moment more; without updates, while it starts."""
        process = self.start()
        wanted = self._lines() + updates
        while process.is_alive() and updates and self._lines() < wanted:
            time.sleep(0.01)
        process.join(seconds)
        process.kill()
        self._check(process)

    def _lines(self) -> int:
        files = [run.folder / "metrics.jsonl" for run in runs(self.world.logdir(self.config))[:1]]
        return sum(path.read_bytes().count(b"\n") for path in files if path.exists())

    def killed_at_operation(self, n: int) -> None:
        process = self.start(n)
        process.join(120)
        self._check(process)

    def _check(self, process: BaseProcess) -> None:
        process.join(120)
        self.kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (-signal.SIGKILL, 0), f"exit code {process.exitcode}"
        for run in runs(self.world.logdir(self.config)):
            found = checkpoint.find_latest(run.checkpoints)
            assert found.skipped == (), f"half a checkpoint has a checkpoint's name: {found.skipped[0]}"
            step = checkpoint.step_of(found.path) if found.path else 0
            assert step is not None and step >= self.best, f"step {self.best} was safe, and now the latest is {step}"
            self.best = step
            for path in checkpoint.folders(run.checkpoints):
                assert checkpoint.verify(path) == []
            break  # runs that were killed before their first save are begun anew: the newest is the one

    def finish(self) -> Path:
        process = self.start()
        process.join(300)
        assert process.exitcode == 0
        return newest_run(self.world.logdir(self.config))


def survives(folder: Path, steps: int, kills: int, seed: int) -> int:
    """How many kills there were; a run of few steps may be done before the last of them."""
    world, rng = World(folder), random.Random(seed)
    straight = world.settings("straight", max_steps=steps, **SETTINGS)
    assert world.train(straight) == 0
    lives = Lives(world, world.settings("killed", max_steps=steps, **SETTINGS))
    while lives.kills < kills and lives.best < steps:
        if rng.random() < 0.5:
            lives.killed_at_operation(rng.randint(1, 2 * SAVE_OPERATIONS))
        else:
            updates = rng.randint(0, 4)
            lives.killed_after(updates, rng.uniform(0, 0.3 if updates else 3))
    run = lives.finish()
    assert lives.kills >= kills // 2, f"the run was done after {lives.kills} kills"
    assert_same_run(newest_run(world.logdir(straight)), run)
    left = [path.name for path in run.rglob(".*") if path.name != ".lock"]
    assert left == [], f"left behind: {left}"
    events = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[-1] == "end"
    return lives.kills


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path, injected: Inject) -> None:
    injected("kill -9", survives(tmp_path, steps=8, kills=4, seed=1))


@pytest.mark.long
def test_fifty_kills(tmp_path: Path, injected: Inject) -> None:
    injected("kill -9", survives(tmp_path, steps=200, kills=50, seed=2))
