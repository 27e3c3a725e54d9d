"""Steps a second of the trainer beside a bare loop: python bench/speed.py [--size demo small] [--batch 1 4]

The bare loop has cached latents and text, forward, backward, clip, optimizer: nothing else. The trainer is launched as
users launch it, checkpoints and previews off, log_step 10. Both train the same UNet with fused AdamW and clipping at 1,
one thread a process, in turns; medians over the rounds. --processes 1 2: two processes of one thread each beside one.
In the same turns, "loader" is the trainer's own iterator of batches, from warm caches, with nothing else going on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

LOG_STEP = 10
PICTURES = 16
LOADED = 500  # batches, in each round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["demo"], help="demo, small (55M, 256 px)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--processes", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="timed in each round, after 10 that are not")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", nargs=4, metavar=("MODEL", "RESOLUTION", "BATCH", "STEPS"), help=argparse.SUPPRESS)
    parser.add_argument("--loader", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loader:
        print(json.dumps(loader(options.loader)))
        return
    if options.bare:
        model, resolution, batch, steps = options.bare
        print(json.dumps(bare_loop(Path(model), int(resolution), int(batch), int(steps))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size:
            for batch in options.batch:
                rows += measure(size, batch, options, Path(folder))
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


def measure(size: str, batch: int, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each process count: the bare loop and the trainer in turns."""
    from models import model_of

    model, resolution = model_of(size, folder)
    pictures = pictures_of(folder, resolution)
    found: dict[str, list[dict[str, float]]] = {"bare": [], "loader": [], **{f"{n}": [] for n in options.processes}}
    for number in range(options.rounds):
        found["bare"].append(child(["--bare", str(model), str(resolution), str(batch), str(options.steps)]))
        for processes in options.processes:
            logs = folder / f"logs-{size}-{batch}-{processes}-{number}"
            found[str(processes)].append(trainer(model, pictures, logs, batch, options.steps, processes))
            say = found[str(processes)][-1]["steps_per_s"] / found["bare"][-1]["steps_per_s"]
            print(f"{size}, batch {batch}, {processes} processes, round {number + 1}: {say:.3f}", file=sys.stderr)
        logs = folder / f"logs-{size}-{batch}-loader-{number}"
        found["loader"].append(child(["--loader", *words(model, pictures, logs, batch, LOADED)]))
    bare, loaded = medians(found["bare"]), medians(found["loader"])
    rows = []
    for processes in options.processes:
        ours = medians(found[str(processes)])
        ratios = [
            t["steps_per_s"] / b["steps_per_s"] for t, b in zip(found[str(processes)], found["bare"], strict=True)
        ]
        rows.append(
            {
                "size": size,
                "batch": batch,
                "processes": processes,
                "bare_steps_per_s": bare["steps_per_s"],
                "trainer_steps_per_s": ours["steps_per_s"],
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "data_wait_share": ours["data_wait_share"],
                "loader_batches_per_s": loaded["batches_per_s"],
                "loader_pictures_per_s": loaded["batches_per_s"] * batch,
                "loader_over_trainer": loaded["batches_per_s"] / (ours["steps_per_s"] * processes),
                "bare_peak_bytes": bare["peak_bytes"],
                "trainer_peak_bytes": ours["peak_bytes"],
            }
        )
    return rows


