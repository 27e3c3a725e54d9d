"""Stopped from outside, as a person or a scheduler does it: saved at the boundary of an update, with the right code.

SIGTERM and SIGINT to the script, to the launcher, to all at once (Ctrl-C), and to one of two processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from tests.end_to_end import launching
from tests.faults.conftest import Inject
from tests.faults.running import World, lines, newest_checkpoint, newest_run

pytestmark = pytest.mark.launch

Started = subprocess.Popen[str]


@dataclass(frozen=True)
class Case:
    command: Callable[..., list[str]]
    to: str  # "launcher" (the process that was started), "group" (Ctrl-C in a terminal), or a process's RANK
    signum: int
    status: int | None  # what the started process ends with; accelerate's launcher answers 1 for any failure


def one(*words: object) -> list[str]:
    return launching.accelerate(["--num_processes", 1], *words)


TERM, INT = signal.SIGTERM, signal.SIGINT
SHORT = {
    "SIGTERM to the launcher": Case(one, "launcher", TERM, -TERM),
    "SIGINT to the second of two": Case(launching.two_processes, "1", INT, 1),
}
LONG = {
    "SIGTERM to the script": Case(launching.python, "launcher", TERM, 128 + TERM),
    "SIGINT to the script": Case(launching.python, "launcher", INT, 128 + INT),
    "Ctrl-C, script": Case(launching.python, "group", INT, 128 + INT),
    "Ctrl-C, launcher": Case(one, "group", INT, None),
    "Ctrl-C, two processes": Case(launching.two_processes, "group", INT, None),
    "SIGTERM to the launcher of two": Case(launching.two_processes, "launcher", TERM, None),
    "SIGTERM to the first of two": Case(launching.two_processes, "0", TERM, 1),
    "SIGTERM to the second of two": Case(launching.two_processes, "1", TERM, 1),
}


SETTINGS: dict[str, Any] = {
    "max_steps": 100_000, "save_every_n_steps": None, "save_single_file": True,
    "global_batch_size": 4,  # what two processes began one may go on with
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def start(world: World, name: str, case: Case) -> Started:
    """Returns once some updates are done."""
    config = world.settings(name, **SETTINGS)
    command = case.command("--config", config)
    started = subprocess.Popen(
        command,
        cwd=world.folder,
        env=launching.environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    began = time.monotonic()
    while not any(len(lines(path)) >= 3 for path in world.logdir(config).glob("*/metrics.jsonl")):
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() - began < launching.LIMIT_S
        time.sleep(0.1)
    return started


def send(started: Started, to: str, signum: int) -> None:
    if to == "launcher":
        started.send_signal(signum)
    elif to == "group":
        os.killpg(started.pid, signum)
    else:
        children = psutil.Process(started.pid).children(recursive=True)
        [pid] = [child.pid for child in children if child.environ().get("RANK") == to and child.ppid() == started.pid]
        os.kill(pid, signum)


def assert_stopped_and_saved(world: World, name: str, case: Case) -> None:
    started = start(world, name, case)
    family = psutil.Process(started.pid).children(recursive=True)
    send(started, case.to, case.signum)
    said = started.communicate(timeout=launching.LIMIT_S)[1]
    psutil.wait_procs(family, timeout=launching.LIMIT_S)  # the launcher may be gone before the script has saved
    assert not [child for child in family if child.is_running()]
    assert case.status is None or started.returncode == case.status, said
    run = newest_run(world.logdir(world.folder / f"{name}.json"))
    end = lines(run / "events.jsonl")[-1]
    assert (end["kind"], end["code"]) == ("end", 128 + case.signum), said
    last = lines(run / "metrics.jsonl")[-1]["step"]
    assert int(newest_checkpoint(run).name.removeprefix("step-")) == last
    assert [path.name for path in run.rglob(".*") if path.name != ".lock"] == []
    assert world.train(world.folder / f"{name}.json", "--resume", "latest", "--max_steps", str(last + 1)) == 0


@pytest.mark.parametrize("name", SHORT)
def test_stopped_means_saved(world: World, name: str, injected: Inject) -> None:
    assert_stopped_and_saved(world, name, SHORT[name])
    injected("SIGTERM or SIGINT to script, launcher or process", 1)


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_stopped_means_saved_in_every_other_way(world: World, name: str, injected: Inject) -> None:
    assert_stopped_and_saved(world, name, LONG[name])
    injected("SIGTERM or SIGINT to script, launcher or process", 1)


@pytest.mark.long
@pytest.mark.parametrize("delay_s", [0.1, 0.5, 1.5])
def test_a_launcher_stopped_in_the_scripts_first_seconds_takes_it_along(
    world: World, delay_s: float, injected: Inject
) -> None:
    config = world.settings(f"early-{delay_s}", **SETTINGS)
    started = subprocess.Popen(one("--config", config), cwd=world.folder, env=launching.environment(),
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    launcher = psutil.Process(started.pid)
    script: list[psutil.Process] = []
    while not script:
        script = [child for child in launcher.children() if any("train.py" in word for word in child.cmdline())]
        time.sleep(0.01)
    time.sleep(delay_s)
    started.terminate()
    started.wait()
    _, alive = psutil.wait_procs(script, timeout=20)
    for process in alive:
        process.kill()
    assert not alive, "the script goes on, and nobody is there to stop it"
    injected("SIGTERM or SIGINT to script, launcher or process", 1)
