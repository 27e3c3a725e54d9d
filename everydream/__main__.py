"""Train, from an installed package: accelerate launch -q -m everydream --config train.json [--key value …]

In a clone, scripts/train.py is the same.
"""

from __future__ import annotations

import sys

from everydream.config.cli import settings_or_exit


def main() -> int:
    resolved = settings_or_exit(sys.argv[1:])
    from everydream.training.build import run  # torch and the rest: only once the settings are right

    return run(resolved)


if __name__ == "__main__":
    sys.exit(main())
