"""Train, from an installed package: accelerate launch -q -m everydream --config train.json [--key value …]

In a clone, scripts/train.py is the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from everydream.process import before_torch

# What setup.cfg installs, by the names that are imported.
PACKAGES = {
    "torch", "accelerate", "diffusers", "transformers", "tokenizers", "huggingface_hub", "safetensors", "bitsandbytes",
    "lion_pytorch", "numpy", "PIL", "psutil", "pydantic", "yaml", "rich", "tensorboard",
}  # fmt: skip


@contextlib.contextmanager
def named_if_missing() -> Iterator[None]:
    """Around imports: one line and exit code 2 where this Python lacks a package of ours, mostly the wrong Python."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in PACKAGES or importlib.util.find_spec(package) is not None:
            raise
        if os.environ.get("RANK", "0") == "0":
            is_clone = (Path(__file__).parents[1] / "Makefile").is_file()
            advice = "use .venv/bin/python (`make install` makes it)" if is_clone else "pip install everydream there"
            print(f"{package} is not installed in {sys.executable}: {advice}", file=sys.stderr)
        sys.exit(2)


def main(*, only_caches: bool = False) -> int:
    before_torch()  # first, for a launcher may be stopped at any moment
    with named_if_missing():
        from everydream.config.cli import settings_or_exit

        resolved = settings_or_exit(sys.argv[1:])
        from everydream.training import run  # torch and the rest: only once the settings are right

        return (run.cache if only_caches else run.run)(resolved)


if __name__ == "__main__":
    sys.exit(main())
