"""The one way to the disk: every file that a save makes is created, written, hashed and synced here.

`Files` holds the operations that change a disk. Tests put a recorder or a failing disk in its place, so whatever a save
does is seen by them. What is to be written is a `Content`: `Bytes`, `Copy`, or tensors (`tensorfile.Tensors`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

CHUNK = 1 << 20  # bytes hashed and written in one go: larger leaves the processor's cache, smaller costs calls
FICLONE = 0x40049409  # linux/fs.h
NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # network file systems that sync files only


class Files:
    """The disk. Raises OSError as the system does."""

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)

    def write(self, handle: int, data: memoryview) -> None:
        while data:  # a disk that fills up writes a part first and fails on the rest
            data = data[os.write(handle, data) :]

    def clone(self, handle: int, source: int) -> bool:
        """Share the source's blocks (btrfs, xfs): nothing is copied, and neither file sees changes of the other."""
        if sys.platform != "linux":
            return False
        import fcntl

        try:
            fcntl.ioctl(handle, FICLONE, source)
        except OSError:
            return False
        return True

    def sync(self, handle: int) -> None:
        if sys.platform == "darwin":  # there fsync leaves the data in the drive's own cache
            import fcntl

            with suppress(OSError):  # a network drive has none
                fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
                return
        os.fsync(handle)

    def close(self, handle: int) -> None:
        os.close(handle)

    def sync_folder(self, path: Path) -> None:
        """Make the names inside a folder durable. Windows cannot open folders, and its renames are journalled."""
        if sys.platform == "win32":
            return
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in NO_FOLDER_SYNC:
                raise
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Folders are never renamed onto an existing one."""
        os.rename(source, target)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        os.rmdir(path)


DISK = Files()


@dataclass(frozen=True)
class Written:
    size: int
    sha256: str


class Output:
    """One open file, hashed as it is written."""

    def __init__(self, files: Files, handle: int) -> None:
        self._files, self._handle = files, handle
        self._hash, self._size = hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            self._hash.update(piece)
            self._files.write(self._handle, piece)
            self._size += len(piece)

    def copy(self, source: Path) -> None:
        """The bytes of `source`, by sharing blocks where the file system can. Only for an output still empty."""
        with open(source, "rb") as file:
            if self._files.clone(self._handle, file.fileno()):
                os.lseek(self._handle, 0, os.SEEK_SET)
                while piece := os.read(self._handle, CHUNK):
                    self._hash.update(piece)
                    self._size += len(piece)
            else:
                while piece := file.read(CHUNK):
                    self.write(piece)

    @property
    def written(self) -> Written:
        return Written(self._size, self._hash.hexdigest())


class ChangedFile(OSError):
    """A file to be copied is not what it was."""


class Content(Protocol):
    """What is to stand in a file."""

    def write(self, out: Output) -> None: ...


@dataclass(frozen=True)
class Bytes:
    data: bytes

    def write(self, out: Output) -> None:
        out.write(self.data)


@dataclass(frozen=True)
class Copy:
    """A file that exists. `sha256`: what it must be, where that is known."""

    path: Path
    sha256: str | None = None

    def write(self, out: Output) -> None:
        out.copy(self.path)
        if self.sha256 not in (None, out.written.sha256):
            raise ChangedFile(f"{self.path} is no longer what it was (sha256)")


def write_file(files: Files, path: Path, content: Content) -> Written:
    """A new file, on the disk when this returns; its name is so once its folder is synced."""
    handle = files.create(path)
    try:
        out = Output(files, handle)
        content.write(out)
        files.sync(handle)
    finally:
        files.close(handle)
    return out.written


def make_folders(files: Files, path: Path) -> None:
    """The folder with its parents, each name durable."""
    if not path.is_dir():
        make_folders(files, path.parent)
        with suppress(FileExistsError):  # another process was as quick
            files.make_folder(path)
        files.sync_folder(path.parent)


def write_atomically(path: Path, content: Content, files: Files = DISK) -> Written:
    """The file has its old content or its new one, whatever happens; parents are made.

    Raises OSError, with nothing half-written left.
    """
    make_folders(files, path.parent)
    temporary = path.with_name(f".saving-{path.name}")
    with removed_on_error(temporary, files):
        remove_tree(files, temporary)
        written = write_file(files, temporary, content)
        files.replace(temporary, path)
    files.sync_folder(path.parent)
    return written


@contextmanager
def removed_on_error(path: Path, files: Files) -> Iterator[None]:
    """The error that interrupted the writing counts, not one that clearing up meets on the same broken disk."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove_tree(files, path)
        raise


def remove_tree(files: Files, path: Path) -> None:
    """The file or folder, if it is there; links are removed, never followed."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if is_folder:
        for entry in sorted(path.iterdir()):
            remove_tree(files, entry)
        files.remove_folder(path)
    else:
        files.unlink(path)


def sha256_of(path: Path) -> Written:
    """Size and hash of a file, read through."""
    digest, size = hashlib.sha256(), 0
    piece = memoryview(bytearray(CHUNK))  # one for all: memory got and given back each time stops training's threads
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
    return Written(size, digest.hexdigest())
