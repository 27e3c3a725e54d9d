"""Writes the base model in the form of the published Stable Diffusion 1.5 folder, whatever libraries are installed."""

import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextModel

SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# What the libraries note about themselves and about the place a model was loaded from: not part of the model.
NOT_CONFIG = ("_name_or_path", "transformers_version", "dtype")


def write(
    folder: Path, vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer_folder: Path
) -> None:
    """Writes beside the folder and then puts it in place, so that a reader never meets half of it."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    shutil.copytree(tokenizer_folder, new / "tokenizer")
    write_json(new / "model_index.json", MODEL_INDEX)
    write_json(new / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_part(new / "vae", "diffusion_pytorch_model", vae.state_dict(), dict(vae.config))
    write_part(new / "unet", "diffusion_pytorch_model", unet.state_dict(), dict(unet.config))
    text_config = {**text_encoder.config.to_dict(), "architectures": ["CLIPTextModel"], "torch_dtype": "float32"}
    write_part(new / "text_encoder", "model", text_encoder_keys(text_encoder.state_dict()), text_config)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def text_encoder_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published names, below `text_model.`: transformers 5 leaves that out, and transformers 4 then loads noise."""
    named = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in state.items()}
    return {name: value for name, value in named.items() if not name.endswith("position_ids")}


def write_part(folder: Path, stem: str, state: dict[str, torch.Tensor], config: dict) -> None:
    name = "config.json"
    write_json(folder / name, {key: value for key, value in config.items() if key not in NOT_CONFIG})
    halves = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in sorted(state.items())}
    save_file(halves, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
