"""What a step of each optimizer costs: python bench/optimizers.py [--size demo small] [--device cuda] [--json FILE]

ms a step and bytes of state a weight for each row of the table, on the UNet's shapes with random gradients, nothing
else. On a CPU: time of one thread, medians, so that other work on the machine does not count. Paths: plain; flat (one
buffer a group, see everydream/optim/flat.py); bf16 (bf16 weights, float32 step, stochastic rounding).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from everydream.optim import factory
from everydream.optim.clip import grad_holders, part_norms, scale_gradients
from everydream.optim.groups import Group, split
from everydream.optim.table import ROWS

PATHS = ("plain", "flat", "bf16")
# Stable Diffusion 1.5 at full width, and a quarter as wide (55M weights)
CHANNELS = {"small": ((80, 160, 320, 320), 192), "sd15": ((320, 640, 1280, 1280), 768)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["demo"], help="demo, small (55M), sd15 (860M)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--paths", nargs="+", default=list(PATHS))
    parser.add_argument("--steps", type=int, default=11, help="timed, after 2 that are not")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.size:
        shapes = shapes_of(size)
        print(f"{size}: {sum(map(math.prod, shapes)):,} weights in {len(shapes)} tensors, {options.device}")
        print(f"{'optimizer':20s} {'path':6s} {'ms a step':>10s} {'norm, clip':>10s} {'bytes a weight':>15s}")
        for name in options.rows:
            for path in options.paths:
                if takes(name, path, options.device):
                    row = measure(name, path, shapes, options.device, options.steps)
                    step, clip, state = row["ms"], row["clip_ms"], row["state_bytes"]
                    print(f"{name:20s} {path:6s} {step:10.2f} {clip:10.2f} {state:15.2f}", flush=True)
                    rows.append({"size": size, **row})
    if options.json:
        options.json.write_text(json.dumps({"device": device_name(options.device), "rows": rows}, indent=1) + "\n")


def shapes_of(size: str) -> list[tuple[int, ...]]:
    """Of the UNet's tensors."""
    if size == "demo":
        with open(ROOT / "examples/demo/base_model/unet/diffusion_pytorch_model.safetensors", "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return [tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"]
    from diffusers import UNet2DConditionModel

    channels, width = CHANNELS[size]
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=channels, cross_attention_dim=width, norm_num_groups=math.gcd(channels[0], 32)
        )
    return [tuple(p.shape) for p in unet.parameters()]  # type: ignore[attr-defined]


def takes(name: str, path: str, device: str) -> bool:
    row = ROWS[name]
    return {"plain": True, "flat": row.elementwise and device == "cpu", "bf16": row.may_round}[path]


def measure(name: str, path: str, shapes: list[tuple[int, ...]], device: str, steps: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if path == "bf16" else torch.float32
    rng = torch.Generator(device).manual_seed(0)
    parameters = [
        torch.nn.Parameter((0.02 * torch.randn(shape, device=device, generator=rng)).to(dtype)) for shape in shapes
    ]
    groups: list[Group] = split(((str(i), p) for i, p in enumerate(parameters)), "unet")
    optimizer = factory.make(
        name, groups, device=device, flat=path == "flat", rounding_seed=0 if path == "bf16" else None
    )
    optimizer.zero_grad()
    for p in parameters:
        gradient = 1e-4 * torch.randn(p.shape, device=device, generator=rng)
        if p.grad is None:
            p.grad = gradient.to(dtype)
        else:
            p.grad.copy_(gradient)
    parts = {"unet": grad_holders(optimizer)}

    def clip() -> None:
        part_norms(parts)
        scale_gradients(parts, 1.0)

    ms, clip_ms = milliseconds(optimizer.step, device, steps), milliseconds(clip, device, steps)
    # A tensor that many parameters share, as bitsandbytes' tables, counts once.
    state = {
        value.data_ptr(): value.numel() * value.element_size()
        for entries in optimizer.state.values()
        for value in entries.values()
        if torch.is_tensor(value)
    }
    return {
        "optimizer": name,
        "path": path,
        "ms": ms,
        "clip_ms": clip_ms,
        "state_bytes": sum(state.values()) / sum(map(math.prod, shapes)),
    }


def milliseconds(call: Callable[[], object], device: str, steps: int) -> float:
    times = []
    for _ in range(steps + 2):
        if device == "cpu":
            began = time.thread_time()
            call()
            times.append(1e3 * (time.thread_time() - began))
        else:
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[2:])


def device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.backends.cpu.get_cpu_capability()}, one thread"
    )


if __name__ == "__main__":
    main()
