"""Models with random weights, of sizes worth timing: what is in the weights does not change how long a step takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "demo" / "base_model"
# name → (resolution, UNet channels, text width, heads, text layers, VAE channels)
SIZES = {
    "small": (256, (80, 160, 320, 320), 192, 4, 4, (32, 64, 128, 128)),  # 55M: Stable Diffusion 1.5 a quarter as wide
    "sd15": (512, (320, 640, 1280, 1280), 768, 8, 12, (128, 256, 512, 512)),
    "sd21": (512, (320, 640, 1280, 1280), 1024, (5, 10, 20, 20), 23, (128, 256, 512, 512)),
}


def model_of(size: str, folder: Path) -> tuple[Path, int]:
    """(the model's folder, resolution in px); the demo's own, or one made in `folder`, once."""
    if size == "demo":
        return DEMO, 64
    resolution, channels, width, heads, layers, vae_channels = SIZES[size]
    target = folder / f"bench-{size}"
    if not (target / "model_index.json").is_file():
        shutil.rmtree(target, ignore_errors=True)
        _make(target, resolution, channels, width, heads, layers, vae_channels)
    return target, resolution


def _make(target, resolution, channels, width, heads, layers, vae_channels) -> None:  # type: ignore[no-untyped-def]
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=resolution // 8,
        block_out_channels=channels,
        cross_attention_dim=width,
        attention_head_dim=heads,
        norm_num_groups=16 if channels[0] % 32 else 32,
        use_linear_projection=not isinstance(heads, int),
    )
    unet.save_pretrained(target / "unet")  # type: ignore[attr-defined]
    vae = AutoencoderKL(
        block_out_channels=vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=resolution,
        scaling_factor=0.18215,
    )
    vae.save_pretrained(target / "vae")  # type: ignore[attr-defined]
    shutil.copytree(DEMO / "tokenizer", target / "tokenizer")
    shutil.copytree(DEMO / "scheduler", target / "scheduler")
    vocabulary = len(json.loads((target / "tokenizer" / "vocab.json").read_text()))
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=77,
            eos_token_id=vocabulary - 1,
        )
    )
    text.save_pretrained(target / "text_encoder")
    shutil.copy(DEMO / "model_index.json", target)  # last: a folder with it is whole
