"""Draws → Batch: what each picture of a micro-batch is, with all that is drawn for it.

Every random choice for a picture comes from a generator of its own, keyed by (seed, purpose, epoch, identity, repeat):
turning one augmentation on or off changes no other, and neither do workers, processes, prefetching or a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from everydream.data.batch import Batch
from everydream.data.buckets import crop_box
from everydream.data.cache import LatentCache, LatentRequest, TextCache, mask_of, pixels_of
from everydream.data.captions import shuffle_tags
from everydream.data.pictures import Box, Size, quiet_pillow
from everydream.data.plan import Draw, Plan
from everydream.data.scan import Sample
from everydream.draws import generator

Item = tuple[str, int | tuple[Draw, ...]]  # source name, and a micro-batch of its plan or the draws themselves
Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The run's settings; what stands beside a picture wins over them."""

    cond_dropout: float = 0.0  # share of draws that are trained with the empty caption
    flip_p: float = 0.0
    crop_jitter: float = 0.0  # share of the shorter side
    shuffle_tags: bool = False
    keep_tags: int = 0

    def flip_of(self, sample: Sample) -> float:
        return self.flip_p if sample.flip_p is None else sample.flip_p

    def dropout_of(self, sample: Sample) -> float:
        return self.cond_dropout if sample.cond_dropout is None else sample.cond_dropout

    def shuffles(self, sample: Sample) -> bool:
        return self.shuffle_tags if sample.shuffle_tags is None else sample.shuffle_tags


@dataclass(frozen=True)
class Source:
    """Pictures that are drawn from: the subject's, the class's, the validation's."""

    samples: Mapping[str, Sample]
    sizes: Mapping[str, Size]
    augmentation: Augmentation = field(default_factory=Augmentation)
    plan: Plan | None = None
    is_class: bool = False

    @classmethod
    def of(
        cls,
        samples: Iterable[Sample],
        buckets: Mapping[Size, Sequence[str]],
        augmentation: Augmentation,
        plan: Plan | None = None,
        *,
        is_class: bool = False,
    ) -> Source:
        sizes = {identity: size for size, identities in buckets.items() for identity in identities}
        return cls({sample.identity: sample for sample in samples}, sizes, augmentation, plan, is_class)

    def latent_requests(self) -> list[LatentRequest]:
        """Every variant that a draw can ask for; only with fixed crops."""
        assert self.augmentation.crop_jitter == 0.0, "latents of moving crops cannot be cached"
        requests = []
        for sample in self.samples.values():
            flip_p, size = self.augmentation.flip_of(sample), self.sizes[sample.identity]
            crop = crop_box(sample.width, sample.height, size)
            requests += [
                LatentRequest(sample, size, crop, flip)
                for flip, share in ((False, 1.0 - flip_p), (True, flip_p))
                if share > 0.0
            ]
        return requests

    def captions(self) -> list[str] | None:
        """Every caption that a draw can ask for, the empty one included; None where tags are shuffled."""
        if any(self.augmentation.shuffles(sample) for sample in self.samples.values()):
            return None
        return sorted({"", *(sample.caption for sample in self.samples.values())})


