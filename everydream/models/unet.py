"""Stable Diffusion's UNet (Rombach et al. 2022, section 3.3 and appendix E), built from the published config.json.

Written here rather than imported: diffusers' module takes 4 to 6 s to import (quantizers, every transformer it knows).
Parameter names are the published ones, results and gradients diffusers' own to the last bit; tests compare them.
Shapes: B pictures, C channels, H × W latent pixels; text L tokens × D; time T numbers wide.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from everydream.errors import ConfigError
from everydream.models.layers import (
    Attend,
    Attention,
    Downsample,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    Upsample,
    refuse_unknown,
)

# What Stable Diffusion 1 and 2 have; any other value would be another network.
PLAIN = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_scale_factor": 1,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, time_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, time_width)
        self.linear_2 = nn.Linear(time_width, time_width)

    def forward(self, waves_BC: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(waves_BC)))


class GEGLU(nn.Module):
    """Shazeer 2020, "GLU variants improve transformer"."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner * 2)

    def forward(self, x_BLC: Tensor) -> Tensor:
        x_BLC, gate = self.proj(x_BLC).chunk(2, dim=-1)
        return x_BLC * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # Place 1 is the published files' dropout, which has no weights.
        self.net = nn.ModuleList([GEGLU(width, width * 4), nn.Identity(), nn.Linear(width * 4, width)])

    def forward(self, x_BLC: Tensor) -> Tensor:
        return self.net[2](self.net[0](x_BLC))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, text_width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = Attention(width, heads)
        self.norm2 = LayerNorm(width)
        self.attn2 = Attention(width, heads, text_width)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x_BLC: Tensor, text_BLD: Tensor) -> Tensor:
        x_BLC = self.attn1(self.norm1(x_BLC)) + x_BLC
        x_BLC = self.attn2(self.norm2(x_BLC), text_BLD) + x_BLC
        return self.ff(self.norm3(x_BLC)) + x_BLC


class Transformer(nn.Module):
    """Picture pixels as a row of tokens, and back. Stable Diffusion 2 projects them linearly, 1 by 1×1 convolutions."""

    def __init__(self, width: int, heads: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.is_linear = config.get("use_linear_projection", False)
        self.norm = GroupNorm(config.get("norm_num_groups", 32), width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if self.is_linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, heads, config["cross_attention_dim"])])
        self.proj_out = nn.Linear(width, width) if self.is_linear else nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW: Tensor, text_BLD: Tensor) -> Tensor:
        h = self.norm(x_BCHW)
        h = self.proj_in(_rows(h)) if self.is_linear else _rows(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, text_BLD)
        return (_picture(self.proj_out(h), x_BCHW) if self.is_linear else self.proj_out(_picture(h, x_BCHW))) + x_BCHW


