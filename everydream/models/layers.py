"""Pieces that the UNet and the autoencoder share. Parameter names are those of the published files.

Shapes: B pictures, C channels, H × W; L tokens or pixels in a row, N heads, d = channels a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from everydream.errors import ConfigError

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdp(q_BNLd: Tensor, k_BNLd: Tensor, v_BNLd: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BNLd, k_BNLd, v_BNLd)


def sliced(q_BNLd: Tensor, k_BNLd: Tensor, v_BNLd: Tensor) -> Tensor:
    """Head by head: the least memory where torch has no fused kernel, and slow."""
    heads = zip(q_BNLd.split(1, 1), k_BNLd.split(1, 1), v_BNLd.split(1, 1), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in heads], dim=1)


def xformers_attention() -> Attend:
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise ConfigError(f"attn_type: xformers cannot be imported ({error}); install it, or set sdp") from None

    def attend(q_BNLd: Tensor, k_BNLd: Tensor, v_BNLd: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BNLd, k_BNLd, v_BNLd))
        return memory_efficient_attention(q, k, v).transpose(1, 2)

    return attend


ATTENTION: dict[str, Callable[[], Attend]] = {
    "sdp": lambda: sdp,
    "slice": lambda: sliced,
    "xformers": xformers_attention,
}


class Attention(nn.Module):
    """Of a picture to itself, or to the text where `text_width` is given (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int, text_width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.attend: Attend = sdp
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(text_width or width, width, bias=bias)
        self.to_v = nn.Linear(text_width or width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x_BLC: Tensor, source_BLD: Tensor | None = None) -> Tensor:
        source_BLD = x_BLC if source_BLD is None else source_BLD
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.to_q(x_BLC), self.to_k(source_BLD), self.to_v(source_BLD))
        )
        return self.to_out[0](self.attend(q, k, v).transpose(1, 2).flatten(-2))


class GroupNorm(nn.GroupNorm):
    """Its result in its input's dtype: on a card autocast computes norms in float32, and what follows would be too.

    Not computed in bf16 itself: its weights and moments there cost gradients two thirds more error (docs/decisions.md).
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(x_BCHW).to(x_BCHW.dtype)


class LayerNorm(nn.LayerNorm):
    """Under autocast in its input's dtype, as the layers around it: on a card autocast itself takes float32, for the
    result and what is kept for backward too. Its kernels add up in float32. A CPU's autocast leaves norms alone."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        if x_BLC.device.type == "cpu" or not torch.is_autocast_enabled(x_BLC.device.type):
            return super().forward(x_BLC)
        with torch.autocast(x_BLC.device.type, enabled=False):
            weight, bias = self.weight.to(x_BLC.dtype), self.bias.to(x_BLC.dtype)
            return F.layer_norm(x_BLC, self.normalized_shape, weight, bias, self.eps)


class ResnetBlock(nn.Module):
    """Two convolutions and the way around them; the UNet's are told the time (Ho et al. 2020, appendix B)."""

    def __init__(self, inputs: int, outputs: int, *, groups: int, eps: float, time_width: int | None = None) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs, eps=eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, outputs)
        self.norm2 = GroupNorm(groups, outputs, eps=eps)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x_BCHW: Tensor, time_BT: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCHW)))
        if time_BT is not None:
            h = h + self.time_emb_proj(F.silu(time_BT))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW)) + h


class Downsample(nn.Module):
    """Half the size. The autoencoder pads on the right and below only."""

    def __init__(self, width: int, *, pads_all_sides: bool) -> None:
        super().__init__()
        self.pads_all_sides = pads_all_sides
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1 if pads_all_sides else 0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW if self.pads_all_sides else F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


def refuse_unknown(config: Mapping[str, object], plain: Mapping[str, object], part: str) -> None:
    """Raises ConfigError where config.json asks for a variant that is not built here."""
    problems = [
        f"base_model: {part}/config.json: {key} {config[key]!r} is not supported (only {value!r})"
        for key, value in plain.items()
        if key in config and config[key] != value
    ]
    if problems:
        raise ConfigError(problems)
