"""A disk that loses power: records what is done to it, and builds every state it may be found in afterwards.

What POSIX promises and no more: a file's bytes are there once that file is synced, a name once the folder that holds it
is; until then each may be there, or not, or in part, in any order. A rename is one change of its folder.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from everydream.training.storage import Files


@dataclass
class File:
    now: bytes = b""
    kept: bytes = b""  # what is sure to be there


@dataclass
class Folder:
    now: dict[str, File | Folder] = field(default_factory=dict)
    kept: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[Callable[[dict[str, File | Folder]], object]] = field(default_factory=list)  # from kept to now

    def change(self, what: Callable[[dict[str, File | Folder]], object]) -> None:
        what(self.now)
        self.changes.append(what)

    def sync(self) -> None:
        self.kept, self.changes = dict(self.now), []


class Disk:
    """The folder `root` as it would be found after a power cut; `root` itself is durable."""

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Folder()

    def find(self, path: Path) -> File | Folder:
        node: File | Folder = self.top
        for name in path.relative_to(self.root).parts:
            assert isinstance(node, Folder)
            node = node.now[name]
        return node

    def folder(self, path: Path) -> Folder:
        node = self.find(path)
        assert isinstance(node, Folder)
        return node

    def add(self, path: Path, node: File | Folder) -> None:
        self.folder(path.parent).change(lambda entries: entries.__setitem__(path.name, node))

    def remove(self, path: Path) -> None:
        self.folder(path.parent).change(lambda entries: entries.pop(path.name, None))

    def rename(self, source: Path, target: Path) -> None:
        assert source.parent == target.parent, "from one folder to another is two changes, and may half happen"

        def change(entries: dict[str, File | Folder]) -> None:
            if source.name in entries:  # unless its making was lost
                entries[target.name] = entries.pop(source.name)

        self.folder(source.parent).change(change)


Operation = Callable[[Disk], None]


class Recorder(Files):
    """Does everything, and notes it. `without`: the number of a sync that is left out, of those there are."""

    def __init__(self, without: int | None = None) -> None:
        self.operations: list[Operation] = []
        self.marks: dict[str, int] = {}  # name → how many operations had been done
        self.syncs = 0
        self._without = without
        self._paths: dict[int, Path] = {}

    def mark(self, name: str) -> None:
        self.marks[name] = len(self.operations)

    def _is_left_out(self) -> bool:
        self.syncs += 1
        return self.syncs - 1 == self._without

    def make_folder(self, path: Path) -> None:
        super().make_folder(path)
        self.operations.append(lambda disk: disk.add(path, Folder()))

    def create(self, path: Path) -> int:
        handle = super().create(path)
        self._paths[handle] = path
        self.operations.append(lambda disk: disk.add(path, File()))
        return handle

    def write(self, handle: int, data: memoryview) -> None:
        super().write(handle, data)
        path, added = self._paths[handle], bytes(data)

        def operation(disk: Disk) -> None:
            file = disk.find(path)
            assert isinstance(file, File)
            file.now += added

        self.operations.append(operation)

    def clone(self, handle: int, source: int) -> bool:
        return False

    def sync(self, handle: int) -> None:
        path = self._paths[handle]

        def operation(disk: Disk) -> None:
            file = disk.find(path)
            assert isinstance(file, File)
            file.kept = file.now

        if not self._is_left_out():
            self.operations.append(operation)

    def sync_folder(self, path: Path) -> None:
        if not self._is_left_out():
            self.operations.append(lambda disk: disk.folder(path).sync())

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.operations.append(lambda disk: disk.rename(source, target))

    def replace(self, source: Path, target: Path) -> None:
        super().replace(source, target)
        self.operations.append(lambda disk: disk.rename(source, target))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self.operations.append(lambda disk: disk.remove(path))

    def remove_folder(self, path: Path) -> None:
        super().remove_folder(path)
        self.operations.append(lambda disk: disk.remove(path))


# What is found afterwards


@dataclass(frozen=True)
class Cut:
    """How the unsynced part fares: `names` and `data` choose what of it stays."""

    name: str
    names: Callable[[Folder], dict[str, File | Folder]]
    data: Callable[[File], bytes]


def _random_cut(seed: int) -> Cut:
    rng = random.Random(seed)

    def names(folder: Folder) -> dict[str, File | Folder]:
        entries = dict(folder.kept)
        count = rng.randint(0, len(folder.changes))
        in_order = rng.random() < 0.5  # as a journal keeps them, or any of them
        chosen = folder.changes[:count] if in_order else [c for c in folder.changes if rng.random() < 0.5]
        for change in chosen:
            change(entries)
        return entries

    def data(file: File) -> bytes:
        if file.now == file.kept:
            return file.now
        part = file.now[: rng.randint(0, len(file.now))]
        return rng.choice([file.kept, file.now, part, bytes(len(file.now)), part + bytes(len(file.now) - len(part))])

    return Cut(f"random {seed}", names, data)


def _is_upper(folder: Folder) -> bool:
    return any(isinstance(node, Folder) for node in folder.now.values())


EXTREMES = (
    Cut("all lost", lambda folder: folder.kept, lambda file: file.kept),
    Cut("data lost", lambda folder: folder.now, lambda file: file.kept),
    Cut(
        "data zeroed",
        lambda folder: folder.now,
        lambda file: file.now if file.now == file.kept else bytes(len(file.now)),
    ),
    Cut("names lost", lambda folder: folder.kept, lambda file: file.now),
    Cut("upper names lost", lambda folder: folder.kept if _is_upper(folder) else folder.now, lambda file: file.now),
    Cut("lower names lost", lambda folder: folder.now if _is_upper(folder) else folder.kept, lambda file: file.now),
    Cut("nothing lost", lambda folder: folder.now, lambda file: file.now),
)

State = dict[str, bytes | None]  # path → content, None for a folder


def state_of(folder: Folder, cut: Cut, prefix: str = "") -> State:
    found: State = {}
    for name, node in sorted(cut.names(folder).items()):
        if isinstance(node, Folder):
            found[prefix + name] = None
            found.update(state_of(node, cut, f"{prefix}{name}/"))
        else:
            found[prefix + name] = cut.data(node)
    return found


def states(recorder: Recorder, root: Path, randoms: int) -> Iterator[tuple[int, str, State]]:
    """After each prefix of the operations: how many there were, how the rest fared, and the disk. Each state once."""
    disk = Disk(root)
    seen = set()
    for n, operation in enumerate([lambda disk: None, *recorder.operations]):
        operation(disk)
        for cut in (*EXTREMES, *(_random_cut(1000 * n + seed) for seed in range(randoms))):
            state = state_of(disk.top, cut)
            key = (tuple(state.items()), sum(n >= mark for mark in recorder.marks.values()))
            if key not in seen:
                seen.add(key)
                yield n, cut.name, state


def lay_out(state: State, root: Path) -> None:
    os.mkdir(root)
    for name, content in state.items():
        if content is None:
            os.mkdir(root / name)
        else:
            (root / name).write_bytes(content)
