"""What the frozen parts of the model make of pictures and captions, kept on disk between runs.

A pack is a safetensors file with many float32 tensors, named by digests of what they were made from (picture bytes,
size, crop, flip, colour behind alpha; or the caption), in a folder named by the model's key. Packs are written under a
temporary name, synced and renamed, so what has its name is whole; two runs at once write packs of their own, and what
both have is equal. A crash loses the pack under way. Reading maps the packs into memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from everydream.data.gate import Progress, no_progress
from everydream.data.pictures import Box, Size, quiet_pillow, read_mask, read_pixels
from everydream.data.problems import Problem, Unfit
from everydream.data.scan import Sample
from everydream.errors import DataError

_VERSION = 1  # of the transform from file to pixels: a change makes every latent anew
_PACK_BYTES, _PACK_SECONDS = 64 << 20, 30.0
_STALE_SECONDS = 24 * 3600


def digest(*parts: object) -> str:
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
        return missing

    def read(self, name: str) -> np.ndarray:
        """float32, a view of the mapped file. Its checksum is proved the first time."""
        path, begin, shape, crc = self._places[name]
        if path not in self._maps:
            self._maps[path] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # plain views cost less
        data = self._maps[path][begin : begin + 4 * int(np.prod(shape))]
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
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if path.stat().st_size != 8 + length + end:
            return {}, 0
    except (OSError, ValueError, KeyError, TypeError):
        return {}, 0
    return header, 8 + length


class PackWriter:
    """Collects tensors and writes them as packs of some 64 MB, at least every 30 s; the rest at the end of `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, np.ndarray] = {}
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> PackWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
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
            sums = {name: str(zlib.crc32(tensor.tobytes())) for name, tensor in self._tensors.items()}
            _write_synced(self.folder / f"{digest(sorted(self._tensors))}.safetensors", save(self._tensors, sums))
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


# --- latents ---


@dataclass(frozen=True, slots=True)
class LatentRequest:
    """One variant of one picture."""

    sample: Sample
    size: Size
    crop: Box
    flip: bool

    def key(self, alpha_color: tuple[int, int, int]) -> str:
        return digest("latent", _VERSION, self.sample.content, self.size, self.crop, self.flip, alpha_color)

    def mask_key(self) -> str:
        return digest("mask", _VERSION, self.sample.mask_content, self.size, self.crop, self.flip)


class LatentCache:
    """Raw latents (mean, std) of fixed crops, and the masks at their resolution.

    `key` names the encoder: a digest of the VAE's weights and of whatever else changes its output.
    """

    def __init__(self, cache_dir: Path, key: str, alpha_color: tuple[int, int, int] = (255, 255, 255)) -> None:
        self.packs = Packs(cache_dir / "latents" / digest(key))
        self.alpha_color = alpha_color

    def missing(self, requests: Iterable[LatentRequest]) -> list[LatentRequest]:
        """Those not made yet, one for each content, in an order that does not depend on names."""
        by_key = {request.key(self.alpha_color): request for request in requests}
        with_mask = {r.mask_key(): k for k, r in by_key.items() if r.sample.mask_path is not None}
        lacking = self.packs.load([*by_key, *with_mask])
        keys = {with_mask.get(name, name) for name in lacking}
        return [by_key[key] for key in sorted(keys)]

    def moments(self, request: LatentRequest) -> np.ndarray:
        """float32 [2, C, H, W]: mean and std."""
        return self.packs.read(request.key(self.alpha_color))

    def mask(self, request: LatentRequest) -> np.ndarray:
        """float32 [H, W]."""
        return self.packs.read(request.mask_key())


Encode = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # pixels_BCHW uint8 → mean, std _BCHW


def pictures_at_once(size: Size) -> int:
    """How many pictures of one size are always encoded together: a pure function of the size."""
    return max(1, min(16, 4 * 512 * 512 // (size[0] * size[1])))


def build_latents(
    cache: LatentCache,
    requests: Iterable[LatentRequest],
    encode: Encode,
    *,
    vae_factor: int = 8,
    workers: int = 4,
    rank: int = 0,
    world: int = 1,
    progress: Progress = no_progress,
) -> None:
    """Make what is missing; of several processes each makes its share (all must be done before any reads).

    Decoding runs in threads beside the encoder. Raises DataError naming the picture. `progress` may raise to stop.
    """
    missing = cache.missing(requests)
    todo = [request for request in missing if int(request.key(cache.alpha_color), 16) % world == rank]
    groups = [group for size in sorted({r.size for r in todo}) for group in _grouped(todo, size)]
    done = 0
    progress(done, len(todo))
    with PackWriter(cache.packs.folder) as writer, quiet_pillow(), ThreadPoolExecutor(max(1, workers)) as pool:
        read = lambda request: _read(request, cache.alpha_color, vae_factor)  # noqa: E731
        for group, decoded in _ahead(pool, groups, read):
            full = pictures_at_once(group[0].size)
            pixels = np.stack([pixels for pixels, _ in decoded] + [decoded[-1][0]] * (full - len(group)))
            mean_BCHW, std_BCHW = encode(torch.from_numpy(pixels))
            moments = torch.stack((mean_BCHW, std_BCHW), dim=1).float().cpu().numpy()
            for request, (_, mask), moment in zip(group, decoded, moments, strict=False):
                writer.add(request.key(cache.alpha_color), moment)
                if mask is not None:
                    writer.add(request.mask_key(), mask)
            done += len(group)
            progress(done, len(todo))


def _grouped(requests: Sequence[LatentRequest], size: Size) -> Iterator[list[LatentRequest]]:
    alike = [request for request in requests if request.size == size]
    count = pictures_at_once(size)
    return (alike[at : at + count] for at in range(0, len(alike), count))


def _ahead(
    pool: ThreadPoolExecutor, groups: Sequence[list[LatentRequest]], read: Callable[[LatentRequest], Any]
) -> Iterator[tuple[list[LatentRequest], list[Any]]]:
    """Each group with what was read for it; the next group is being read meanwhile, and no more than that."""
    waiting: list[tuple[list[LatentRequest], list[Future]]] = []
    try:
        for group in groups:
            waiting.append((group, [pool.submit(read, request) for request in group]))
            if len(waiting) > 1:
                first, futures = waiting.pop(0)
                yield first, [future.result() for future in futures]
        for first, futures in waiting:
            yield first, [future.result() for future in futures]
    finally:
        for _, futures in waiting:
            for future in futures:
                future.cancel()


def _read(
    request: LatentRequest, alpha_color: tuple[int, int, int], vae_factor: int
) -> tuple[np.ndarray, np.ndarray | None]:
    sample = request.sample
    pixels_CHW = pixels_of(sample, request.crop, request.size, request.flip, alpha_color)
    mask = None
    if sample.mask_path is not None:
        mask = mask_of(sample, request.crop, request.size, request.flip, vae_factor)
    return pixels_CHW, mask


def pixels_of(sample: Sample, crop: Box, size: Size, flip: bool, alpha_color: tuple[int, int, int]) -> np.ndarray:
    """uint8 [3, height, width]. Raises DataError naming the picture."""
    try:
        pixels_HWC = read_pixels(sample.path, (sample.width, sample.height), crop, size, alpha_color)
    except Unfit as error:
        raise DataError(str(Problem(sample.path, error.reason, error.advice))) from None
    return np.ascontiguousarray((pixels_HWC[:, ::-1] if flip else pixels_HWC).transpose(2, 0, 1))


def mask_of(sample: Sample, crop: Box, size: Size, flip: bool, vae_factor: int) -> np.ndarray:
    """float32 [H, W] at latent resolution, mean 1, so that a small mask counts as much as a large one; all 0 where
    nothing of it is in the crop."""
    assert sample.mask_path is not None
    cells = (size[0] // vae_factor, size[1] // vae_factor)
    try:
        mask = read_mask(sample.mask_path, (sample.width, sample.height), crop, cells)
    except Unfit as error:
        raise DataError(str(Problem(sample.mask_path, error.reason, error.advice))) from None
    mask = mask[:, ::-1] if flip else mask
    mean = mask.mean()
    return mask / mean if mean > 0 else np.zeros_like(mask)


# --- text ---

CAPTIONS_AT_ONCE = 16


class TextCache:
    """Text embeddings of captions. `key` names the encoder: its weights, clip_skip, chunks, tokenizer."""

    def __init__(self, cache_dir: Path, key: str) -> None:
        self.packs = Packs(cache_dir / "text" / digest(key))
        self._keys: dict[str, str] = {}

    def missing(self, captions: Iterable[str]) -> list[str]:
        """Captions not made yet, each once, sorted."""
        names = {caption: self._key(caption) for caption in captions}
        lacking = self.packs.load(names.values())
        return sorted(caption for caption, name in names.items() if name in lacking)

    def text(self, caption: str) -> np.ndarray:
        """float32 [L, D]."""
        return self.packs.read(self._key(caption))

    def _key(self, caption: str) -> str:
        if caption not in self._keys:
            self._keys[caption] = digest("text", caption)
        return self._keys[caption]


def build_texts(
    cache: TextCache,
    captions: Iterable[str],
    encode: Callable[[list[str]], torch.Tensor],
    *,
    rank: int = 0,
    world: int = 1,
    progress: Progress = no_progress,
) -> None:
    """Make what is missing; `encode` gets CAPTIONS_AT_ONCE captions and gives text_BLD."""
    missing = cache.missing(captions)
    todo = [caption for caption in missing if int(digest("text", caption), 16) % world == rank]
    progress(0, len(todo))
    with PackWriter(cache.packs.folder) as writer:
        for begin in range(0, len(todo), CAPTIONS_AT_ONCE):
            group = todo[begin : begin + CAPTIONS_AT_ONCE]
            text_BLD = encode(group + [""] * (CAPTIONS_AT_ONCE - len(group))).float().cpu().numpy()
            for caption, text_LD in zip(group, text_BLD, strict=False):
                writer.add(digest("text", caption), text_LD)
            progress(begin + len(group), len(todo))
