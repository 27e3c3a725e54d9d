"""Batch: everything that one micro-batch needs, made in a data worker, checked once.

Shapes: B pictures, C latent channels, H W latent rows and columns (pixels: times the VAE factor), M = 2 moments (mean,
std of the raw latents), K caption chunks of 77 tokens, L = K·77 text positions of width D.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures as pixels or moments, captions as tokens or text embeddings, and every draw of the objective."""

    identities: tuple[str, ...]
    captions: tuple[str, ...]  # as trained: after tag order and dropout
    epochs: tuple[int, ...]  # from 0
    crops: tuple[tuple[int, int, int, int], ...]  # x0, y0, x1, y1 in the upright picture
    flips: tuple[bool, ...]
    is_class: bool
    t_B: torch.Tensor  # int64
    noise_BCHW: torch.Tensor  # float32
    vae_noise_BCHW: torch.Tensor  # float32: the VAE's draw
    weights_B: torch.Tensor  # float32: loss_scale
    pixels_BCHW: torch.Tensor | None = None  # uint8 RGB
    moments_BMCHW: torch.Tensor | None = None  # float32
    tokens_BKL: torch.Tensor | None = None  # int64 [B, K, 77]
    text_BLD: torch.Tensor | None = None  # float32
    mask_B1HW: torch.Tensor | None = None  # float32, mean 1 over each picture (0 where nothing of it is in the crop)
    perturbation_BLD: torch.Tensor | None = None  # float32, added to the text embeddings

    def __post_init__(self) -> None:
        size = len(self.identities)
        assert (self.pixels_BCHW is None) != (self.moments_BMCHW is None), "pixels or moments, one of them"
        assert (self.tokens_BKL is None) != (self.text_BLD is None), "tokens or text, one of them"
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor | tuple):
                assert len(value) == size, f"{field.name}: {len(value)} != {size}"
        assert self.vae_noise_BCHW.shape == self.noise_BCHW.shape, f"{self.vae_noise_BCHW.shape}"
        if self.moments_BMCHW is not None:
            shape = (size, 2, *self.noise_BCHW.shape[1:])
            assert self.moments_BMCHW.shape == shape, f"{self.moments_BMCHW.shape} != {shape}"

    def __len__(self) -> int:
        return len(self.identities)

    def _each(self, change: Any) -> Batch:
        changed = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **changed)

    def to(self, device: torch.device | str) -> Batch:
        """The tensors on a device; the copy overlaps with work on it where the memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Called by the data loader."""
        return self._each(lambda tensor: tensor.pin_memory())

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers send a batch as one piece: small ones as bytes in the pipe, large ones as one tensor in shared memory.
        # Measured in the parent, 100 kB: 0.7 ms, one shared tensor 1.3, each tensor by itself 1.7; 8 MB: 13, 2.6, 3.4.
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        places, end = {}, 0
        for name, tensor in tensors.items():
            places[name] = (end, tensor.nbytes, tensor.dtype, tensor.shape)
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        flat = np.empty(end, dtype=np.uint8)
        for name, (begin, count, _, _) in places.items():
            flat[begin : begin + count] = tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        others = {name: value for name, value in values.items() if name not in tensors}
        return _unpacked, (others, places, flat if end < _SMALL else torch.from_numpy(flat))


_ALIGNED, _SMALL = 64, 1 << 20  # bytes


def _unpacked(others: dict[str, Any], places: dict[str, Any], flat: np.ndarray | torch.Tensor) -> Batch:
    flat = torch.from_numpy(flat) if isinstance(flat, np.ndarray) else flat
    tensors: dict[str, Any] = {
        name: flat[begin : begin + count].view(dtype).reshape(shape)
        for name, (begin, count, dtype, shape) in places.items()
    }
    return Batch(**others, **tensors)