def _rows(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(2).transpose(1, 2)


def _picture(x_BLC: Tensor, like_BCHW: Tensor) -> Tensor:
    """Of the same size as another picture, and laid out in memory as that one is: rows are channels last already."""
    x_BCHW = x_BLC.transpose(1, 2).unflatten(2, like_BCHW.shape[2:])
    return x_BCHW if like_BCHW.is_contiguous(memory_format=torch.channels_last) else x_BCHW.contiguous()


def call(layer: nn.Module, *inputs: Tensor) -> Tensor:
    return layer(*inputs)


def call_again_in_backward(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """Gradient checkpointing (Chen et al. 2016): only the layer's input is kept, the rest is computed twice.

    No layer draws (no dropout), so that the generators' states, a read from the card each, need not be kept.
    """
    return (
        checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else layer(*inputs)
    )


class Block(nn.Module):
    """Resnets of one size, each followed by a transformer if the block has `heads`."""

    def __init__(
        self, inputs: Sequence[int], width: int, *, heads: int | None, transformers: int, config: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.call = call
        shape = {"groups": config.get("norm_num_groups", 32), "eps": config.get("norm_eps", 1e-5)}
        time_width = 4 * config["block_out_channels"][0]
        self.resnets = nn.ModuleList([ResnetBlock(i, width, time_width=time_width, **shape) for i in inputs])
        count = 0 if heads is None else transformers
        self.attentions = nn.ModuleList([Transformer(width, heads or 1, config) for _ in range(count)])

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module | None]]:
        return itertools.zip_longest(self.resnets, self.attentions)


class DownBlock(Block):
    downsamplers: nn.ModuleList

    def forward(self, x_BCHW: Tensor, time_BT: Tensor, text_BLD: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet, attention in self.layers():
            x_BCHW = self.call(resnet, x_BCHW, time_BT)
            if attention is not None:
                x_BCHW = self.call(attention, x_BCHW, text_BLD)
            skips.append(x_BCHW)
        for downsampler in self.downsamplers:
            x_BCHW = downsampler(x_BCHW)
            skips.append(x_BCHW)
        return x_BCHW


class MidBlock(Block):
    def forward(self, x_BCHW: Tensor, time_BT: Tensor, text_BLD: Tensor) -> Tensor:
        for resnet, attention in self.layers():
            x_BCHW = self.call(resnet, x_BCHW, time_BT)
            if attention is not None:
                x_BCHW = self.call(attention, x_BCHW, text_BLD)
        return x_BCHW


class UpBlock(Block):
    upsamplers: nn.ModuleList

    def forward(self, x_BCHW: Tensor, time_BT: Tensor, text_BLD: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet, attention in self.layers():
            x_BCHW = self.call(resnet, torch.cat([x_BCHW, skips.pop()], dim=1), time_BT)
            if attention is not None:
                x_BCHW = self.call(attention, x_BCHW, text_BLD)
        for upsampler in self.upsamplers:
            x_BCHW = upsampler(x_BCHW)
        return x_BCHW


class UNet(nn.Module):
    """noisy latents, timesteps, text → prediction. Raises ConfigError for a config that is another network's."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        refuse_unknown(config, PLAIN, "unet")
        down_types, up_types = config["down_block_types"], config["up_block_types"]
        unknown = {*down_types, *up_types} - BLOCKS
        if unknown:
            raise ConfigError(f"base_model: unet/config.json: blocks {', '.join(sorted(unknown))} are not supported")
        widths: list[int] = config["block_out_channels"]
        heads = config.get("attention_head_dim", 8)  # so called in the published files; it is the number of heads
        heads = heads if isinstance(heads, list) else [heads] * len(widths)
        layers, last = config["layers_per_block"], len(widths) - 1
        self.is_cosine_first = config.get("flip_sin_to_cos", True)
        self.frequency_shift = config.get("freq_shift", 0)

        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]
        for b, width in enumerate(widths):
            inputs = [widths[max(b - 1, 0)], *[width] * (layers - 1)]
            has_text = "CrossAttn" in down_types[b]
            block = DownBlock(inputs, width, heads=heads[b] if has_text else None, transformers=layers, config=config)
            block.downsamplers = nn.ModuleList([Downsample(width, pads_all_sides=True)] if b < last else [])
            self.down_blocks.append(block)
            skips += [width] * (layers + (b < last))
        self.mid_block = MidBlock([widths[-1]] * 2, widths[-1], heads=heads[-1], transformers=1, config=config)
        self.up_blocks = nn.ModuleList()
        below = widths[-1]
        for b, width in enumerate(reversed(widths)):
            inputs = [(below if i == 0 else width) + skips.pop() for i in range(layers + 1)]
            has_text = "CrossAttn" in up_types[b]
            up = UpBlock(
                inputs, width, heads=heads[last - b] if has_text else None, transformers=layers + 1, config=config
            )
            up.upsamplers = nn.ModuleList([Upsample(width)] if b < last else [])
            self.up_blocks.append(up)
            below = width
        groups, eps = config.get("norm_num_groups", 32), config.get("norm_eps", 1e-5)
        self.conv_norm_out = GroupNorm(groups, widths[0], eps=eps)
        self.conv_out = nn.Conv2d(widths[0], config["out_channels"], 3, padding=1)

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Height and width of the latents must divide by 2 for every block but the last."""
        time_BT = self.time_embedding(self.waves(t_B).to(self.conv_in.weight.dtype))
        x = self.conv_in(noisy_BCHW)
        skips = [x]
        for block in self.down_blocks:
            x = block(x, time_BT, text_BLD, skips)
        x = self.mid_block(x, time_BT, text_BLD)
        for block in self.up_blocks:
            x = block(x, time_BT, text_BLD, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def waves(self, t_B: Tensor) -> Tensor:
        """Sinusoids of the timestep (Vaswani et al. 2017, section 3.5), float32 [B, width of the first block]."""
        half = self.conv_in.out_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) * -math.log(10000.0)
        angles = t_B[:, None].float() * torch.exp(exponents / (half - self.frequency_shift))[None]
        first, second = (angles.cos(), angles.sin()) if self.is_cosine_first else (angles.sin(), angles.cos())
        return torch.cat([first, second], dim=-1)

    def save_memory(self) -> None:
        """Gradient checkpointing, layer by layer."""
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            block.call = call_again_in_backward

    def set_attention(self, attend: Attend) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = attend
