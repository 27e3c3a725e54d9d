"""Muon for matrices, AdamW for everything else, as one optimizer.

torch.optim.Muon takes 2-D weights only. In Stable Diffusion these are the attention and feed-forward layers (about
half of the UNet, all of the text encoder but its norms); embeddings are 2-D too, but a row of theirs is a token's own
vector, which orthogonalising across tokens would mix: they go to AdamW, as do convolutions (4-D), norms and biases.
Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from everydream.optim.composite import Composite
from everydream.optim.groups import takes_muon


class MuonWithAdamW(Composite):
    """`lr` and `weight_decay` hold for both; `betas`, `eps` are AdamW's; the rest is Muon's (defaults: torch's)."""

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        fused: bool = False,
    ) -> None:
        groups = list(params)
        matrices = _where(groups, lambda p: takes_muon(p.shape))
        others = _where(groups, lambda p: not takes_muon(p.shape))
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=lr,
                    weight_decay=weight_decay,
                    momentum=momentum,
                    nesterov=nesterov,
                    ns_coefficients=ns_coefficients,
                    ns_steps=ns_steps,
                    adjust_lr_fn=adjust_lr_fn,
                )
            )
        if others:
            parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused))
        super().__init__(parts)


def _where(groups: Sequence[dict[str, Any]], wanted: Callable[[torch.Tensor], bool]) -> list[dict[str, Any]]:
    chosen = [{**group, "params": [p for p in group["params"] if wanted(p)]} for group in groups]
    return [group for group in chosen if group["params"]]
