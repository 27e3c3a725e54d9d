"""What a save costs training: python bench/checkpoint.py [--size demo small] [--device cuda]

A bare loop trains a UNet with AdamW and an average of its weights, and saves both ways, in turns: waiting for the disk,
and in the background. Lost: the beginning of a background save, and how much longer the steps until its end took than
steps without a save, timed before and after it; as a share of the time that a waiting save takes. One thread trains, so
a second core is there for the writer.

"Neighbour": what training loses, as the same share, while another process that shares nothing with it hashes and writes
those files. Cores share their memory, so on many machines this is not nothing; no way of saving can cost less.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["demo"], help="demo, small (55M), sd15")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="timed without a save, in each round")
    parser.add_argument(
        "--folder", type=Path, help="where to save: the disk that is measured (default: a temporary one)"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = [measure(size, options, Path(folder)) for size in options.size]
    for row in rows:
        said = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  ".join(f"{key} {value}" for key, value in said.items()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(size: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from models import model_of

    from everydream.process import keep_freed_memory
    from everydream.training.saver import Saver

    model, resolution = model_of(size, folder)
    settle: list[Callable[[], None]] = [lambda: None]
    step, contents = training(model, resolution, options.device, lambda: settle[0]())
    gc.collect()
    gc.freeze()  # as the trainer does; so with the memory
    keep_freed_memory()
    savers = {way: Saver(folder / size / way, background=way == "background", keep_last=1) for way in WAYS}
    settle[0] = savers["background"].settle
    seconds: dict[str, list[float]] = {key: [] for key in ("step", "waiting", "begin", "snapshot", "background")}
    longer: dict[str, list[list[float]]] = {"save": [], "neighbour": []}
    for number in range(options.rounds + 1):
        savers["waiting"].save(number, contents())
        [waiting] = savers["waiting"].outcomes()
        alone = [timed(step) for _ in range(options.steps)]
        begin = timed(lambda number=number: savers["background"].save(number, contents()))  # type: ignore[misc]
        beside_save, saved = [], []
        while not (saved := savers["background"].outcomes()):
            beside_save.append(timed(step))
        alone += [timed(step) for _ in range(options.steps)]
        beside_other = beside(step, next((folder / size / "waiting").iterdir()), folder / size / "neighbour")
        alone += [timed(step) for _ in range(options.steps)]
        if number == 0:
            continue  # the first save takes its memory, and the disk's cache is cold
        usual = statistics.median(alone)
        longer["save"].append([one - usual for one in beside_save])
        longer["neighbour"].append([one - usual for one in beside_other])
        values = (usual, waiting.seconds, begin, saved[0].held_s, saved[0].seconds)
        for key, value in zip(seconds, values, strict=True):
            seconds[key].append(value)
    medians = {f"{key}_s": statistics.median(values) for key, values in seconds.items()}
    lost = medians["begin_s"] + in_sum(longer["save"])
    shares = {"lost_share": lost / medians["waiting_s"]}
    shares["neighbour_share"] = in_sum(longer["neighbour"]) / medians["waiting_s"]
    checkpoint = next((folder / size / "waiting").iterdir())
    written = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    return {"size": size, "device": options.device, "bytes": written, **medians, "lost_s": lost, **shares}


def in_sum(longer: list[list[float]]) -> float:
    """Over the first, second, … step of a save, the median over the rounds of how much longer it took. A shared
    machine stops for a moment now and then: in a sum over the steps of one round that is more than what is sought."""
    count = statistics.median_low(map(len, longer))
    return sum(statistics.median(one[at] for one in longer if len(one) > at) for at in range(count))


def beside(step: Callable[[], None], checkpoint: Path, target: Path) -> list[float]:
    """Seconds of each step while another process hashes and writes a checkpoint's files."""
    target.mkdir(exist_ok=True)
    command = [sys.executable, "-c", NEIGHBOUR, str(checkpoint), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()  # it has read them
        process.stdin.close()
        seconds = []
        while process.poll() is None:
            seconds.append(timed(step))
        return seconds


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


NEIGHBOUR = """
import hashlib, os, pathlib, sys
contents = [path.read_bytes() for path in pathlib.Path(sys.argv[1]).rglob("*") if path.is_file()]
print("ready", flush=True)
sys.stdin.read()
for number, content in enumerate(contents):
    hashlib.sha256(content)
    with open(f"{sys.argv[2]}/{number}", "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
"""
WAYS = ("waiting", "background")


def training(
    model: Path, resolution: int, device: str, settle: Callable[[], None]
) -> tuple[Callable[[], None], Callable[[], dict[str, Any]]]:
    """(one update, what a checkpoint of it holds). `settle` is called before the weights change."""
    import torch

    from everydream.models.family import load, read_facts
    from everydream.optim.ema import EMA
    from everydream.training import optimizer_state
    from everydream.training.bag import as_content
    from everydream.training.tensorfile import Tensors

    torch.set_num_threads(1)
    facts = read_facts(str(model))
    family = load(facts, train=("unet",), device=torch.device(device))
    side = resolution // facts.vae_factor
    named = family.parameters_of("unet")
    optimizer = torch.optim.AdamW(named.values(), lr=1e-6, fused=True)
    ema = EMA(named, 0.999)
    latents_BCHW = torch.randn(1, facts.latent_channels, side, side, device=device)
    text_BLD = family.encode_text(torch.from_numpy(family.tokenize(["a thing"], 1)).to(device))
    t_B = torch.tensor([500], device=device)
    count = [0]

    def step() -> None:
        family.denoiser(latents_BCHW, t_B, text_BLD).square().mean().backward()
        settle()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count[0] += 1
        ema.update(count[0])
        if device != "cpu":
            torch.cuda.synchronize()  # the trainer reads its loss once an update

    def contents() -> dict[str, Any]:
        tensors, _ = optimizer_state.capture({"unet": optimizer}, {"unet": named})
        weights = {"unet": {name: parameter.detach() for name, parameter in named.items()}}
        model = {f"model/{name}": as_content(content) for name, content in family.files(weights).items()}
        return {**model, "optimizer.safetensors": Tensors(tensors), "ema.safetensors": Tensors(ema.tensors())}

    return step, contents


if __name__ == "__main__":
    main()
