"""How long the check of the pictures takes: 10,000 small files, first and with what an earlier scan remembered.

python bench/scan.py --count 10000 --json scan.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from PIL import Image

from everydream.data.buckets import assign, bucket_sizes
from everydream.data.folders import Root
from everydream.data.plan import Plan
from everydream.data.scan import scan


def make_files(folder: Path, count: int) -> None:
    """JPEGs of 96×64 pixels with captions, 500 a folder."""
    for number in range(count):
        place = folder / f"{number // 500:03}"
        place.mkdir(parents=True, exist_ok=True)
        color = (number % 256, number // 256 % 256, 128)
        Image.new("RGB", (96, 64), color).save(place / f"{number:06}.jpg")
        (place / f"{number:06}.txt").write_text(f"a picture, number {number}", "utf-8")


def measure(count: int, workers: int) -> dict[str, float]:
    """Stage → seconds."""
    seconds = {}
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place, "data"), Path(place, "cache")
        make_files(folder, count)
        for stage in ("first scan", "scan with memory"):
            begin = time.perf_counter()
            samples = scan([Root("subject", folder)], workers=workers, cache_dir=cache).usable()
            seconds[stage] = time.perf_counter() - begin
        assert len(samples) == count
        begin = time.perf_counter()
        sizes = bucket_sizes(512, 64)
        buckets = assign([(sample.identity, sample.width, sample.height) for sample in samples], sizes)
        plan = Plan(buckets, 4, 555)
        plan.micro_batch(plan.micro_batches(100) - 1)
        seconds["buckets and plan"] = time.perf_counter() - begin
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    seconds = measure(arguments.count, arguments.workers)
    for stage, value in seconds.items():
        print(f"{stage:<20}{value:8.2f} s{value / arguments.count * 1e6:10.0f} µs a file")
    if arguments.json:
        arguments.json.write_text(json.dumps({"count": arguments.count, "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
