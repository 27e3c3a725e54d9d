"""Every picture decoded once before step 1, by several threads; what was learned is kept by path, size and time, so
that the next start only asks the file system."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from itertools import islice
from pathlib import Path

from everydream.data.pictures import quiet_pillow
from everydream.data.problems import Unfit
from everydream.data.verify import PictureFacts, refuse_size, verify

Progress = Callable[[int, int], None]  # (done, total); an exception raised in it ends the work, and is passed on
Checked = PictureFacts | Unfit

_VERSION = 1  # of what verify() checks
_ROW = 2 + len(fields(PictureFacts))
_SAVE_EVERY = 2000  # pictures: a crash loses no more work than that


def no_progress(done: int, total: int) -> None:
    """For callers that show none."""


@dataclass(frozen=True, slots=True)
class _Stamp:
    size: int
    mtime_ns: int


def check_pictures(
    paths: Iterable[Path],
    *,
    max_megapixels: float = 100.0,
    workers: int = 4,
    memory: Path | None = None,
    remember: bool = True,
    progress: Progress = no_progress,
) -> dict[Path, Checked]:
    """What verify() says of each file, decoding only those that changed since `memory` (a folder) was written.

    `remember` False: the memory is read, and left as it is.
    """
    wanted = sorted(set(paths))
    known = _Memory(memory, remember)
    results: dict[Path, Checked] = {}
    stale: list[tuple[Path, _Stamp | None]] = []
    for path in wanted:
        stamp = _stamp(path)
        remembered = known.known(path, stamp, max_megapixels)
        if remembered is None:
            stale.append((path, stamp))
        else:
            results[path] = remembered
    progress(len(results), len(wanted))
    try:
        for path, stamp, checked in _in_threads(stale, max_megapixels, workers):
            results[path] = checked
            known.learn(path, stamp, checked)
            progress(len(results), len(wanted))
            if len(results) % _SAVE_EVERY == 0:
                known.save()
    finally:
        known.save()
    return results


def _in_threads(
    stale: list[tuple[Path, _Stamp | None]], max_megapixels: float, workers: int
) -> Iterable[tuple[Path, _Stamp | None, Checked]]:
    # Threads, not processes: Pillow's decoders and hashlib release the interpreter lock.
    todo = iter(stale)
    with quiet_pillow(), ThreadPoolExecutor(max(1, workers)) as pool:

        def submit(count: int) -> dict[Future[Checked], tuple[Path, _Stamp | None]]:
            return {pool.submit(_check, path, max_megapixels): (path, stamp) for path, stamp in islice(todo, count)}

        pending = submit(4 * max(1, workers))
        try:
            while pending:
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    path, stamp = pending.pop(future)
                    yield path, stamp, future.result()
                pending |= submit(4 * max(1, workers) - len(pending))
        finally:
            for future in pending:
                future.cancel()


def _check(path: Path, max_megapixels: float) -> Checked:
    try:
        return verify(path, max_megapixels)
    except Unfit as error:
        return error
    except OSError as error:
        return Unfit(f"cannot be opened ({error.strerror})", "check its permissions and links")


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return _Stamp(status.st_size, status.st_mtime_ns)


class _Memory:
    """What is known of the pictures in each folder: one JSON file a folder, name → [size, mtime_ns, *facts]. Only good
    pictures are remembered, so that a mended one is looked at again whatever its time says."""

    def __init__(self, place: Path | None, remember: bool) -> None:
        self.place, self.remember = place, remember
        self.rows: dict[Path, dict[str, list]] = {}
        self.fresh: set[Path] = set()

    def known(self, path: Path, stamp: _Stamp | None, max_megapixels: float) -> Checked | None:
        row = self._of(path.parent).get(path.name)
        if stamp is None or not isinstance(row, list) or len(row) != _ROW or row[:2] != [stamp.size, stamp.mtime_ns]:
            return None
        facts = PictureFacts(*row[2:])
        if not all(type(side) is int and side > 0 for side in (facts.width, facts.height)):
            return None
        try:
            refuse_size(path, (facts.width, facts.height), facts.format, max_megapixels)
        except Unfit as error:
            return error
        return facts

    def learn(self, path: Path, stamp: _Stamp | None, checked: Checked) -> None:
        if stamp is not None and isinstance(checked, PictureFacts) and stamp == _stamp(path):
            self._of(path.parent)[path.name] = [stamp.size, stamp.mtime_ns, *astuple(checked)]
            self.fresh.add(path.parent)

    def save(self) -> None:
        """Two runs at once: the last one's file stays, and is as true as the other's."""
        if self.place is None or not self.remember:
            return
        for folder in self.fresh:
            there = set(os.listdir(folder)) if folder.is_dir() else set()
            rows = {name: row for name, row in self.rows[folder].items() if name in there}
            file = self._file(folder)
            temporary = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
            try:
                self.place.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(rows), "utf-8")
                os.replace(temporary, file)
            except OSError:  # nothing is remembered, so the next start decodes again
                with suppress(OSError):
                    temporary.unlink()
        self.fresh.clear()

    def _of(self, folder: Path) -> dict[str, list]:
        if folder not in self.rows:
            self.rows[folder] = self._load(folder)
        return self.rows[folder]

    def _load(self, folder: Path) -> dict[str, list]:
        if self.place is None:
            return {}
        try:
            rows = json.loads(self._file(folder).read_text("utf-8"))
            return rows if isinstance(rows, dict) else {}
        except (OSError, ValueError):
            return {}

    def _file(self, folder: Path) -> Path:
        assert self.place is not None
        name = hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=16).hexdigest()
        return self.place / f"{_VERSION}-{name}.json"
