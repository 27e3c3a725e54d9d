"""Files of JSON lines: whole lines only, whatever the disk does. events.jsonl, metrics.jsonl, schedule.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from everydream.training.storage import Bytes, write_atomically

PENDING_LINES = 10_000  # kept in memory while the disk refuses them, a few MB at most


class JsonLines:
    """Appends records. Never raises on a disk that is full, gone or read-only: `write` says how it went.

    The file is opened for each write (some 20 µs): nothing is held in a buffer that a kill could lose, and a folder
    that was moved away or removed is noticed. Lines that could not be written are kept and tried again with the next.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: deque[bytes] = deque(maxlen=PENDING_LINES)

    def write(self, records: Iterable[Mapping[str, Any]]) -> OSError | None:
        """Appends `records`, and those that failed before. Returns why not, or None."""
        self._pending.extend(encode(record) for record in records)
        if not self._pending:
            return None
        try:
            with open(self.path, "ab", buffering=0) as file:
                _append(file.fileno(), b"".join(self._pending))
        except OSError as error:
            return error
        self._pending.clear()
        return None

    def sync(self) -> OSError | None:
        """Puts the file on the disk itself, so that it is there after a power cut."""
        try:
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            return error
        return None


def append_now(path: Path, record: Mapping[str, Any]) -> None:
    """A last line, past all that a JsonLines of this file may be in the middle of: for a signal's handler."""
    with open(path, "ab", buffering=0) as file:
        _append(file.fileno(), encode(record))


def _append(fd: int, data: bytes) -> None:
    """All of `data` or nothing: a full disk may take half a line, which is taken back."""
    start, done = os.fstat(fd).st_size, 0
    try:
        while done < len(data):
            done += os.write(fd, data[done:])
    except OSError:
        with contextlib.suppress(OSError):  # what is no file (a pipe) keeps what it has
            os.ftruncate(fd, start)
        raise


def encode(record: Mapping[str, Any]) -> bytes:
    """One line. Floats with all their digits; what JSON does not have (NaN, infinities) as null."""
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a number of torch's or numpy's
        return _plain(value.item())
    return str(value)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; lines that are torn or not JSON are passed over, a file that is not there is empty."""
    try:
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in lines:
        record = _decode(line)
        if record is not None:
            yield record


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and all(isinstance(record.get(key), int | None) for key in ("step", "of_step"))
    return record if whole else None


def _step_of(record: Mapping[str, Any]) -> int:
    return record.get("of_step") or record.get("step") or 0


def cut_back(path: Path, step: int) -> int:
    """Removes the records of steps after `step`, and torn lines; returns how many. The lines kept stay byte for byte.

    A record of something that began on an earlier step (a background save) counts as of that one, its `of_step`. One
    without a step was written before the first one and stays. Atomic: a crash leaves the old file or the new. Raises
    OSError where the folder cannot be written.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return 0
    kept = [line for line in lines if (record := _decode(line)) is not None and _step_of(record) <= step]
    removed = sum(1 for line in lines if line) - len(kept)
    if removed == 0 and lines[-1] == b"":
        return 0
    write_atomically(path, Bytes(b"".join(line + b"\n" for line in kept)))
    return removed
