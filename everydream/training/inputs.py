"""What a prepared run feeds its model: class pictures, caches, the data set of all its pictures, validation's plan."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from everydream.data.buckets import assign
from everydream.data.cache import LatentCache, TextCache
from everydream.data.dataset import Augmentation, MicroBatches, Source
from everydream.diffusion.noise import EmbeddingPerturbation, NoiseSampler
from everydream.runtime import no_compiled_code
from everydream.training.feed import cache_latents, cache_texts
from everydream.training.prior import generate_missing
from everydream.training.prompts import Picture
from everydream.training.sampling import Parts, sample
from everydream.training.validation import FixedPlan, NoValidation, Validation, still

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from everydream.models.family import Family
    from everydream.training.pictures import PictureSet
    from everydream.training.prepare import Prepared
    from everydream.training.update import Update

CLASS_STEPS, CLASS_GUIDANCE, CLASS_SCHEDULER = 30, 7.5, "ddim"  # how missing class pictures are sampled


def make_class_pictures(prepared: Prepared, family: Family) -> None:
    """Fills class_data_root up to num_class_images with the base model; a resumed run has them already."""
    settings = prepared.settings
    folder, wanted, prompt = settings.class_data_root, settings.num_class_images, settings.class_prompt
    if wanted is None or prepared.start.checkpoint is not None:
        return
    assert folder is not None, "class_data_root"
    width, height = prepared.sampling.width, prepared.sampling.height
    parts: Parts | None = None

    def generate(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> Sequence[Image]:
        nonlocal parts
        parts = parts or Parts.of(family, settings.max_caption_chunks)
        pictures = [
            Picture(p, "", g.initial_seed(), width, height, CLASS_GUIDANCE, CLASS_STEPS, CLASS_SCHEDULER)
            for p, g in zip(prompts, generators, strict=True)
        ]
        with no_compiled_code():
            return sample(parts, pictures, autocast=prepared.accelerator.autocast)

    with prepared.console.task("making class pictures", wanted) as advance:
        made = generate_missing(
            folder,
            wanted,
            prompt,
            settings.seed,
            generate,
            present=lambda: prepared.pictures_in(folder) if folder.is_dir() else [],
            ranks=prepared.ranks,
            stop=lambda: prepared.stop.signum,
            batch_size=settings.batch_size,
            advance=advance,
            about={"model": settings.base_model},
        )
    if made:
        prepared.notes.append(f"{made} class pictures were made in {folder}")


@dataclass(frozen=True)
class Inputs:
    """The training's data set, and validation's: the same caches, another seed, nothing left to chance."""

    training: MicroBatches
    validation: MicroBatches
    plans: Mapping[str, FixedPlan]

    @property
    def is_cached(self) -> bool:
        """Nothing is decoded during training."""
        return self.training.latents is not None

    def worker_count(self, wanted: int | None, on_card: bool) -> int:
        """A cached batch costs less than handing it from one process to another, unless a card must be kept busy."""
        if wanted is not None:
            return wanted
        cores = os.cpu_count() or 1
        if self.is_cached:
            return min(2, cores - 1) if on_card else 0
        return min(8 if on_card else 2, max(0, cores - 1))


def make_inputs(prepared: Prepared, family: Family, sets: Mapping[str, PictureSet]) -> Inputs:
    """Builds the caches that the settings allow; what they made superfluous leaves the memory."""
    settings, facts = prepared.settings, prepared.facts
    augmentation = Augmentation(
        cond_dropout=settings.cond_dropout,
        flip_p=settings.flip_p,
        crop_jitter=settings.crop_jitter,
        shuffle_tags=settings.shuffle_tags,
        keep_tags=settings.keep_tags,
    )
    sources = {name: pictures.source(augmentation, is_class=name == "class") for name, pictures in sets.items()}
    validated, plans = validation_sources(prepared)
    color = settings.alpha_color
    alpha_color = (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16))
    latents = latent_cache(prepared, family, {**sources, **validated}, alpha_color)
    texts = text_cache(prepared, family, {**sources, **validated})
    chunks = settings.max_caption_chunks
    perturbation = EmbeddingPerturbation(settings.embedding_perturbation) if settings.embedding_perturbation else None

    def dataset(some: Mapping[str, Source], seed: int, perturbation: EmbeddingPerturbation | None) -> MicroBatches:
        return MicroBatches(
            some,
            seed,
            times=prepared.times,
            noise=NoiseSampler(settings.zero_frequency_noise_ratio, settings.pyramid_noise_discount or 0.0),
            tokenize=None if texts else prepared.tokenize,
            chunks=chunks,
            latent_channels=facts.latent_channels,
            vae_factor=facts.vae_factor,
            alpha_color=alpha_color,
            latents=latents,
            texts=texts,
            perturbation=perturbation,
            text_shape=(facts.max_tokens * chunks, facts.text_width),
        )

    chosen = prepared.resolved.validation
    return Inputs(
        training=dataset(sources, settings.seed, perturbation),
        validation=dataset(validated, chosen.seed if chosen else settings.seed, None),
        plans=plans,
    )


def validation_sources(prepared: Prepared) -> tuple[dict[str, Source], dict[str, FixedPlan]]:
    sources, plans = {}, {}
    chosen = prepared.resolved.validation
    for name, some in prepared.validation_sets.items():
        samples = [still(one) for one in some]
        buckets = assign(((s.identity, s.width, s.height) for s in samples), prepared.gate.sizes)
        sources[name] = Source.of(samples, buckets, Augmentation())
        plans[name] = FixedPlan(buckets, chosen.batch_size or prepared.settings.batch_size)
    return sources, plans


def make_validation(inputs: Inputs, update: Update, prepared: Prepared) -> Validation | NoValidation:
    if not inputs.plans:
        return NoValidation()
    return Validation(
        inputs.validation, inputs.plans, update.example_losses, prepared.ranks, lambda: prepared.stop.signum
    )


def latent_cache(
    prepared: Prepared, family: Family, sources: Mapping[str, Source], alpha_color: tuple[int, int, int]
) -> LatentCache | None:
    settings = prepared.settings
    if settings.cache_latents is False or settings.crop_jitter:
        family.hold("vae")
        return None
    with prepared.task("caching latents") as progress:
        cache = cache_latents(
            family,
            sources,
            folder=prepared.cache_dir,
            alpha_color=alpha_color,
            workers=prepared.gate.workers,
            ranks=prepared.ranks,
            progress=progress,
        )
    family.drop_vae()
    return cache


def text_cache(prepared: Prepared, family: Family, sources: Mapping[str, Source]) -> TextCache | None:
    """Only where the text encoder is frozen and every caption is known beforehand."""
    if "text_encoder" in prepared.parts:
        return None
    captions: set[str] = set()
    for source in sources.values():
        some = source.captions()
        if some is None:
            family.hold("text_encoder")
            return None
        captions.update(some)
    with prepared.task("caching captions") as progress:
        cache = cache_texts(
            family,
            sorted(captions),
            folder=prepared.cache_dir,
            chunks=prepared.settings.max_caption_chunks,
            clip_skip=prepared.settings.clip_skip,
            ranks=prepared.ranks,
            progress=progress,
        )
    family.drop_text_encoder()
    return cache
