"""CLIP's text encoder (Radford et al. 2021), with the published parameter names whatever transformers version is there.

Shapes: B captions, K chunks of L tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from everydream.errors import ConfigError


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    def __init__(self, vocabulary: int, positions: int, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return self.token_embedding(tokens_BL) + self.position_embedding.weight[: tokens_BL.shape[1]]


class Attention(nn.Module):
    """Each token sees itself and those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = (
            project(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BHLd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out_BHLd.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x_BLD)))


class Layer(nn.Module):
    def __init__(self, config: Mapping[str, Any], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        self.self_attn = Attention(width, config["num_attention_heads"])
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, config["intermediate_size"], activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD))
        return x_BLD + self.mlp(self.layer_norm2(x_BLD))


class Encoder(nn.Module):
    def __init__(self, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TextModel(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        activation = ACTIVATIONS.get(config.get("hidden_act", "quick_gelu"))
        if activation is None:
            raise ConfigError(f"base_model: the text encoder's hidden_act {config['hidden_act']!r} is not known")
        width = config["hidden_size"]
        self.embeddings = Embeddings(config["vocab_size"], config.get("max_position_embeddings", 77), width)
        self.encoder = Encoder([Layer(config, activation) for _ in range(config["num_hidden_layers"])])
        self.final_layer_norm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-5))


class TextEncoder(nn.Module):
    """tokens_BKL → text_B(K·L)D: each chunk by itself, then one after the other.

    clip_skip leaves out that many layers at the end; the final norm still comes last, as in diffusers' pipelines.
    """

    def __init__(self, config: Mapping[str, Any], clip_skip: int = 0) -> None:
        super().__init__()
        if not 0 <= clip_skip < config["num_hidden_layers"]:
            raise ConfigError(f"clip_skip: {clip_skip} leaves none of the {config['num_hidden_layers']} layers")
        self.text_model = TextModel(config)
        self.clip_skip = clip_skip
        self.gradient_checkpointing = False

    @property
    def used_layers(self) -> int:
        return len(self.text_model.encoder.layers) - self.clip_skip

    def forward(self, tokens_BKL: Tensor) -> Tensor:
        x = self.text_model.embeddings(tokens_BKL.flatten(0, 1))
        for layer in self.text_model.encoder.layers[: self.used_layers]:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)  # no layer draws
            else:
                x = layer(x)
        x = self.text_model.final_layer_norm(x)
        return x.view(tokens_BKL.shape[0], -1, x.shape[-1])
