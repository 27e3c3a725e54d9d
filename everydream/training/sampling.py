"""Text to pictures with the parts of a diffusers pipeline, for previews and scripts/sample.py.

text → embeddings → noise → latents, step by step → pixels. The same numbers as the pipeline's own call in float32, but
each part runs in its own precision (the autoencoder outside autocast, for float16 overflows in it), a batch may be left
between two steps, and nothing but the pictures' own generators is drawn from.
Shapes: B pictures, C channels, H × W; text_BLD.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from everydream.training.prompts import SCHEDULERS, Picture

if TYPE_CHECKING:
    from PIL.Image import Image

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class Interrupted(Exception):
    """The caller's `stopping()` became true."""


def batches(pictures: Sequence[Picture], batch_size: int) -> list[list[int]]:
    """Numbers of the pictures that can be made together, a batch each; in the order in which they first appear."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, p in enumerate(pictures):
        alike.setdefault((p.width, p.height, p.steps, p.scheduler, p.guidance), []).append(i)
    return [group[i : i + batch_size] for group in alike.values() for i in range(0, len(group), batch_size)]


def make_scheduler(name: str, config: Any) -> Any:
    """With the model's noise schedule and prediction type."""
    from diffusers import schedulers

    cls, extra = SCHEDULERS[name]
    return getattr(schedulers, cls).from_config(config, **extra)


@torch.no_grad()
def sample(
    pipeline: Any,
    pictures: Sequence[Picture],
    *,
    autocast: Autocast = contextlib.nullcontext,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Image]:
    """One batch, as `batches` cuts them. Raises Interrupted, torch.OutOfMemoryError."""
    first = pictures[0]
    with autocast():
        text_BLD, negative_BLD = encode(pipeline, pictures)
        latents_BCHW = denoise(pipeline, pictures, text_BLD, negative_BLD, stopping)
    assert latents_BCHW.shape[-1] * pipeline.vae_scale_factor == first.width, latents_BCHW.shape
    return [decode(pipeline, latents_1CHW) for latents_1CHW in latents_BCHW.split(1)]


def encode(pipeline: Any, pictures: Sequence[Picture]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of the prompts, and of the negative prompts where guidance needs them."""
    return pipeline.encode_prompt(
        [p.prompt for p in pictures],
        device=pipeline.unet.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=pictures[0].guidance > 1,
        negative_prompt=[p.negative_prompt for p in pictures],
    )


def denoise(
    pipeline: Any,
    pictures: Sequence[Picture],
    text_BLD: torch.Tensor,
    negative_BLD: torch.Tensor | None,
    stopping: Callable[[], bool],
) -> torch.Tensor:
    """Classifier-free guidance: Ho and Salimans 2022, eq. 6, as `negative + guidance · (text − negative)`."""
    first, unet = pictures[0], pipeline.unet
    scheduler = make_scheduler(first.scheduler, pipeline.scheduler.config)
    scheduler.set_timesteps(first.steps, device=unet.device)
    generators = [torch.Generator("cpu").manual_seed(p.seed) for p in pictures]  # CPU: the same on every device
    factor = pipeline.vae_scale_factor
    shape_CHW = (unet.config.in_channels, first.height // factor, first.width // factor)
    noise_BCHW = torch.stack([torch.randn(shape_CHW, generator=g) for g in generators]).to(unet.device)
    latents_BCHW = noise_BCHW * scheduler.init_noise_sigma
    guided = negative_BLD is not None
    text_BLD = torch.cat([part for part in (negative_BLD, text_BLD) if part is not None]).to(unet.dtype)
    draws = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps:
        if stopping():
            raise Interrupted
        input_BCHW = scheduler.scale_model_input(torch.cat([latents_BCHW] * 2) if guided else latents_BCHW, t)
        prediction_BCHW = unet(input_BCHW.to(unet.dtype), t, encoder_hidden_states=text_BLD, return_dict=False)[
            0
        ].float()
        if guided:
            negative_BCHW, positive_BCHW = prediction_BCHW.chunk(2)
            prediction_BCHW = negative_BCHW + first.guidance * (positive_BCHW - negative_BCHW)
        latents_BCHW = scheduler.step(prediction_BCHW, t, latents_BCHW, return_dict=False, **draws)[0]
    return latents_BCHW


def decode(pipeline: Any, latents_1CHW: torch.Tensor) -> Image:
    """One at a time: at 512 px the autoencoder needs more memory than the UNet."""
    vae = pipeline.vae
    latents_1CHW = (latents_1CHW.float() / vae.config.scaling_factor).to(vae.dtype)
    with torch.autocast(latents_1CHW.device.type, enabled=False):
        pixels_BCHW = vae.decode(latents_1CHW, return_dict=False)[0].float()
    return pipeline.image_processor.postprocess(pixels_BCHW, output_type="pil")[0]
