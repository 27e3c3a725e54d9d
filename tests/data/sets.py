"""A small set of pictures, and stand-ins for the model's parts. Here and not in tests: spawned workers import it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from everydream.data.batch import Batch
from everydream.data.buckets import assign, bucket_sizes
from everydream.data.dataset import Augmentation, MicroBatches, Source
from everydream.data.folders import Root
from everydream.data.plan import Plan
from everydream.data.scan import scan
from tests.data.pictures import png, write

FACTOR = 4
SHAPES = [(40, 30), (32, 32), (30, 70), (64, 20), (33, 31)]


def make_set(folder: Path, count: int = 13) -> Path:
    for number in range(count):
        write(folder, f"{number:02}.png", png(*SHAPES[number % len(SHAPES)], seed=number))
        write(folder, f"{number:02}.txt", f"sks, tag {number}, red, blue")
    return folder


def source_of(
    folder: Path,
    batch_size: int = 3,
    augmentation: Augmentation | None = None,
    masked_loss: bool = False,
    resolution: int = 32,
) -> Source:
    samples = scan([Root("subject", folder)], masked_loss=masked_loss).usable()
    buckets = assign(
        [(sample.identity, sample.width, sample.height) for sample in samples], bucket_sizes(resolution, 8)
    )
    plan = Plan(buckets, batch_size, 555, multiplies={sample.identity: sample.multiply for sample in samples})
    return Source.of(samples, buckets, augmentation or Augmentation(), plan)


def times(rng: np.random.Generator) -> int:
    return int(rng.integers(1000))


def noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def perturbation(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def tokenize(captions: list[str], chunks: int) -> np.ndarray:
    tokens = np.zeros((len(captions), chunks, 77), dtype=np.int64)
    for row, caption in zip(tokens, captions, strict=True):
        words = list(caption.encode())[: row.size]
        row.flat[: len(words)] = words
    return tokens


def dataset_of(source: Source, **options) -> MicroBatches:
    if "texts" not in options:
        options["tokenize"] = tokenize
    return MicroBatches({"subject": source}, 555, times=times, noise=noise, vae_factor=FACTOR, **options)


def encode(pixels_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stand-in for the VAE that depends on every pixel, and not on the neighbours."""
    cells = torch.nn.functional.avg_pool2d(pixels_BCHW.double(), FACTOR).float()
    mean = torch.cat((cells, cells[:, :1].cumsum(3)), dim=1)
    return mean, mean.abs().sqrt()


def encode_text(captions: list[str]) -> torch.Tensor:
    """A stand-in for the text encoder: text_BLD."""
    seeds = [int.from_bytes(hashlib.sha256(caption.encode()).digest()[:7], "big") for caption in captions]
    return torch.stack([torch.randn(77, 6, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draws_of(batches: Iterable[Batch]) -> list[tuple]:
    """Everything drawn for each picture, comparable, in the order of training."""
    rows = []
    for batch in batches:
        for at, identity in enumerate(batch.identities):
            tensors = (
                batch.t_B,
                batch.noise_BCHW,
                batch.vae_noise_BCHW,
                batch.weights_B,
                batch.pixels_BCHW,
                batch.tokens_BKL,
            )
            digests = tuple(
                hashlib.sha256(tensor[at].numpy().tobytes()).hexdigest() for tensor in tensors if tensor is not None
            )
            rows.append((identity, batch.captions[at], batch.epochs[at], batch.crops[at], batch.flips[at], *digests))
    return rows
