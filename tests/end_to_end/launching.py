"""The real script in processes of its own, as users start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
