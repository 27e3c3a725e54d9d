"""Peak memory of an update with and without fused backward: python bench/update_memory.py [--size demo small sd15]

UNet alone, batch 1, no checkpointing; each path in a process of its own. On a CPU: the process's largest resident size
beyond what it had before the model; on a card: the largest allocation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PATHS = {  # name → (bf16 weights, fused backward)
    "float32": (False, False),
    "float32, fused backward": (False, True),
    "bf16": (True, False),
    "bf16, fused backward": (True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["demo", "small"], help="demo, small (54M), sd15 (860M)")
    parser.add_argument("--optimizer", nargs="+", default=["adamw"])
    parser.add_argument("--latent", type=int, default=16, help="side of the latents")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("SIZE", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(peak(*options.one, options.optimizer[0], options.latent, options.device))
        return
    rows = []
    for size in options.size:
        for name in options.optimizer:
            for path in PATHS:
                command = [sys.executable, __file__, "--one", size, path, "--optimizer", name]
                command += ["--latent", str(options.latent), "--device", options.device]
                bytes_ = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                print(f"{size:6s} {name:20s} {path:24s} {bytes_ / 1e6:8.1f} MB", flush=True)
                rows.append({"size": size, "optimizer": name, "path": path, "bytes": bytes_})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def peak(size: str, path: str, name: str, latent: int, device: str) -> int:
    import torch
    from diffusers import UNet2DConditionModel
    from optimizers import CHANNELS, split

    from everydream.optim import factory
    from everydream.optim.fused import FusedBackward

    torch.set_num_threads(1)
    is_bf16, is_fused = PATHS[path]
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)  # what is imported late is not the model's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.device(device):
        if size == "demo":
            config = json.loads((ROOT / "examples/demo/base_model/unet/config.json").read_text())
        else:
            channels, width = CHANNELS[size]
            config = {"block_out_channels": channels, "cross_attention_dim": width, "norm_num_groups": 16}
        unet = UNet2DConditionModel.from_config(config)
        unet.to(torch.bfloat16 if is_bf16 else torch.float32)
    groups = split(unet.named_parameters(), "unet")
    optimizer = factory.make(name, groups, device=device, rounding_seed=0 if is_bf16 else None)
    fused = FusedBackward({"unet": optimizer}, {"unet": list(unet.parameters())}) if is_fused else None
    dtype = next(unet.parameters()).dtype
    x = torch.randn(1, 4, latent, latent, device=device, dtype=dtype)
    text = torch.randn(1, 77, unet.config["cross_attention_dim"], device=device, dtype=dtype)
    for _ in range(3):
        optimizer.zero_grad()
        if fused:
            fused.begin()
        unet(x, torch.tensor([500], device=device), text).sample.float().square().mean().backward()
        if not fused:
            optimizer.step()
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


if __name__ == "__main__":
    main()
