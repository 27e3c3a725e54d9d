"""One process at a time in a run's folder."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from everydream.errors import ConfigError, SaveError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: dict[Path, Lock] = {}  # the system's locks are a process's: a second one in the same process would be granted


class Lock:
    """Held until `release` or the end of the process, however it ends: the system drops it, no stale file matters.

    lockf, not flock: it works over NFS, and data workers forked from the trainer do not hold it on after its death.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self._path = path  # without links, while it is held
        self.warning = ""  # that it could not be had, where the file system has no locks

    def take(self, *, sign: bool = True) -> None:
        """`sign`: write down who holds it, for those who meet it.

        Raises ConfigError if another holds it, SaveError if the folder cannot be written to.
        """
        path = self._path = self.path.resolve()
        if path in _held:
            raise ConfigError(f"{path.parent} is in use by this very process")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise SaveError(f"cannot write to the run's folder {path.parent}: {error.strerror}") from error
        try:
            _lock(handle)
        except OSError as error:
            if error.errno in NO_LOCKS:
                self.warning = f"{path.parent} lies on a file system without locks: start no second run in this folder"
                os.close(handle)
                return
            holder = os.read(handle, 1000).decode(errors="replace")
            os.close(handle)
            raise ConfigError(
                f"{path.parent} is in use by another process ({holder or 'unknown'}): two runs in one folder would "
                "overwrite each other. Wait for it, stop it, or start without --resume"
            ) from error
        _held[path] = self
        self._handle = handle
        if sign:
            self.sign()

    def sign(self) -> None:
        if self._handle is None:
            return
        with suppress(OSError):  # on a full disk the lock holds all the same; who holds it is a courtesy
            os.ftruncate(self._handle, 0)
            os.lseek(self._handle, 0, os.SEEK_SET)
            os.write(self._handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())

    def release(self) -> None:
        if self._handle is not None:
            del _held[self._path]
            os.close(self._handle)  # which drops the lock
            self._handle = None

    def __enter__(self) -> Lock:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def release_all() -> None:
    """At the end of a run, whatever became of it, so that a process may start another."""
    for lock in list(_held.values()):
        lock.release()


def _lock(handle: int) -> None:
    """Take the lock or raise OSError at once."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 30, os.SEEK_SET)  # far behind the text, which others may then still read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