class MicroBatches(Dataset):
    """Item → Batch. Raises DataError naming the picture.

    `times(rng)` → timestep; `noise(rng, (C, H, W))` → float32; `tokenize(captions, chunks)` → int64 [B, K, 77];
    `perturbation(rng, (L, D))` → float32, for text of `text_shape` (L, D). With `latents` no picture is read, with
    `texts` nothing is tokenized.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        seed: int,
        *,
        times: Callable[[Rng], int],
        noise: Callable[[Rng, tuple[int, int, int]], np.ndarray],
        tokenize: Callable[[list[str], int], np.ndarray] | None = None,
        chunks: int = 1,
        latent_channels: int = 4,
        vae_factor: int = 8,
        alpha_color: tuple[int, int, int] = (255, 255, 255),
        latents: LatentCache | None = None,
        texts: TextCache | None = None,
        perturbation: Callable[[Rng, tuple[int, int]], np.ndarray] | None = None,
        text_shape: tuple[int, int] | None = None,
    ) -> None:
        assert (tokenize is None) != (texts is None), "a tokenizer or a text cache, one of them"
        self.sources, self.seed = dict(sources), seed
        self.times, self.noise, self.tokenize, self.chunks = times, noise, tokenize, chunks
        self.latent_channels, self.vae_factor, self.alpha_color = latent_channels, vae_factor, alpha_color
        self.latents, self.texts = latents, texts
        self.perturbation, self.text_shape = perturbation, text_shape

    def __getitem__(self, item: Item) -> Batch:
        name, which = item
        source = self.sources[name]
        if isinstance(which, int):
            assert source.plan is not None, f"{name} has no plan"
            draws = source.plan.micro_batch(which)
        else:
            draws = which
        return self._batch(source, draws)

    def _batch(self, source: Source, draws: Sequence[Draw]) -> Batch:
        samples = [source.samples[draw.sample] for draw in draws]
        sizes = {source.sizes[draw.sample] for draw in draws}
        assert len(sizes) == 1, f"one size a micro-batch, not {sizes}"
        size = sizes.pop()
        crops = [self._crop(source, sample, size, draw) for sample, draw in zip(samples, draws, strict=True)]
        flips = [self._flip(source, sample, draw) for sample, draw in zip(samples, draws, strict=True)]
        captions = [self._caption(source, sample, draw) for sample, draw in zip(samples, draws, strict=True)]
        requests = [LatentRequest(*each) for each in zip(samples, [size] * len(draws), crops, flips, strict=True)]
        shape = (self.latent_channels, size[1] // self.vae_factor, size[0] // self.vae_factor)
        return Batch(
            identities=tuple(draw.sample for draw in draws),
            captions=tuple(captions),
            epochs=tuple(draw.epoch for draw in draws),
            crops=tuple(crops),
            flips=tuple(flips),
            is_class=source.is_class,
            t_B=torch.from_numpy(np.array([self.times(self._rng("time", draw)) for draw in draws], dtype=np.int64)),
            noise_BCHW=_stack([self.noise(self._rng("noise", draw), shape) for draw in draws]),
            vae_noise_BCHW=_stack([self._rng("vae", draw).standard_normal(shape, dtype=np.float32) for draw in draws]),
            weights_B=torch.from_numpy(np.array([sample.loss_scale for sample in samples], dtype=np.float32)),
            mask_B1HW=self._masks(requests, shape),
            perturbation_BLD=self._perturbations(draws),
            **self._pictures(requests),
            **self._text(captions),
        )

    # --- draws ---

    def _rng(self, purpose: str, draw: Draw) -> Rng:
        return generator(self.seed, purpose, draw.epoch, draw.sample, draw.repeat)

    def _crop(self, source: Source, sample: Sample, size: Size, draw: Draw) -> Box:
        jitter = source.augmentation.crop_jitter
        if not jitter:
            return crop_box(sample.width, sample.height, size)
        across, down = self._rng("crop", draw).random(2)
        return crop_box(sample.width, sample.height, size, jitter, (across, down))

    def _flip(self, source: Source, sample: Sample, draw: Draw) -> bool:
        share = source.augmentation.flip_of(sample)
        return share > 0.0 and bool(self._rng("flip", draw).random() < share)

    def _caption(self, source: Source, sample: Sample, draw: Draw) -> str:
        share = source.augmentation.dropout_of(sample)
        if share > 0.0 and self._rng("dropout", draw).random() < share:
            return ""
        if source.augmentation.shuffles(sample):
            return shuffle_tags(sample.caption, source.augmentation.keep_tags, self._rng("tags", draw))
        return sample.caption

    # --- inputs of the model ---

    def _pictures(self, requests: Sequence[LatentRequest]) -> dict[str, torch.Tensor]:
        if self.latents is not None:
            return {"moments_BMCHW": _stack([self.latents.moments(request) for request in requests])}
        with quiet_pillow():
            pixels = [pixels_of(r.sample, r.crop, r.size, r.flip, self.alpha_color) for r in requests]
        return {"pixels_BCHW": _stack(pixels)}

    def _masks(self, requests: Sequence[LatentRequest], shape: tuple[int, int, int]) -> torch.Tensor | None:
        if all(request.sample.mask_path is None for request in requests):
            return None
        return _stack([self._mask(request, shape)[None] for request in requests])

    def _mask(self, request: LatentRequest, shape: tuple[int, int, int]) -> np.ndarray:
        if request.sample.mask_path is None:
            return np.ones(shape[1:], dtype=np.float32)
        if self.latents is not None:
            return self.latents.mask(request)
        with quiet_pillow():
            return mask_of(request.sample, request.crop, request.size, request.flip, self.vae_factor)

    def _text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        if self.texts is not None:
            return {"text_BLD": _stack([self.texts.text(caption) for caption in captions])}
        assert self.tokenize is not None
        return {"tokens_BKL": torch.from_numpy(np.ascontiguousarray(self.tokenize(captions, self.chunks)))}

    def _perturbations(self, draws: Sequence[Draw]) -> torch.Tensor | None:
        if self.perturbation is None:
            return None
        assert self.text_shape is not None
        return _stack([self.perturbation(self._rng("perturbation", draw), self.text_shape) for draw in draws])


def _stack(arrays: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.array(arrays))  # of float32 arrays alike a third of np.stack's time
