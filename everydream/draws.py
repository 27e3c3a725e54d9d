"""Keyed random generators: every draw of a run is a pure function of (seed, purpose, keys).

No draw depends on how many came before it, so neither the number of processes, nor workers, nor a resume can change
one. Philox is counter-based: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence

if TYPE_CHECKING:
    import torch

Key = int | str


def _digest(seed: int, purpose: str, keys: tuple[Key, ...]) -> bytes:
    # repr keeps 1 and "1" apart, and quotes strings, so that ("a", "b") and ("a, b",) differ.
    return hashlib.blake2b(repr((int(seed), purpose, *keys)).encode(), digest_size=16).digest()


class _Key(ISeedSequence):
    """Philox's own key= first collects entropy that it never uses, which takes twice as long as all the rest."""

    def __init__(self, digest: bytes) -> None:
        self._words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert n_words == 2 and dtype is np.uint64, f"{n_words} words of {dtype}: Philox takes two of 64 bits"
        return self._words


def generator(seed: int, purpose: str, *keys: Key) -> np.random.Generator:
    """A numpy generator for one purpose, for example `generator(seed, "noise", epoch, identity, repeat)`."""
    key = _Key(_digest(seed, purpose, keys))
    return np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]  # an ISeedSequence, as documented


def torch_seed(seed: int, purpose: str, *keys: Key) -> int:
    """63 bits, as torch.Generator.manual_seed takes."""
    return int.from_bytes(_digest(seed, purpose, keys)[:8], "little") >> 1


def torch_generator(seed: int, purpose: str, *keys: Key, device: str = "cpu") -> torch.Generator:
    """A torch generator for one purpose. CPU and CUDA generators of one seed draw different numbers."""
    import torch

    return torch.Generator(device).manual_seed(torch_seed(seed, purpose, *keys))
