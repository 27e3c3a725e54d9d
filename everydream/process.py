"""What this process asks of the system before anything else: signals, open files, threads, memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MALLOC_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
OPEN_FILES = 1 << 16  # each pack of a cache stays open; often 1,024 are allowed where nobody asks for more


def before_torch() -> None:
    """A script's first act: what comes too late once torch is there, some seconds from now."""
    allow_open_files()
    stop_with_launcher()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save yet, and where an import was is no news
    # Threads that spin while they wait for each other cost 20-fold beside a process that works. The user's word counts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()


def stop_with_launcher() -> None:
    """The one-process launcher dies of SIGTERM without telling the script: ask the kernel for one of our own.

    Only under a launcher: a run started with nohup from a shell must outlive that shell.
    """
    if sys.platform != "linux" or not any(name.startswith("ACCELERATE_") for name in os.environ):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between, and the kernel has nothing left to tell
        os.kill(os.getpid(), signal.SIGTERM)


def allow_open_files() -> None:
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own below the hard one
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def keep_freed_memory() -> None:
    """glibc gives a step's memory back to the system as the step ends, and the next one faults it in page by page.

    Some per cent of a step on a CPU (docs/speed.md). mallopt(3): a trim threshold of −1 is none. Whoever has set
    glibc's own variables knows better.
    """
    libc = _glibc()
    if libc is not None and not any(name in os.environ for name in MALLOC_VARIABLES):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # as much as glibc takes before 2.35
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)


def give_back_freed_memory() -> None:
    """What was kept, where memory is short."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
