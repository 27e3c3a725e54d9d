"""Text to pictures with the model that is being trained, for previews, class pictures and scripts/sample.py.

text → embeddings → noise → latents, step by step → pixels. The same numbers as diffusers' pipeline in float32, without
its import (seconds); a batch may be left between two steps, and only the pictures' own generators are drawn from.
Shapes: B pictures, C channels, H × W; tokens_BKL and text_BLD as in models/sd.py.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from everydream.diffusion.ddim import Ddim
from everydream.training.prompts import SCHEDULERS, Picture

if TYPE_CHECKING:
    from PIL.Image import Image

    from everydream.models.family import Family

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Interrupted(Exception):
    """The caller's `stopping()` became true."""


@dataclass(frozen=True)
class Parts:
    """What sampling needs of a model. `chunks`: of 75 tokens, that a prompt may have."""

    denoiser: nn.Module
    text_encoder: nn.Module
    vae: Any
    tokenize: Any
    scheduler_config: Mapping[str, Any]
    latent_channels: int
    vae_factor: int
    scaling: float
    device: torch.device
    chunks: int = 1

    @classmethod
    def of(cls, family: Family, chunks: int = 1) -> Parts:
        """Parts that were dropped are read again, and go when this object does."""
        return cls(
            denoiser=family.denoiser,
            text_encoder=family.part("text_encoder"),
            vae=family.part("vae"),
            tokenize=family.tokenize,
            scheduler_config=family.scheduler_config,
            latent_channels=family.facts.latent_channels,
            vae_factor=family.facts.vae_factor,
            scaling=family.facts.configs["vae"].get("scaling_factor", 0.18215),
            device=next(family.denoiser.parameters()).device,
            chunks=chunks,
        )

    def is_too_long(self, prompt: str) -> bool:
        return self.tokenize.count(prompt) > self.chunks * (self.tokenize.length - 2)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        tokens_BKL = torch.from_numpy(self.tokenize(prompts, self.chunks)).to(self.device)
        return self.text_encoder(tokens_BKL)

    def decode(self, latents_1CHW: Tensor) -> Tensor:
        """Latents → uint8 pixels 3HW. One at a time: at 512 px the autoencoder needs more memory than the UNet."""
        with torch.autocast(self.device.type, enabled=False):  # float16 overflows in it
            dtype = next(self.vae.parameters()).dtype
            pixels_1CHW = self.vae.decode((latents_1CHW / self.scaling).to(dtype)).float()
        return (pixels_1CHW[0] / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Every module in eval mode, and back in the mode that it was in."""
        parts = (self.denoiser, self.text_encoder, self.vae)
        modes = [(module, module.training) for part in parts for module in part.modules()]
        try:
            for part in parts:
                part.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def batches(pictures: Sequence[Picture], batch_size: int) -> list[list[int]]:
    """Numbers of the pictures that can be made together, a batch each; in the order in which they first appear."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(pictures):
        alike.setdefault((p.width, p.height, p.steps, p.scheduler, p.guidance), []).append(i)
    return [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]


@torch.no_grad()
def sample(
    parts: Parts,
    pictures: Sequence[Picture],
    *,
    generators: Sequence[torch.Generator] | None = None,
    autocast: Autocast = contextlib.nullcontext,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Image]:
    """One batch, as `batches` cuts them. `generators`: on the CPU, one a picture; by default of each one's seed.

    Raises Interrupted, torch.OutOfMemoryError.
    """
    from PIL import Image

    generators = generators or [torch.Generator("cpu").manual_seed(p.seed) for p in pictures]
    with autocast():
        text_BLD = parts.encode([p.prompt for p in pictures])
        if pictures[0].guidance > 1:  # negative prompts first, as one batch with the others
            text_BLD = torch.cat([parts.encode([p.negative_prompt for p in pictures]), text_BLD])
        latents_BCHW = denoise(parts, pictures[0], text_BLD, generators, stopping)
    pixels = [parts.decode(latents_1CHW).permute(1, 2, 0).cpu().numpy() for latents_1CHW in latents_BCHW.split(1)]
    return [Image.fromarray(pixels_HWC) for pixels_HWC in pixels]


def denoise(
    parts: Parts, like: Picture, text_BLD: Tensor, generators: Sequence[torch.Generator], stopping: Callable[[], bool]
) -> Tensor:
    """Classifier-free guidance: Ho and Salimans 2022, eq. 6, written as `negative + guidance · (positive − negative)`.

    text_BLD: of the prompts, or of negative prompts and prompts, twice as many as there are generators.
    """
    scheduler = make_scheduler(like.scheduler, parts.scheduler_config, like.steps)
    shape_CHW = (parts.latent_channels, like.height // parts.vae_factor, like.width // parts.vae_factor)
    noise_BCHW = torch.stack([torch.randn(shape_CHW, generator=g) for g in generators])  # the same on every device
    latents_BCHW = (noise_BCHW * scheduler.init_noise_sigma).to(parts.device)
    draws = {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    times = len(text_BLD) // len(generators)
    for t in scheduler.timesteps:
        if stopping():
            raise Interrupted
        input_BCHW = scheduler.scale_model_input(latents_BCHW.repeat(times, 1, 1, 1), t)
        prediction_BCHW = parts.denoiser(input_BCHW, t.to(parts.device).expand(len(text_BLD)), text_BLD)
        if times == 2:
            negative_BCHW, positive_BCHW = prediction_BCHW.chunk(2)
            prediction_BCHW = negative_BCHW + like.guidance * (positive_BCHW - negative_BCHW)
        latents_BCHW = scheduler.step(prediction_BCHW, t, latents_BCHW, return_dict=False, **draws)[0]
    return latents_BCHW


def make_scheduler(name: str, config: Mapping[str, Any], steps: int) -> Any:
    """With the model's noise schedule and prediction type, set to that many steps. All but ddim are diffusers'."""
    if name == "ddim":
        return Ddim(config, steps)
    from diffusers import schedulers

    cls, extra = SCHEDULERS[name]
    scheduler = getattr(schedulers, cls).from_config({k: v for k, v in config.items() if k[0] != "_"}, **extra)
    scheduler.set_timesteps(steps)
    return scheduler
