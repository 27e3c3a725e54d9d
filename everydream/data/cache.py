"""What the frozen parts of the model make of pictures and captions, kept on disk between runs.

Tensors are named by digests of what they were made from (picture bytes, size, crop, flip, colour behind alpha; or the
caption), in a folder named by the model's key.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from everydream.data.gate import Progress, no_progress
from everydream.data.packs import Packs, PackWriter, digest
from everydream.data.pictures import Box, Size, quiet_pillow, read_mask, read_pixels
from everydream.data.problems import Problem, Unfit, shown
from everydream.data.scan import Sample
from everydream.data.verify import digest_of
from everydream.errors import DataError

_VERSION = 2  # of the transform from file to pixels: a change makes every latent anew


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
        assert self.sample.mask_path is not None
        return digest("mask", _VERSION, self.sample.mask_content, self.size, self.crop, self.flip)

    def names(self, alpha_color: tuple[int, int, int]) -> tuple[str, ...]:
        """Of the tensors that this variant needs."""
        key = self.key(alpha_color)
        return (key,) if self.sample.mask_path is None else (key, self.mask_key())


class LatentCache:
    """Raw latents (mean, std) of fixed crops, and the masks at their resolution.

    `key` names the encoder: a digest of the VAE's weights and of whatever else changes its output.
    """

    def __init__(self, cache_dir: Path, key: str, alpha_color: tuple[int, int, int] = (255, 255, 255)) -> None:
        self.packs = Packs(cache_dir / "latents" / digest(key))
        self.alpha_color = alpha_color

    def missing(self, requests: Iterable[LatentRequest]) -> list[LatentRequest]:
        """Those not made yet, one for each content and mask, in an order that does not depend on names."""
        names = {request: request.names(self.alpha_color) for request in requests}
        lacking = self.packs.load(itertools.chain.from_iterable(names.values()))
        chosen = []
        for request in sorted(names, key=lambda request: (-len(names[request]), names[request])):  # with masks first
            if lacking.intersection(names[request]):
                lacking.difference_update(names[request])
                chosen.append(request)
        return chosen

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
    requests: Sequence[LatentRequest],
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
    done = 0
    progress(done, len(todo))
    if not todo:
        return
    groups = [group for size in sorted({r.size for r in todo}) for group in _grouped(todo, size)]
    with PackWriter(cache.packs.folder) as writer, quiet_pillow(), ThreadPoolExecutor(max(1, workers)) as pool:
        read = lambda request: _read(request, cache.alpha_color, vae_factor)  # noqa: E731
        for group, decoded in _ahead(pool, groups, read):
            full = pictures_at_once(group[0].size)
            pixels = np.stack([pixels for pixels, _ in decoded] + [decoded[-1][0]] * (full - len(group)))
            mean_BCHW, std_BCHW = encode(torch.from_numpy(pixels))
            moments = torch.stack((mean_BCHW, std_BCHW), dim=1).float().cpu().numpy()
            for request, (_, mask), moment in zip(group, decoded, moments, strict=False):
                _refuse_non_finite(moment, f"{shown(request.sample.path)}: its latents")
                writer.add(request.key(cache.alpha_color), moment)
                if mask is not None:
                    writer.add(request.mask_key(), mask)
            done += len(group)
            progress(done, len(todo))
    cache.missing(requests)  # so that what was made can be read


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
    _refuse_changed(sample.path, sample.content)
    pixels_CHW = pixels_of(sample, request.crop, request.size, request.flip, alpha_color)
    mask = None
    if sample.mask_path is not None:
        _refuse_changed(sample.mask_path, sample.mask_content)
        mask = mask_of(sample, request.crop, request.size, request.flip, vae_factor)
    return pixels_CHW, mask


def _refuse_changed(path: Path, content: str | None) -> None:
    """A latent under the wrong digest would be wrong for ever. Raises DataError."""
    try:
        changed = digest_of(path) != content
    except OSError as error:
        raise DataError(
            str(Problem(path, f"cannot be read ({error.strerror})", "check the file and the disk"))
        ) from None
    if changed:
        raise DataError(str(Problem(path, "it is not what the check of the pictures saw", "touch it and start again")))


def _refuse_non_finite(tensor: np.ndarray, what: str) -> None:
    if not np.isfinite(tensor).all():
        raise DataError(f"{what} are not finite numbers: the base model's weights are damaged or overflow")


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
    captions: Sequence[str],
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
    if not todo:
        return
    with PackWriter(cache.packs.folder) as writer:
        for begin in range(0, len(todo), CAPTIONS_AT_ONCE):
            group = todo[begin : begin + CAPTIONS_AT_ONCE]
            text_BLD = encode(group + [""] * (CAPTIONS_AT_ONCE - len(group))).float().cpu().numpy()
            for caption, text_LD in zip(group, text_BLD, strict=False):
                _refuse_non_finite(text_LD, f"caption {caption!r}: its embeddings")
                writer.add(digest("text", caption), text_LD)
            progress(begin + len(group), len(todo))
    cache.missing(captions)  # so that what was made can be read
