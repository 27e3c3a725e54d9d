"""A tiny Stable Diffusion model with random weights, and tiny pictures: what most tests run on.

`make_tiny_model(folder)` writes a diffusers folder in the form in which Stable Diffusion 1.5 was published, whatever
library version is installed. Weights depend on the seed and the tensor's name only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everydream.draws import generator

DTYPES = ("float32", "float16", "bfloat16")
# Pairs merged into one token, most frequent first, so that some words are one token and others many.
MERGES = ("t h", "th e</w>", "r e", "re d</w>", "s t", "a r</w>", "st ar</w>", "s k", "sk s</w>", "o n</w>", "i n")


def make_tiny_model(
    folder: Path | str,
    *,
    prediction_type: str = "epsilon",
    openclip: bool = False,
    vae_factor: int = 4,
    dtype: str = "float32",
    position_ids: bool = False,
    seed: int = 0,
) -> Path:
    """Writes the model's folder and returns it: 64 px (16×16 latents at VAE factor 4), UNet factor 2, text 3 layers.

    openclip: the shapes that set Stable Diffusion 2 apart (GELU text encoder, linear projections, heads by block).
    vae_factor: 4 or 8. dtype: of the weights in the files. position_ids: the text encoder's file carries that integer
    tensor too, as the published one does.
    """
    assert vae_factor in (4, 8) and dtype in DTYPES, (vae_factor, dtype)
    folder = Path(folder)
    vocabulary = _vocabulary()
    unet, vae = _unet_config(openclip, 64 // vae_factor), _vae_config(vae_factor)
    text = _text_config(openclip, len(vocabulary))
    _write_json(folder / "model_index.json", _model_index())
    _write_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(prediction_type))
    _write_json(folder / "unet" / "config.json", unet)
    _write_json(folder / "vae" / "config.json", vae)
    _write_json(folder / "text_encoder" / "config.json", text)
    _write_tokenizer(folder / "tokenizer", vocabulary, pad="!" if openclip else "<|endoftext|>")
    shapes = _shapes(unet, vae, text)
    _write_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", shapes["unet"], dtype, seed)
    _write_weights(folder / "vae" / "diffusion_pytorch_model.safetensors", shapes["vae"], dtype, seed)
    _write_weights(folder / "text_encoder" / "model.safetensors", shapes["text_encoder"], dtype, seed, position_ids)
    return folder


def make_pictures(
    folder: Path | str,
    n: int,
    *,
    size: int | tuple[int, int] | Sequence[tuple[int, int]] = 64,
    captions: str | Sequence[str] | None = None,
    suffix: str = ".png",
    seed: int = 0,
) -> list[Path]:
    """Writes n smooth random pictures `picture_000.png`, … and returns their paths.

    size: a side, (width, height), or a list of those, used in turn. captions: sidecars `.txt`, a list is used in turn,
    `{i}` becomes the picture's number; None writes none.
    """
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(size, size)] if isinstance(size, int) else [size] if isinstance(size[0], int) else list(size)
    texts = [captions] if isinstance(captions, str) else list(captions or [])
    paths = []
    for i in range(n):
        rng = generator(seed, "tiny picture", i)
        coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        path = folder / f"picture_{i:03d}{suffix}"
        Image.fromarray(coarse).resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC).save(path)
        if texts:
            path.with_suffix(".txt").write_text(texts[i % len(texts)].replace("{i}", str(i)), encoding="utf-8")
        paths.append(path)
    return paths


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _model_index() -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.24.0",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _scheduler_config(prediction_type: str) -> dict[str, Any]:
    return {
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.24.0",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }


def _unet_config(openclip: bool, sample_size: int) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.24.0",
        "act_fn": "silu",
        "attention_head_dim": [2, 4] if openclip else 2,
        "block_out_channels": [8, 16],
        "center_input_sample": False,
        "cross_attention_dim": 16,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": sample_size,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "use_linear_projection": openclip,
    }


def _vae_config(factor: int) -> dict[str, Any]:
    widths = [8, 16, 16] if factor == 4 else [8, 16, 16, 16]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.24.0",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 64,
        "scaling_factor": 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def _text_config(openclip: bool, vocab_size: int) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": vocab_size - 2,
        "dropout": 0.0,
        "eos_token_id": vocab_size - 1,
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "hidden_size": 16,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "pad_token_id": 0 if openclip else vocab_size - 1,
        "projection_dim": 16,
        "torch_dtype": "float32",
        "vocab_size": vocab_size,
    }


def _vocabulary() -> dict[str, int]:
    """Every byte, every byte at a word's end, the merges, and the two marks: any text can be tokenised."""
    # Byte-level BPE writes the 188 printable bytes as themselves and the others as characters from U+0100 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(m.replace(" ", "") for m in MERGES)]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def _write_tokenizer(folder: Path, vocabulary: dict[str, int], pad: str) -> None:
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    start, end = (
        {"content": mark, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        for mark in ("<|startoftext|>", "<|endoftext|>")
    )
    _write_json(
        folder / "special_tokens_map.json",
        {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end},
    )
    start, end = ({"__type": "AddedToken", **mark} for mark in (start, end))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": start,
            "do_lower_case": True,
            "eos_token": end,
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "CLIPTokenizer",
            "unk_token": end,
        },
    )


def _shapes(unet: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The published names and shapes (tests/models/test_networks.py loads them into the libraries' modules)."""
    import torch

    from everydream.models.autoencoder import Autoencoder
    from everydream.models.clip import TextEncoder
    from everydream.models.tensors import NoInit
    from everydream.models.unet import UNet

    with NoInit(), torch.device("meta"):
        modules = {"unet": UNet(unet), "vae": Autoencoder(vae), "text_encoder": TextEncoder(text)}
    return {part: {name: tuple(p.shape) for name, p in m.named_parameters()} for part, m in modules.items()}


def _write_weights(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, seed: int, position_ids: bool = False
) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for name, shape in shapes.items():
        rng = generator(seed, "tiny weights", name)
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:  # norm weights near 1, biases near 0
            values = 0.1 * values + ("norm" in name.split(".")[-2] and name.endswith("weight"))
        elif "_embedding.weight" not in name:
            values /= math.sqrt(math.prod(shape[1:]))
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    if position_ids:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path, metadata={"format": "pt"})
