"""How much memory this process may still take, in bytes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil

from everydream.process import give_back_freed_memory

CGROUP = Path("/sys/fs/cgroup")


def available(cgroup: Path = CGROUP) -> int:
    """The machine's free memory, or what a container's limit leaves of it: past that limit the process is killed.

    What this process holds without need is given back before.
    """
    give_back_freed_memory()
    return min(psutil.virtual_memory().available, *_left_in_container(cgroup))


def _left_in_container(cgroup: Path) -> list[int]:
    left = [1 << 62]
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with suppress(OSError, ValueError):  # no such control group, or the word "max"
            total = int((cgroup / limit).read_text())
            stat = dict(line.split() for line in (cgroup / limit).with_name("memory.stat").read_text().splitlines())
            left.append(total - int((cgroup / used).read_text()) + int(stat.get(cache, 0)))
    return left
