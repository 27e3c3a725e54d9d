"""Saves while training goes on: a snapshot in the host's memory, one writer thread, at most one save under way."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from everydream.errors import SaveError
from everydream.training import hostmemory
from everydream.training.checkpoint import commit, read_manifest
from everydream.training.retention import Retention
from everydream.training.snapshot import HostMemory, finished
from everydream.training.storage import DISK, Bytes, ChangedFile, Content, Copy, Files, write_atomically
from everydream.training.tensorfile import Tensors, UnchangedTensors

Contents = Mapping[str, Content]
Exports = Mapping[Path, Callable[[Path], Content]]  # file → its content, made from the checkpoint's folder

FAILURES = 3  # in a row, after which a run that cannot save is ended: what it learns would be lost
SPARE = 256 << 20  # bytes that a snapshot leaves free for everything else


@dataclass(frozen=True)
class Saved:
    """What became of one save. `held_s`: how long training waited for it."""

    step: int
    path: Path | None = None
    error: SaveError | None = None
    background: bool = False
    held_s: float = 0.0
    seconds: float = 0.0
    deleted: tuple[Path, ...] = ()
    exported: tuple[Path, ...] = ()
    warnings: tuple[str, ...] = ()


class Saver:
    """Rank 0's. `last`: the checkpoint the run was resumed from, if it was. `beside`: files without which
    checkpoints are of no use; they are written again where somebody has moved the run's folder away."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        background: bool,
        keep_last: int | None = None,
        last: Path | None = None,
        beside: Mapping[Path, bytes] = {},
        files: Files = DISK,
        free_memory: Callable[[], int] = hostmemory.available,
    ) -> None:
        self.failures = 0  # saves that failed in a row
        self._checkpoints, self._background, self._files = checkpoints, background, files
        self._retention = Retention(checkpoints, keep_last, files)
        self._last, self._beside, self._free_memory = last, beside, free_memory
        self._memory = HostMemory()
        self._copied = threading.Event()
        self._copied.set()
        self._held_s: dict[int, float] = {}  # by step: training's thread counts, and may do so after the writer is done
        self._copying = 0
        self._thread: threading.Thread | None = None
        self._done: deque[Saved] = deque()
        self._error: SaveError | None = None
        self._bug: BaseException | None = None

    def save(self, step: int, contents: Contents, exports: Exports | None = None, *, wait: bool = False) -> None:
        """Begin a save; an earlier one is finished first. Its outcome comes from `outcomes`.

        `settle` is to be called before the tensors change: they are on the disk then, or copied to the host's memory
        where they fit. `wait`: nothing is left to train meanwhile, so that a copy would only cost memory.
        """
        began = time.perf_counter()
        self.join()
        in_background = self._background and not wait
        short_of = self._short_of(contents) if in_background else ""
        if not in_background or short_of:
            self._run(Saved(step), lambda: (contents, short_of), exports or {}, began)
            return
        live, ready = [contents], finished(_tensors(contents))

        def copy() -> tuple[Contents, str]:
            contents = live.pop()  # nobody else holds what was made for this save alone: it goes once it is copied
            try:
                return {**contents, **self._memory.copy(_tensors(contents), ready)}, ""
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                self._memory = HostMemory()
                return contents, f"no memory for a background save ({error}): training waits for this save"

        arguments = (Saved(step, background=True), copy, exports or {}, began)
        self._copied.clear()
        self._copying, self._held_s[step] = step, time.perf_counter() - began
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"save step {step}")
        self._thread.start()

    def settle(self) -> None:
        """Wait until what is being saved may change: before an optimizer's step, or averaged weights in its place."""
        if not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self._held_s[self._copying] += time.perf_counter() - began

    def join(self) -> None:
        """Wait for the save under way: before a roll-back, and before the end."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def outcomes(self) -> list[Saved]:
        """The saves that have ended since the last call; does not wait. An error of ours in the writer is raised."""
        if self._bug is not None:
            raise self._bug
        done = [self._done.popleft() for _ in range(len(self._done))]
        return [replace(saved, held_s=self._held_s.pop(saved.step, saved.seconds)) for saved in done]

    def has_failed(self) -> bool:
        """Whether the last save has; waits for it."""
        self.join()
        return self.failures > 0

    def require(self) -> None:
        """Raises SaveError if the last save failed; waits for it. For the last save of a run and one on a signal."""
        self.join()
        if self._bug is not None:
            raise self._bug
        if self.failures:
            raise SaveError(f"the last {self.failures} saves failed: {self._error}")

    def _run(self, saved: Saved, take: Callable[[], tuple[Contents, str]], exports: Exports, began: float) -> None:
        """`take`: the contents, and why they are live tensors, if they are: those must stay as they are until then."""
        try:
            contents, live_because = take()
            if live_because:
                saved = replace(saved, warnings=(live_because,))
            else:
                self._copied.set()
            saved = self._write(saved, contents, exports)
        except BaseException as error:
            self._bug = error
        finally:
            self._copied.set()
        saved = replace(saved, seconds=time.perf_counter() - began)
        self._done.append(saved)  # whole: `outcomes` may be called at any moment

    def _write(self, saved: Saved, contents: Contents, exports: Exports) -> Saved:
        try:
            path = self._commit(saved.step, contents)
        except SaveError as error:
            self.failures += 1
            self._error = error
            return replace(saved, error=error)
        self.failures, self._last = 0, path
        warnings = list(saved.warnings)
        try:
            warnings += self._write_beside()
        except OSError as error:
            warnings.append(f"a resume may not find its settings: {error}")
        exported, deleted = [], list[Path]()
        for target, make in exports.items():
            try:
                write_atomically(target, make(path), self._files)
                exported.append(target)
            except Exception as error:  # noqa: PERF203 whatever an export meets, the checkpoint is safe: go on
                warnings.append(f"cannot export {target}: {error}")
        try:
            deleted = self._retention.apply()
        except OSError as error:
            warnings.append(f"cannot delete old checkpoints: {error}")
        return replace(saved, path=path, exported=tuple(exported), deleted=tuple(deleted), warnings=tuple(warnings))

    def _write_beside(self) -> list[str]:
        gone = [path for path in self._beside if not path.exists()]
        for path in gone:
            write_atomically(path, Bytes(self._beside[path]), self._files)
        return [f"{path} was gone, and is written again: what was in its folder is not there any more" for path in gone]

    def _commit(self, step: int, contents: Contents) -> Path:
        try:
            return commit(self._checkpoints, step, self._from_last(contents), self._files)
        except SaveError as error:
            if not isinstance(error.__cause__, ChangedFile):
                raise
            self._last = None
            return commit(self._checkpoints, step, contents, self._files)

    def _from_last(self, contents: Contents) -> Contents:
        """Files that are the same at every save come from the run's last checkpoint, which knows their hashes.

        The base model may have been moved or changed by now; and in one file system nothing need be copied at all.
        """
        if self._last is None:
            return contents
        try:
            known = read_manifest(self._last)["files"]
        except ValueError:
            return contents
        result = dict(contents)
        for name, content in contents.items():
            if isinstance(content, Copy | UnchangedTensors) and name in known and (self._last / name).is_file():
                result[name] = Copy(self._last / name, known[name]["sha256"])
        return result

    def _short_of(self, contents: Contents) -> str:
        needed = self._memory.missing(_tensors(contents))
        if needed == 0 or needed <= (free := self._free_memory() - SPARE):
            return ""
        return (
            f"a background save would need {needed / 1e9:.1f} GB more memory and {max(free, 0) / 1e9:.1f} GB are free: "
            "training waits for this save"
        )


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class of its own for a card's memory only, not for the host's, pinned or not."""
    text = str(error).lower()
    is_ours = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_ours or "out of memory" in text or "allocate memory" in text


def _tensors(contents: Contents) -> dict[str, Tensors]:
    return {name: content for name, content in contents.items() if isinstance(content, Tensors)}
