"""Many float32 tensors in few safetensors files, made once and read by memory map.

Packs are written under a temporary name, synced and renamed, so what has its name is whole; two runs at once write
packs of their own, and what both have is equal. A crash loses the pack under way.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import time
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from everydream.errors import DataError

_PACK_BYTES, _PACK_SECONDS = 64 << 20, 30.0
_STALE_SECONDS = 24 * 3600


def digest(*parts: object) -> str:
    """32 hex digits."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class Packs:
    """A folder of packs. `load` says which of the wanted tensors are there; `read` gives one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int, tuple[int, ...], int]] = {}
        self._maps: dict[Path, np.ndarray] = {}
        self._proved: set[str] = set()

    def load(self, wanted: Iterable[str]) -> set[str]:
        """Look them up; the names that no pack has. Of several packs with one name the first by file name counts."""
        missing = set(wanted) - self._places.keys()
        for path in sorted(self.folder.glob("*.safetensors")) if missing else ():
            header, begin = _header(path)
            sums = header.pop("__metadata__", {})
            for name in missing & header.keys():
                entry = header[name]
                place = begin + entry["data_offsets"][0]
                self._places[name] = (path, place, tuple(entry["shape"]), int(sums[name]))
                missing.discard(name)
                self._map(path)  # now: what is open stays readable if somebody clears the cache under way
        return missing

    def _map(self, path: Path) -> np.ndarray:
        if path not in self._maps:
            try:
                self._maps[path] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # plain views cost less
            except OSError as error:
                todo = "start again, it is made anew"
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    todo = f"allow more open files (ulimit -n), {len(self._maps)} packs are open"
                raise DataError(f"{path}: cannot be read ({error.strerror}): {todo}") from None
        return self._maps[path]

    def read(self, name: str) -> np.ndarray:
        """float32, a view of the mapped file. Its checksum is proved the first time."""
        if name not in self._places:
            missing = self.load([name])
            assert not missing, f"{missing} not in {self.folder}"
        path, begin, shape, crc = self._places[name]
        data = self._map(path)[begin : begin + 4 * math.prod(shape)]
        if name not in self._proved:
            if zlib.crc32(data.tobytes()) != crc:
                raise DataError(f"{path}: damaged on disk: delete it, it is made again at the next start")
            self._proved.add(name)
        return data.view(np.float32).reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}, "_proved": set()}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensors of a pack and where its data begins; nothing for a file that is not whole."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < 1 << 30 else {}
        sums = header["__metadata__"]
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        whole = sums.keys() == entries.keys() and all(sum_.isdecimal() for sum_ in sums.values())
        whole &= all(4 * math.prod(entry["shape"]) == spans[n][1] - spans[n][0] for n, entry in entries.items())
        if not whole or path.stat().st_size != 8 + length + max((end for _, end in spans.values()), default=0):
            return {}, 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, 0
    return header, 8 + length


class PackWriter:
    """Collects tensors and writes them as packs of some 64 MB, at least every 30 s; the rest at the end of `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, np.ndarray] = {}
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> PackWriter:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be made ({error.strerror}): set cache_dir") from None
        for leftover in self.folder.glob("*.tmp"):  # of a run that was killed
            with suppress(OSError):  # another run may do the same
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    leftover.unlink()
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()  # on errors too: what is done is done

    def add(self, name: str, tensor: np.ndarray) -> None:
        self._tensors[name] = np.ascontiguousarray(tensor, dtype=np.float32)
        self._bytes += self._tensors[name].nbytes
        if self._bytes >= _PACK_BYTES or time.monotonic() - self._since > _PACK_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._tensors:
            path = self.folder / f"{digest(sorted(self._tensors))}.safetensors"
            if _header(path)[0].keys() - {"__metadata__"} != self._tensors.keys():  # else another run has written them
                sums = {name: str(zlib.crc32(tensor.tobytes())) for name, tensor in self._tensors.items()}
                _write_synced(path, save(self._tensors, sums))
        self._tensors, self._bytes, self._since = {}, 0, time.monotonic()


def _write_synced(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(
                f"{path.parent}: cannot be written ({error.strerror}): free space or set cache_dir"
            ) from None
        raise
