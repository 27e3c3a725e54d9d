"""Images a second on a CUDA card: python bench/gpu.py [--size sd15 sd21] [--batch 1 4 16 32] [--compile] [--json FILE]

Random-weight UNets of Stable Diffusion's sizes at 512 px, bf16. Four loops, in turns, medians over the rounds:
  bare     cached latents and text, forward, backward, clip, fused AdamW: nothing else
  usual    what the usual script does each step: VAE and text encoding, autocast, foreach AdamW, `.item()`
  trainer  ours, launched as users launch it, checkpoints and previews off
  8 bit    the same with adamw8bit, the default
--compile, or --compile max, is for bare and the trainer. Peaks are of training, what is made before it left out.
With --json the file is written after each size and batch, and what stands in it is not measured again: --minutes may
end the bench early, and another call goes on. What does not fit the card has no numbers.
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
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 1, 4, 32])
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing after so long")
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
    began, peak = time.monotonic(), matmul_peak()
    rows = known(options.json, options.compile)
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            model, resolution = model_of(size, Path(folder))
            for batch in options.batch:
                late = time.monotonic() - began > 60 * options.minutes
                if late or any((one["size"], one["batch"]) == (size, batch) for one in rows):
                    continue
                found = rounds_of(model, resolution, Path(folder) / f"logs-{size}-{batch}", batch, options)
                rows += [row(size, batch, kind, rounds, peak) for kind, rounds in found.items()]
                print_rows(rows[-len(found) :])
                if options.json:
                    so_far = {"machine": card(peak), "compile": options.compile, "rows": rows}
                    options.json.write_text(json.dumps(so_far, indent=1, allow_nan=False) + "\n")


def known(path: Path | None, compiled: str) -> list[dict[str, Any]]:
    """What an earlier call has measured with the same --compile."""
    if path is None or not path.is_file():
        return []
    before = json.loads(path.read_text())
    return before["rows"] if before["compile"] == compiled else []


def rounds_of(
    model: Path, resolution: int, logs: Path, batch: int, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Each loop's rounds, in turns; none of one that does not fit."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in (*LOOPS, *TRAINERS)}
    too_large: set[str] = set()
    for number in range(options.rounds):
        for kind in [kind for kind in found if kind not in too_large]:
            if kind in LOOPS:
                one = child(kind, model, resolution, batch, options.steps, options.compile)
            else:
                settings = [f"compile={options.compile}", *options.settings]
                name = logs.with_name(f"{logs.name}-{TRAINERS[kind]}-{number}")
                one = trainer(model, resolution, name, batch, options.steps, TRAINERS[kind], settings)
            if one is None:
                too_large.add(kind)
                found[kind] = []
            else:
                found[kind].append(one)
    return found


def row(size: str, batch: int, kind: str, rounds: list[dict[str, float]], peak: float) -> dict[str, Any]:
    where = {"size": size, "batch": batch, "loop": kind}
    if not rounds:
        return {**where, "images_per_s": None, "share_of_peak": None, "peak_bytes": None}
    images = statistics.median(one["images_per_s"] for one in rounds)
    share, most = images * TFLOP_AN_IMAGE / peak, max(one["peak_bytes"] for one in rounds)
    return {**where, "images_per_s": images, "share_of_peak": share, "peak_bytes": most}


def print_rows(rows: list[dict[str, Any]]) -> None:
    for one in rows:
        told = "does not fit | | |"
        if one["images_per_s"] is not None:
            speed = f"{one['images_per_s']:.1f} images/s | {one['share_of_peak']:.1%}"
            told = f"{speed} | {one['peak_bytes'] / 1e9:.1f} GB |"
        print(f"| {one['size']} | {one['batch']} | {one['loop']} | {told}", flush=True)


def child(kind: str, model: Path, resolution: int, batch: int, steps: int, compiled: str) -> dict[str, float] | None:
    words = ["--steps", str(steps), "--compile", compiled, "--loop", kind, str(model), str(resolution), str(batch)]
    command = [sys.executable, __file__, *words]
    told = output_of(command)
    return None if told is None else json.loads(told.splitlines()[-1])


def output_of(command: list[str]) -> str | None:
    """None where the card's memory is not enough. Raises SystemExit with what else went wrong."""
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode and "OutOfMemoryError" not in done.stderr:
        raise SystemExit(done.stderr)
    return None if done.returncode else done.stdout


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
) -> dict[str, float] | None:
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
    if output_of(command) is None:
        return None
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
