"""Stable Diffusion's autoencoder (Rombach et al. 2022, appendix G), built from the published config.json.

Shapes: B pictures, C channels, H × W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everydream.errors import ConfigError
from everydream.models.layers import Attention, Downsample, ResnetBlock, Upsample, refuse_unknown

PLAIN = {
    "act_fn": "silu",
    "in_channels": 3,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
EPS = 1e-6


class PictureAttention(nn.Module):
    """One head over all pixels."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
        inner = Attention(width, heads=1, bias=True)
        self.to_q, self.to_k, self.to_v, self.to_out = inner.to_q, inner.to_k, inner.to_v, inner.to_out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BLC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        q, k, v = (project(x_BLC).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        out_BLC = self.to_out[0](F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return out_BLC.transpose(1, 2).unflatten(2, x_BCHW.shape[-2:]) + x_BCHW


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([PictureAttention(width, groups)])
        self.resnets = nn.ModuleList([ResnetBlock(width, width, groups=groups, eps=EPS) for _ in range(2)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x_BCHW)))


class Block(nn.Module):
    """Resnets of one size, then the change of size, if any (`downsamplers` or `upsamplers`, as the files call them)."""

    def __init__(self, inputs: int, width: int, layers: int, groups: int) -> None:
        super().__init__()
        widths = [inputs, *[width] * (layers - 1)]
        self.resnets = nn.ModuleList([ResnetBlock(w, width, groups=groups, eps=EPS) for w in widths])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in (*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, groups, layers = config["block_out_channels"], config["norm_num_groups"], config["layers_per_block"]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for b, width in enumerate(widths):
            block = Block(widths[max(b - 1, 0)], width, layers, groups)
            if b + 1 < len(widths):
                block.downsamplers = nn.ModuleList([Downsample(width, pads_all_sides=False)])
            self.down_blocks.append(block)
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = self.conv_in(pixels_BCHW)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, groups, layers = config["block_out_channels"], config["norm_num_groups"], config["layers_per_block"]
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[-1], 3, padding=1)
        self.mid_block = MidBlock(widths[-1], groups)
        self.up_blocks = nn.ModuleList()
        for b in reversed(range(len(widths))):
            block = Block(widths[min(b + 1, len(widths) - 1)], widths[b], layers + 1, groups)
            if b > 0:
                block.upsamplers = nn.ModuleList([Upsample(widths[b])])
            self.up_blocks.append(block)
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(latents_BCHW))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """Raises ConfigError for a config that is another network's."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        refuse_unknown(config, PLAIN, "vae")
        kinds = {*config["down_block_types"], *config["up_block_types"]}
        if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D"}:
            raise ConfigError(f"base_model: vae/config.json: blocks {', '.join(sorted(kinds))} are not supported")
        channels = config["latent_channels"]
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in ±1 → mean and standard deviation of the raw latents."""
        mean_BCHW, log_variance_BCHW = self.quant_conv(self.encoder(pixels_BCHW)).chunk(2, dim=1)
        return mean_BCHW, torch.exp(0.5 * log_variance_BCHW.clamp(-30.0, 20.0))

    def decode(self, raw_BCHW: Tensor) -> Tensor:
        """Raw latents → pixels in about ±1."""
        return self.decoder(self.post_quant_conv(raw_BCHW))
