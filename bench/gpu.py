"""Images a second on a CUDA card: python bench/gpu.py [--size sd15 sd21] [--batch 1 4 16 32] [--compile] [--json FILE]

Random-weight UNets of Stable Diffusion's sizes at 512 px, bf16. Four loops, in turns, medians over the rounds:
  bare     cached latents and text, forward, backward, clip, fused AdamW: nothing else
  usual    what the usual script does each step: VAE and text encoding, autocast, foreach AdamW, `.item()`
  trainer  ours, launched as users launch it, checkpoints and previews off
  8 bit    the same with adamw8bit, the default
--compile, or --compile max, is for bare and the trainer. Peaks are of training, what is made before it left out.
An image takes 2.41 TFLOP, forward and backward; the share is of this card's measured bf16 matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from models import model_of
from speed import LOG_STEP, PICTURES, environment, machine

TFLOP_AN_IMAGE = 2.41
WARM_UP = 10
LOOPS = ("bare", "usual")
COMPILE: dict[str, bool | str] = {"false": False, "true": True, "max": "max"}
TRAINERS = {"trainer": "adamw", "8 bit": "adamw8bit"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["sd15", "sd21"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--settings", nargs="*", default=[], help="more of the trainer's, as --key=value without --")
    parser.add_argument("--compile", nargs="?", choices=list(COMPILE), default="false", const="true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loop", nargs=4, metavar=("KIND", "MODEL", "RESOLUTION", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        kind, model, resolution, batch = options.loop
        print(json.dumps(loop(kind, Path(model), int(resolution), int(batch), options.steps, options.compile)))
        return
    peak = matmul_peak()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            model, resolution = model_of(size, Path(folder))
            for batch in options.batch:
                found: dict[str, list[dict[str, float]]] = {kind: [] for kind in (*LOOPS, *TRAINERS)}
                for number in range(options.rounds):
                    for kind in LOOPS:
                        found[kind].append(child(kind, model, resolution, batch, options.steps, options.compile))
                    for kind, optimizer in TRAINERS.items():
                        logs = Path(folder) / f"logs-{size}-{batch}-{optimizer}-{number}"
                        settings = [f"compile={options.compile}", *options.settings]
                        found[kind].append(trainer(model, resolution, logs, batch, options.steps, optimizer, settings))
                rows += [row(size, batch, kind, rounds, peak) for kind, rounds in found.items()]
                print_rows(rows[-len(found) :])
    if options.json:
        found_here = {"machine": card(peak), "compile": options.compile, "rows": rows}
        options.json.write_text(json.dumps(found_here, indent=1) + "\n")


def row(size: str, batch: int, kind: str, rounds: list[dict[str, float]], peak: float) -> dict[str, Any]:
    images = statistics.median(one["images_per_s"] for one in rounds)
    return {
        "size": size,
        "batch": batch,
        "loop": kind,
        "images_per_s": images,
        "share_of_peak": images * TFLOP_AN_IMAGE / peak,
        "peak_bytes": max(one["peak_bytes"] for one in rounds),
    }


def print_rows(rows: list[dict[str, Any]]) -> None:
    for one in rows:
        print(
            f"| {one['size']} | {one['batch']} | {one['loop']} | {one['images_per_s']:.1f} images/s "
            f"| {one['share_of_peak']:.1%} | {one['peak_bytes'] / 1e9:.1f} GB |",
            flush=True,
        )


def child(kind: str, model: Path, resolution: int, batch: int, steps: int, compiled: str) -> dict[str, float]:
    words = ["--steps", str(steps), "--compile", compiled, "--loop", kind, str(model), str(resolution), str(batch)]
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        if "OutOfMemoryError" in done.stderr:
            return {"images_per_s": float("nan"), "peak_bytes": float("nan")}
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def loop(kind: str, model: Path, resolution: int, batch: int, steps: int, compiled: str) -> dict[str, float]:
    import torch

    from everydream.diffusion.paths import NoisePath
    from everydream.models.family import load, read_facts

    torch.manual_seed(0)
    is_bare = kind == "bare"
    facts = read_facts(str(model))
    family = load(facts, train=("unet",), device="cuda")
    family.enable(
        gradient_checkpointing=False,
        attn_type="sdp",
        compile=is_bare and COMPILE[compiled],
        channels_last=is_bare,
        one_backward=True,
    )
    side = resolution // facts.vae_factor
    latents_NCHW = torch.randn(PICTURES, facts.latent_channels, side, side, device="cuda")
    pixels_NCHW = torch.randint(0, 256, (PICTURES, 3, resolution, resolution), dtype=torch.uint8, device="cuda")
    tokens_NKL = torch.from_numpy(family.tokenize(["a thing"] * PICTURES, 1)).cuda()
    text_NLD = family.encode_text(tokens_NKL)
    if is_bare:
        family.drop_text_encoder()
    path = NoisePath.from_scheduler_config(facts.scheduler_config).to("cuda")
    parameters = list(family.parameters_of("unet").values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=is_bare, foreach=not is_bare)
    denoiser = family.denoiser.train()
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        at = torch.arange(step * batch, (step + 1) * batch, device="cuda") % PICTURES
        if is_bare:
            latents_BCHW, text_BLD = latents_NCHW[at], text_NLD[at]
        else:
            mean_BCHW, std_BCHW = family.encode_pixels(pixels_NCHW[at])
            latents_BCHW = family.latents(mean_BCHW, std_BCHW, torch.randn_like(mean_BCHW))
            text_BLD = family.encode_text(tokens_NKL[at])
        noise_BCHW = torch.randn_like(latents_BCHW)
        t_B = torch.randint(0, 1000, (batch,), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            prediction_BCHW = denoiser(path.add_noise(latents_BCHW, noise_BCHW, t_B), t_B, text_BLD)
        loss = torch.nn.functional.mse_loss(prediction_BCHW.float(), noise_BCHW)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not is_bare:
            loss.item()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"images_per_s": steps * batch / seconds, "peak_bytes": float(torch.cuda.max_memory_allocated())}


def trainer(
    model: Path, resolution: int, logs: Path, batch: int, steps: int, optimizer: str, settings: list[str]
) -> dict[str, float]:
    from tests.tiny import make_pictures

    pictures = logs.parent / f"pictures-{resolution}"
    if not pictures.is_dir():
        make_pictures(pictures, PICTURES, size=resolution, captions="a thing, number {i}")
    optimizer_file = logs.parent / f"{optimizer}.json"
    optimizer_file.write_text(json.dumps({"optimizer": optimizer, "lr": 1e-6}))
    words = (
        f"--base_model {model} --data_root {pictures} --logdir {logs} --cache_dir {logs.parent / 'cache'} "
        f"--optimizer_config {optimizer_file} --batch_size {batch} --max_steps {steps + 2 * LOG_STEP} "
        f"--log_step {LOG_STEP} --clip_grad_norm 1.0 --mixed_precision bf16 --disable_textenc_training "
        "--cond_dropout 0 --save_every_n_epochs 0 --save_single_file false --tensorboard false --quiet"
    ).split()
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", "--num_processes", "1"]
    command = [*launch, str(ROOT / "scripts" / "train.py"), *words, *(f"--{word}" for word in settings)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    (metrics,) = logs.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][1:-1]
    seconds = sum(LOG_STEP * batch / line["images_per_s"] for line in lines)
    return {
        "images_per_s": LOG_STEP * batch * len(lines) / seconds,
        "peak_bytes": float(max(line["memory_bytes"] for line in lines)),
    }


def matmul_peak() -> float:
    """TFLOP/s of a bf16 product of 8192² matrices, the best of several runs."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            a @ a
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192**3 / (time.perf_counter() - began) / 1e12)
    return best


def card(peak: float) -> dict[str, Any]:
    import torch

    return {**machine(), "card": torch.cuda.get_device_name(), "bf16_tflops": peak}


if __name__ == "__main__":
    main()
