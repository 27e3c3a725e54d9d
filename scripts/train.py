"""Train: accelerate launch -q scripts/train.py --config train.json [--key value …]

Every setting: python scripts/train.py --help
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone runs without being installed

from everydream.config.cli import settings_or_exit


def main() -> int:
    resolved = settings_or_exit(sys.argv[1:])
    from everydream.training.build import run  # torch and the rest: only once the settings are right

    return run(resolved)


if __name__ == "__main__":
    sys.exit(main())
