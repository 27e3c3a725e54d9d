"""The real script in processes of its own, as users start it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "train.py"
LIMIT_S = 300


def environment(**more: str) -> dict[str, str]:
    """Of a clean shell: nothing of a launcher that the tests may run under."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_", "PYTEST_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        inherited.pop(name, None)
    return {**inherited, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", **more}


def python(*argv: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, argv)]


def accelerate(launcher: Sequence[object], *argv: object) -> list[str]:
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", *launcher, SCRIPT, *argv]
    return [str(word) for word in words]


def two_processes(*argv: object) -> list[str]:
    config = ROOT / "examples" / "accelerate" / "cpu_2_processes.yaml"
    return accelerate(["--config_file", config, "--main_process_port", free_port()], *argv)


def run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def start(command: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """For `outcomes`."""
    said = {"env": environment(PYTHONFAULTHANDLER="1"), "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, **said)  # type: ignore[call-overload]


def outcomes(started: Sequence[subprocess.Popen[str]], limit_s: float = LIMIT_S) -> list[tuple[int, str]]:
    """(exit code, stderr) of each. What has not ended by then says where it stands, and is killed."""
    with ThreadPoolExecutor(len(started)) as readers:
        said = [readers.submit(process.communicate) for process in started]
        late = wait(said, limit_s).not_done
        if late:
            family = [child for process in started for child in _family(process.pid)]
            for signum in (signal.SIGABRT, signal.SIGKILL):
                for process in family:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signum)
                time.sleep(3)
        told = [one.result()[1] for one in said]
    assert not late, "it never ended:\n" + "\n".join(told)
    return [(process.returncode, text) for process, text in zip(started, told, strict=True)]


def _family(pid: int) -> list[psutil.Process]:
    """The scripts, then their launcher."""
    try:
        launcher = psutil.Process(pid)
        return [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return []


def free_port() -> int:
    """Below the ports that the system gives to whoever asks for any: a launcher takes seconds until it listens."""
    ports = list(range(20_000, 32_000))
    for port in random.SystemRandom().sample(ports, len(ports)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
