"""Peak memory of training beside what --dry_run says: python bench/memory.py [--size small sd15] [--device cuda]

The trainer itself, UNet only, cached latents and text, a few steps, each way in a process of its own. Measured on a
CPU: the process's largest resident size beyond what it had with all libraries and no model; on a card: the largest
allocation from the first step on. Said: weights, gradients, optimizer state and average, which are counted, and
activations, an estimate.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "batch 4": {"batch_size": 4},
    "gradient checkpointing": {"gradient_checkpointing": "true"},
    "batch 4, gradient checkpointing": {"batch_size": 4, "gradient_checkpointing": "true"},
    "average of weights": {"ema_decay_rate": 0.999},
    "adamw8bit": {"optimizer": "adamw8bit"},
    "adafactor": {"optimizer": "adafactor"},
    "fused backward": {"fused_backward": "true", "clip_grad_norm": "null"},
    "bf16 weights": {"weights_dtype": "bfloat16"},
    "bf16 weights, fused backward": {"weights_dtype": "bfloat16", "fused_backward": "true", "clip_grad_norm": "null"},
    "bf16 weights, fused backward, adamw8bit, checkpointing": {
        "weights_dtype": "bfloat16",
        "fused_backward": "true",
        "clip_grad_norm": "null",
        "optimizer": "adamw8bit",
        "gradient_checkpointing": "true",
    },
}
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["small"], help="demo, small (55M, 256 px), sd15, sd21")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), metavar="WAY")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak(options.one)))
        return
    rows = []
    print("| model | way | counted MB | activations, estimated | together | measured | measured / said |")
    print("|" + " --- |" * 7)
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            for name in options.only or WAYS:
                row = {"size": size, "way": name, **measure(size, WAYS[name], options.device, Path(folder))}
                rows.append(row)
                counted, guessed, said = row["counted"] / 1e6, row["activations"] / 1e6, row["said"] / 1e6
                print(f"| {size} | {name} | {counted:,.0f} | {guessed:,.0f} | {said:,.0f} | {row['peak'] / 1e6:,.0f} "
                      f"| {row['peak'] / row['said']:.2f} |", flush=True)  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"device": options.device, "rows": rows}, indent=1) + "\n")


def measure(size: str, way: Mapping[str, Any], device: str, folder: Path) -> dict[str, float]:
    import speed
    from models import model_of

    model, resolution = model_of(size, folder)
    pictures = speed.pictures_of(folder, resolution)
    settings = dict(way)
    optimizer = folder / "optimizer.json"
    optimizer.write_text(json.dumps({"optimizer": settings.pop("optimizer", "adamw"), "lr": 1e-6}))
    batch = settings.pop("batch_size", 1)
    settings["optimizer_config"] = optimizer
    variables = {**speed.environment(), **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})}
    with tempfile.TemporaryDirectory(dir=folder) as logs:
        words = speed.words(model, pictures, Path(logs) / "logs", batch, STEPS, settings)
        command = [sys.executable, __file__, "--one", *words]
        for _ in range(2):  # the first makes the caches
            made = subprocess.run(command, env=variables, capture_output=True, text=True)
            if made.returncode:
                raise SystemExit(made.stderr)
    return json.loads(made.stdout.splitlines()[-1])


def peak(argv: list[str]) -> dict[str, float]:
    import os

    import psutil
    import torch

    from everydream.config.compare import changes
    from everydream.config.resolve import resolve
    from everydream.runtime import StopRequest
    from everydream.training.build import Build
    from everydream.training.console import Console
    from everydream.training.plan_text import activation_bytes, counted_bytes
    from everydream.training.prepare import Prepared
    from everydream.training.trainer import train

    prepared = Prepared(resolve(argv, os.environ), changes, StopRequest(), Console("quiet"))
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)  # what is imported late is not the model's
    before = psutil.Process().memory_info().rss
    counted = sum(count or 0 for rows in counted_bytes(prepared).values() for count in rows.values())
    activations = activation_bytes(prepared)
    build = Build(prepared)
    train(build.trainer())
    most = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    )
    build.close(0, "measured")
    return {"counted": counted, "activations": activations, "said": counted + activations, "peak": most}


if __name__ == "__main__":
    main()
