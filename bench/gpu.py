"""Images a second on a CUDA card: python bench/gpu.py [--size sd15 sd21] [--batch 1 4 16 32] [--compile] [--json FILE]

Random-weight UNets of Stable Diffusion's sizes at 512 px, bf16. Four loops, in turns, medians over the rounds:
  bare     cached latents and text, forward, backward, clip, fused AdamW: nothing else
  usual    what the usual script does each step: VAE and text encoding in bf16, autocast, foreach AdamW, `.item()`
  trainer  ours, launched as users launch it, previews off, no save but the last
  8 bit    the same with adamw8bit, the default (bitsandbytes lays weights out anew, so without channels_last)
--compile, or --compile max, is for bare and the trainer, whose peak then counts compiling too; else peaks are of
training. With --json the file is written after each run, and what stands in it is not measured again: --minutes may end
the bench early, and another call goes on. What fails, most often for want of memory, is a row that says so.
An image takes 2.41 TFLOP, forward and backward; the share is of this card's measured bf16 matrix product.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

from models import model_of
from speed import PICTURES, environment, machine

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
    parser.add_argument("--settings", nargs="*", default=[], help="more of the trainer's, as key=value")
    parser.add_argument("--compile", nargs="?", choices=list(COMPILE), default="false", const="true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(in_child(*options.child, steps=options.steps, compiled=options.compile)))
        return
    began = time.monotonic()
    found = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {"rounds": []}
    with tempfile.TemporaryDirectory() as folder:
        for where in turns(options):
            if time.monotonic() - began > 60 * options.minutes:
                break
            if is_known(where, found["rounds"]):
                continue
            found.setdefault("machine", None)
            found["machine"] = found["machine"] or child(["card"])
            found["rounds"].append({**where, **measured(where, Path(folder), options)})
            if options.json:
                options.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    if found["rounds"]:
        print_table(found)


def turns(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for size in options.size:
        for batch in options.batch:
            for number in range(options.rounds):
                for kind in (*LOOPS, *TRAINERS):
                    compiled = options.compile if kind in ("bare", "trainer", "8 bit") else "false"
                    yield {"size": size, "batch": batch, "loop": kind, "compile": compiled, "round": number}


def is_known(where: dict[str, Any], rounds: list[dict[str, Any]]) -> bool:
    """This one is measured, or an earlier round of it has failed."""
    alike = [one for one in rounds if all(one[key] == where[key] for key in ("size", "batch", "loop", "compile"))]
    return any(one["round"] == where["round"] or one["failed"] for one in alike)


def measured(where: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """images_per_s and peak_bytes; or `failed`: the last line of what went wrong, most often for want of memory."""
    model, resolution = model_of(where["size"], folder)
    kind, batch, compiled = where["loop"], where["batch"], where["compile"]
    try:
        if kind in LOOPS:
            words = ["--steps", str(options.steps), "--compile", compiled]
            one = child([kind, str(model), str(resolution), str(batch)], words)
        else:
            settings = dict(word.split("=", 1) for word in options.settings)
            one = trainer(model, resolution, folder, batch, options.steps, TRAINERS[kind], compiled, settings)
    except Failed as error:
        return {"failed": str(error)}
    return {**one, "failed": ""}


class Failed(Exception):
    """The last line of what a process said."""


def child(what: list[str], words: Sequence[str] = ()) -> dict[str, Any]:
    """In a process of its own, so that the card's memory is free for the next."""
    command = [sys.executable, __file__, *words, "--child", *what]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(last_line(done.stderr))
    return json.loads(done.stdout.splitlines()[-1])


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "Error" in line] or text.splitlines()
    return lines[-1].strip() if lines else "no word"


def in_child(kind: str, *words: str, steps: int, compiled: str) -> dict[str, Any]:
    if kind == "card":
        return card()
    model, resolution, batch = words
    return loop(kind, Path(model), int(resolution), int(batch), steps, compiled)


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a size, batch, loop and --compile: medians over the rounds, the largest peak."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in found["rounds"]:
        groups.setdefault(tuple(one[key] for key in ("size", "batch", "loop", "compile")), []).append(one)
    rows = []
    for (size, batch, kind, compiled), rounds in groups.items():
        row = {"size": size, "batch": batch, "loop": kind, "compile": compiled, "rounds": len(rounds)}
        row["failed"] = next((one["failed"] for one in rounds if one["failed"]), "")
        if not row["failed"]:
            row["images_per_s"] = statistics.median(one["images_per_s"] for one in rounds)
            row["share_of_peak"] = row["images_per_s"] * TFLOP_AN_IMAGE / found["machine"]["bf16_tflops"]
            row["peak_bytes"] = max(one["peak_bytes"] for one in rounds)
        rows.append(row)
    return rows


def print_table(found: dict[str, Any]) -> None:
    print("| size | batch | loop | compile | images/s | of the peak | memory |\n|" + " --- |" * 7)
    for one in rows_of(found):
        told = f"{one['failed']} | | |"
        if not one["failed"]:
            speed = f"{one['images_per_s']:.1f} | {one['share_of_peak']:.1%}"
            told = f"{speed} | {one['peak_bytes'] / 1e9:.1f} GB |"
        print(f"| {one['size']} | {one['batch']} | {one['loop']} | {one['compile']} | {told}", flush=True)


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
        family.drop_vae()
    else:
        vae = family.hold("vae").to(torch.bfloat16)
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
            mean_BCHW, std_BCHW = vae.encode(pixels_NCHW[at].to(torch.bfloat16).div(127.5).sub(1.0))
            latents_BCHW = family.latents(mean_BCHW, std_BCHW, torch.randn_like(mean_BCHW)).float()
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
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
    model: Path,
    resolution: int,
    folder: Path,
    batch: int,
    steps: int,
    optimizer: str,
    compiled: str,
    settings: Mapping[str, Any],
) -> dict[str, float]:
    """Launched as users launch it. Raises Failed."""
    import speed

    logs = folder / "logs"
    shutil.rmtree(logs, ignore_errors=True)  # the last save is 11 GB of a Stable Diffusion 1.5 in float32
    optimizer_file = folder / f"optimizer-{optimizer}.json"
    optimizer_file.write_text(json.dumps({"optimizer": optimizer, "lr": 1e-6}))
    changes = {"optimizer_config": optimizer_file, "mixed_precision": "bf16", "compile": compiled, **settings}
    try:
        got = speed.trainer(model, speed.pictures_of(folder, resolution), logs, batch, steps, 1, changes)
    except SystemExit as error:
        raise Failed(last_line(str(error))) from None
    finally:
        shutil.rmtree(logs, ignore_errors=True)
    return {"images_per_s": got["steps_per_s"] * batch, "peak_bytes": got["memory_bytes"]}


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


def card() -> dict[str, Any]:
    import torch

    return {**machine(), "card": torch.cuda.get_device_name(), "bf16_tflops": matmul_peak()}


if __name__ == "__main__":
    main()
