"""What a process asks of the system before torch is there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from everydream.process import MALLOC_VARIABLES, OPEN_FILES, allow_open_files


def test_as_many_files_may_be_open_as_the_system_lets_us() -> None:
    """A cache of a hundred thousand pictures keeps a thousand packs open; 1,024 files is what most shells allow."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        allow_open_files()
        least = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (least, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard), "never fewer"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


FAULTS = """
import resource, sys, torch
from everydream.process import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
def step():
    return sum(torch.ones(n << 18).sum() for n in range(1, 40))  # 1 to 40 MB each
def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
torch.set_num_threads(1)
step()
print(faults(step))
held = int(open("/proc/self/statm").read().split()[1])
give_back_freed_memory()
print(held - int(open("/proc/self/statm").read().split()[1]))
"""


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="glibc's malloc")
@pytest.mark.parametrize("asked", [None, *MALLOC_VARIABLES])
def test_memory_that_a_step_frees_is_there_for_the_next(asked: str | None) -> None:
    """The user's own settings of malloc are left alone."""
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_VARIABLES}
    environment |= {} if asked is None else {asked: "" if asked == "GLIBC_TUNABLES" else "131072"}
    command = [sys.executable, "-c", FAULTS]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    faults, given_back = map(int, result.stdout.split())
    if asked is None:
        assert faults < 100, "pages are faulted in anew at each step"
        assert given_back * os.sysconf("SC_PAGE_SIZE") > 30 << 20
    else:
        assert faults > 1000
