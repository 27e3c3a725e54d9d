"""A regression small enough for a test, with every kind of weight that Stable Diffusion has.

A convolution, a norm, matrices on both sides of bitsandbytes' 4,096 elements, biases.
"""

from __future__ import annotations

import torch

from everydream.optim import factory, groups


class Net(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 128, 3, padding=1)  # 4,608 elements, 4-D
        self.norm = torch.nn.GroupNorm(4, 128)
        self.wide = torch.nn.Linear(128, 64)  # 8,192 elements
        self.narrow = torch.nn.Linear(64, 4)  # 256 elements
        # Weights of the size that Stable Diffusion's have, so that an lr in the tests means what it means there.
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.ndim > 1:
                    p.normal_(std=p[0].numel() ** -0.5, generator=rng)
                elif "bias" in name:
                    p.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.nn.functional.silu(self.wide(self.norm(self.conv(x)).mean((2, 3)))))


def data(seed: int = 1, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [32, 4, 8, 8] and targets [32, 4]: another such network's answers."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 4, 8, 8, generator=rng)
    with torch.no_grad():
        y = 3 * Net(seed=100)(x)
    return x.to(device), y.to(device)


def part(net: torch.nn.Module, **options: object) -> list[groups.Group]:
    return groups.split(net.named_parameters(), "unet", **options)  # type: ignore[arg-type]


def optimizer_of(net: torch.nn.Module, name: str, **options: object) -> torch.optim.Optimizer:
    device = next(net.parameters()).device
    return factory.make(name, part(net), device=device, **options)  # type: ignore[arg-type]


def train(
    net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, batch: tuple[torch.Tensor, torch.Tensor]
) -> list[float]:
    """The loss before each step."""
    x, y = batch
    dtype = next(net.parameters()).dtype
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(net(x.to(dtype)).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name].float() - b[name].float()).abs().max()}"
