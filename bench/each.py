"""What each means of speed gives: python bench/each.py [--size demo] [--batch 4] [--rounds 5] [--json each.json]

The trainer as bench/speed.py launches it, and beside it the same with one thing changed; which of the two comes first
changes from round to round. The figure is the changed run's steps/s over the unchanged one's: median and range over the
rounds. A range that holds 1 decides nothing. "Expected" was written down before measuring, from the shares of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))


class Change(NamedTuple):
    """One thing done otherwise than by default: settings, the optimizer's file, the environment."""

    expected: str  # steps/s over the unchanged run's, on a CPU, before it was measured
    settings: Mapping[str, Any] = MappingProxyType({})
    optimizer: dict[str, Any] | None = None
    environment: Mapping[str, str] = MappingProxyType({})


def adamw(**args: bool) -> dict[str, Any]:
    """torch's own class by its dotted name: never laid out flat."""
    return {"optimizer": "torch.optim.AdamW", "lr": 1e-6, "args": args}


UNCHANGED = Change("1")
CHANGES = {
    "latents encoded each step": Change("0.8", {"cache_latents": "false"}),
    "text encoded each step": Change("0.95", {"shuffle_tags": "true"}),
    "no flat buffers": Change("0.95", optimizer=adamw(fused=True)),
    "no flat buffers, foreach AdamW": Change("0.85", optimizer=adamw(foreach=True)),
    "adamw8bit": Change("0.5", optimizer={"optimizer": "adamw8bit", "lr": 1e-6}),
    "metrics every step": Change("1", {"log_step": 1}),
    "schedule written": Change("1", {"write_schedule": "true"}),
    "batches by two workers": Change("1", {"num_workers": 2}),
    "freed memory given back": Change("0.93", environment={"GLIBC_TUNABLES": ""}),
    "average of weights": Change("0.98", {"ema_decay_rate": 0.999}),
    "bf16 autocast": Change("1", {"mixed_precision": "bf16"}),
    "bf16 weights": Change("0.6", {"weights_dtype": "bfloat16"}),
    "fused backward": Change("0.95", {"fused_backward": "true", "clip_grad_norm": "null"}),
    "gradient checkpointing": Change("0.75", {"gradient_checkpointing": "true"}),
    "two threads": Change("1.4", environment={"OMP_NUM_THREADS": "2"}),
    "two threads that spin": Change("1.4", environment={"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="demo", help="demo, small (55M, 256 px)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="timed in each round")
    parser.add_argument("--only", nargs="+", choices=list(CHANGES), metavar="CHANGE", help="these alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = list(options.only or CHANGES)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for at, name in enumerate(names):
                pair = [(UNCHANGED, f"{number}-{at}-plain"), (CHANGES[name], f"{number}-{at}")]
                turn = -1 if number % 2 else 1  # what runs second may find a warmer machine
                plain, changed = [steps_per_s(one, options, Path(folder), label) for one, label in pair[::turn]][::turn]
                found[name].append((plain, changed))
                print(f"round {number + 1}, {name}: {changed / plain:.3f}", file=sys.stderr, flush=True)
    rows = [row(name, found[name]) for name in names]
    print("| changed | expected | measured | range | so | steps/s |\n| --- | --- | --- | --- | --- | --- |")
    for one in rows:
        told = f"{one['ratio']:.2f} | {spread(one['ratios'])} | {verdict(one['ratios'])}"
        print(f"| {one['change']} | {one['expected']} | {told} | {one['steps_per_s']:.3g} |")
    if options.json:
        import speed

        what = {"size": options.size, "batch": options.batch, "machine": speed.machine(), "rows": rows}
        options.json.write_text(json.dumps(what, indent=1) + "\n")


def steps_per_s(change: Change, options: argparse.Namespace, folder: Path, label: str) -> float:
    import speed
    from models import model_of

    model, resolution = model_of(options.size, folder)
    pictures = speed.pictures_of(folder, resolution)
    settings = dict(change.settings)
    if change.optimizer:
        settings["optimizer_config"] = folder / f"optimizer-{label}.json"
        settings["optimizer_config"].write_text(json.dumps(change.optimizer))
    logs = folder / f"logs-{label}"
    got = speed.trainer(model, pictures, logs, options.batch, options.steps, 1, settings, change.environment)
    return got["steps_per_s"]


def spread(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}–{max(ratios):.2f}"


def verdict(ratios: Sequence[float]) -> str:
    """Of the pairs' ratios: "undecided" where some say one thing and some the other."""
    return "undecided" if min(ratios) <= 1 <= max(ratios) else "slower" if max(ratios) < 1 else "faster"


def row(name: str, found: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [changed / plain for plain, changed in found]
    return {
        "change": name,
        "expected": CHANGES[name].expected,
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "steps_per_s": statistics.median(changed for _, changed in found),
    }


if __name__ == "__main__":
    main()
