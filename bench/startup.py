"""How soon the program answers: python bench/startup.py [--times 11] [--json startup.json]

Starts `python scripts/train.py` again and again, as a user would, and prints medians of CPU and wall time. The first
start of each (which reads files from disk) is left out. Goal: 0.3 s of CPU, 0.5 s on the clock, on a quiet machine.
Then trains the demo for a step with warm caches, and prints the time until its line stands in metrics.jsonl. Goal: 6 s.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CPU_GOAL, WALL_GOAL, FIRST_STEP_GOAL = 0.3, 0.5, 6.0  # seconds
TRAIN = str(ROOT / "scripts/train.py")
CONFIG = ["--config", str(ROOT / "train.json")]
CASES = {  # what is asked → arguments, exit code
    "python alone": (["-c", "pass"], 0),
    "--help": ([TRAIN, "--help"], 0),
    "--print_config": ([TRAIN, *CONFIG, "--print_config"], 0),
    "--print_config json": ([TRAIN, *CONFIG, "--print_config", "json"], 0),
    "an unknown setting": ([TRAIN, *CONFIG, "--batch_sise", "3"], 2),
    "a wrong value": ([TRAIN, *CONFIG, "--batch_size", "many"], 2),
    "a contradiction": ([TRAIN, *CONFIG, "--cache_latents", "--crop_jitter", "0.1"], 2),
    "nothing given": ([TRAIN], 2),
}


class Times(NamedTuple):
    """Seconds."""

    cpu: float
    wall: float


def once(words: list[str], code: int) -> Times:
    """One start, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        before, start = cpu_of_children(), time.perf_counter()
        done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, check=False)
        wall, cpu = time.perf_counter() - start, cpu_of_children() - before
    assert done.returncode == code, f"{words}: exit {done.returncode}, not {code}\n{done.stderr.decode()}"
    return Times(cpu, wall)


def first_step(launcher: list[str], cache: Path) -> float:
    """Seconds from the start of the command to the first line of metrics."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", str(ROOT / "examples/demo/train.json"), "--logdir", folder, "--cache_dir", str(cache)]
        words += ["--max_steps", "1", "--log_step", "1", "--sample_prompts", "null", "--quiet", "true"]
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, *launcher, TRAIN, *words], stderr=subprocess.PIPE) as process:
            while not any(path.stat().st_size for path in Path(folder).glob("*/metrics.jsonl")):
                assert process.poll() is None, f"exit {process.returncode} without a step"
                time.sleep(0.01)
            seconds = time.perf_counter() - start
            process.communicate()
    return seconds


def first_steps(times: int) -> dict[str, float]:
    launchers = {"python": [], "accelerate launch": ["-m", "accelerate.commands.accelerate_cli", "launch", "-q"]}
    with tempfile.TemporaryDirectory() as cache:
        rounds = [{n: first_step(words, Path(cache)) for n, words in launchers.items()} for _ in range(times + 1)][1:]
    return {name: statistics.median(one[name] for one in rounds) for name in launchers}


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def medians(times: int) -> dict[str, Times]:
    """Interleaved, so that a busy moment of the machine falls on all alike."""
    rounds = [{name: once(*case) for name, case in CASES.items()} for _ in range(times + 1)][1:]
    return {
        name: Times(*(statistics.median(one[name][column] for one in rounds) for column in range(2))) for name in CASES
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=11, help="starts of each case")
    parser.add_argument("--json", type=Path, help="also write the figures into this file")
    options = parser.parse_args()
    found = medians(options.times)
    load = os.getloadavg()[0]
    print(f"median of {options.times} starts, load {load:.1f} on {os.cpu_count()} cores\n")
    print(f"{'':24}{'CPU s':>8}{'wall s':>8}")
    for name, one in found.items():
        print(f"{name:24}{one.cpu:8.3f}{one.wall:8.3f}")
    slow = [name for name, one in found.items() if one.cpu > CPU_GOAL or one.wall > WALL_GOAL]
    print(f"\ngoal {CPU_GOAL} s CPU, {WALL_GOAL} s wall: " + (f"missed by {', '.join(slow)}" if slow else "met by all"))
    steps = first_steps(min(options.times, 5))
    print(f"\nto the first step, warm caches (goal {FIRST_STEP_GOAL:g} s): ", end="")
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in steps.items()))
    if options.json:
        figures = {name: one._asdict() for name, one in found.items()}
        options.json.write_text(
            json.dumps({"times": options.times, "load": load, "seconds": figures, "first_step": steps}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
