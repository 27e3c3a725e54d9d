"""diffusers' pipeline on the very parameters that are trained: what ours is compared with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from everydream.models.family import Facts, Family


def pipeline_of(family: Family) -> Any:
    from diffusers import schedulers
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    facts, config = family.facts, family.scheduler_config
    modules: dict[str, nn.Module] = {part: family.part(part) for part in ("unet", "text_encoder", "vae")}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(facts.configs["unet"])
        vae = AutoencoderKL.from_config(facts.configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig(**facts.configs["text_encoder"]))
    _share(modules["text_encoder"], text_encoder)
    owner = getattr(text_encoder, "text_model", text_encoder).embeddings  # its one buffer is in no file
    device = next(modules["text_encoder"].parameters()).device
    owner.position_ids = torch.arange(facts.max_tokens, device=device)[None]
    pipeline: Any = StableDiffusionPipeline
    return pipeline(
        vae=_share(modules["vae"], vae),
        text_encoder=text_encoder,
        tokenizer=_tokenizer(facts),
        unet=_share(modules["unet"], unet),
        scheduler=getattr(schedulers, config["_class_name"]).from_config(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _share(ours: nn.Module, theirs: nn.Module) -> Any:
    parameters = dict(ours.named_parameters())
    is_trained = {name: parameter.requires_grad for name, parameter in parameters.items()}
    # transformers 5 has no text_model level.
    names = {name: name if name in parameters else f"text_model.{name}" for name in theirs.state_dict()}
    theirs.load_state_dict({name: parameters[published] for name, published in names.items()}, assign=True)
    for name, parameter in parameters.items():  # loading has set it to the meta module's
        parameter.requires_grad_(is_trained[name])
    return theirs.eval()


def _tokenizer(facts: Facts) -> Any:
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in facts.tokenizer.files.items():
            (Path(folder) / name).write_bytes(content)
        return CLIPTokenizer.from_pretrained(folder)