def pictures_of(folder: Path, resolution: int) -> Path:
    """A folder of captioned pictures, made once."""
    from tests.tiny import make_pictures

    pictures = folder / f"pictures-{resolution}"
    if not pictures.is_dir():
        make_pictures(pictures, PICTURES, size=resolution, captions="a thing, number {i}")
    return pictures


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def child(words: list[str]) -> dict[str, float]:
    began = subprocess.run(
        [sys.executable, __file__, *words], env=environment(), capture_output=True, text=True, check=True
    )
    return json.loads(began.stdout.splitlines()[-1])


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def bare_loop(model: Path, resolution: int, batch: int, steps: int) -> dict[str, float]:
    """The least that training is."""
    import torch

    from everydream.diffusion.paths import NoisePath
    from everydream.models.family import load, read_facts

    torch.manual_seed(0)
    facts = read_facts(str(model))
    family = load(facts, train=("unet",))
    family.drop_vae()
    side = resolution // facts.vae_factor
    latents_NCHW = torch.randn(PICTURES, facts.latent_channels, side, side)
    text_NLD = family.encode_text(torch.from_numpy(family.tokenize(["a thing"] * PICTURES, 1)))
    family.drop_text_encoder()
    path = NoisePath.from_scheduler_config(facts.scheduler_config)
    parameters = list(family.parameters_of("unet").values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    denoiser = family.denoiser.train()
    warm_up = 10
    for step in range(warm_up + steps):
        if step == warm_up:
            began = time.perf_counter()
        at = torch.arange(step * batch, (step + 1) * batch) % PICTURES
        latents_BCHW, text_BLD = latents_NCHW[at], text_NLD[at]
        noise_BCHW = torch.randn_like(latents_BCHW)
        t_B = torch.randint(0, 1000, (batch,))
        prediction_BCHW = denoiser(path.add_noise(latents_BCHW, noise_BCHW, t_B), t_B, text_BLD)
        torch.nn.functional.mse_loss(prediction_BCHW, noise_BCHW).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    return {"steps_per_s": steps / seconds, "data_wait_share": 0.0, "peak_bytes": peak_bytes()}


def peak_bytes() -> float:
    """Of this process, or of the largest one that it waited for."""
    import resource

    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024.0 * max(resource.getrusage(one).ru_maxrss for one in who)


def loader(argv: list[str]) -> dict[str, float]:
    """How fast the trainer's batches come when nobody trains on them; its caches are there already."""
    from everydream.config.compare import changes
    from everydream.config.resolve import resolve
    from everydream.runtime import StopRequest
    from everydream.training.build import Build
    from everydream.training.console import Console
    from everydream.training.prepare import Prepared

    build = Build(Prepared(resolve(argv, os.environ), changes, StopRequest(), Console("quiet")))
    batches = build.trainer().update.batches
    for _ in range(PICTURES):  # each picture's checksum is proved once
        next(batches)
    began = time.perf_counter()
    count = sum(1 for _ in batches)
    seconds = time.perf_counter() - began
    build.close(0, "measured")
    return {"batches_per_s": count / seconds}


def words(
    model: Path, pictures: Path, logs: Path, batch: int, steps: int, changes: Mapping[str, Any] = MappingProxyType({})
) -> list[str]:
    """The trainer's command line. `changes`: settings that are to be otherwise."""
    optimizer = logs.parent / "adamw.json"
    optimizer.write_text('{"optimizer": "adamw", "lr": 1e-6}')
    settings = {
        "base_model": model,
        "data_root": pictures,
        "logdir": logs,
        "cache_dir": logs.parent / "cache",
        "batch_size": batch,
        "max_steps": steps,
        "log_step": LOG_STEP,
        "clip_grad_norm": 1.0,
        "disable_textenc_training": "true",
        "cond_dropout": 0,
        "save_every_n_epochs": 0,
        "save_single_file": "false",
        "tensorboard": "false",
        "quiet": "true",
        "optimizer_config": optimizer,
        **changes,
    }
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def trainer(
    model: Path,
    pictures: Path,
    logs: Path,
    batch: int,
    steps: int,
    processes: int,
    changes: Mapping[str, Any] = MappingProxyType({}),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, float]:
    """`changes`: settings, `variables`: of the environment, that are to be otherwise."""
    launcher = ["--num_processes", "1"] if processes == 1 else ["--multi_gpu", "--num_processes", str(processes)]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-q", *launcher]
    script = str(ROOT / "scripts" / "train.py")
    started = subprocess.Popen(
        [*command, script, *words(model, pictures, logs, batch, steps + 2 * LOG_STEP, changes)],
        env={**environment(), **variables},
        stderr=subprocess.PIPE,
    )
    assert started.stderr is not None
    said = started.stderr.read()
    _, status, usage = os.wait4(started.pid, 0)  # the largest of the launcher and what it waited for
    if status:
        raise SystemExit(f"the trainer failed: {said.decode()}")
    (metrics,) = logs.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    timed = [  # neither the first steps, nor the save's
        (line["step"] - before["step"], line)
        for before, line in itertools.pairwise(lines)
        if before["step"] >= LOG_STEP and line["step"] <= steps + LOG_STEP
    ]
    seconds = sum(count * batch * processes / line["images_per_s"] for count, line in timed)
    return {
        "steps_per_s": sum(count for count, _ in timed) / seconds,
        "data_wait_share": sum(line["data_wait_s"] for _, line in timed) / seconds,
        "peak_bytes": 1024.0 * usage.ru_maxrss,
        "memory_bytes": float(max(line["memory_bytes"] for _, line in timed)),  # a card's, where there is one
    }


def machine() -> dict[str, Any]:
    import platform

    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {"processor": name, "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        "| model | batch | processes | bare steps/s | trainer steps/s | median of ratios | data wait "
        "| loader batches/s | loader over trainer | peak bare | peak trainer |"
    )
    print("|" + " --- |" * 11)
    for row in rows:
        print(
            f"| {row['size']} | {row['batch']} | {row['processes']} | {row['bare_steps_per_s']:.3g} "
            f"| {row['trainer_steps_per_s']:.3g} | {row['ratio']:.3f} | {row['data_wait_share']:.2%} "
            f"| {row['loader_batches_per_s']:,.0f} | {row['loader_over_trainer']:.0f} "
            f"| {row['bare_peak_bytes'] / 1e6:,.0f} MB | {row['trainer_peak_bytes'] / 1e6:,.0f} MB |"
        )


if __name__ == "__main__":
    main()
