"""Build the caches ahead: accelerate launch -q scripts/cache.py --config train.json [--key value …]

Makes what scripts/train.py would make with the same settings before its first step: missing class pictures, latents,
text embeddings. A run that follows starts at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone runs without being installed

from everydream.__main__ import named_if_missing

with named_if_missing():
    from everydream.config.cli import settings_or_exit


def main() -> int:
    resolved = settings_or_exit(sys.argv[1:])
    from everydream.training.build import cache

    return cache(resolved)


if __name__ == "__main__":
    with named_if_missing():
        sys.exit(main())
