"""Train, from an installed package: accelerate launch -q -m everydream --config train.json [--key value …]

In a clone, scripts/train.py is the same.
"""

from __future__ import annotations

import sys

from everydream.runtime import before_torch


def main(*, only_caches: bool = False) -> int:
    before_torch()  # first, for a launcher may be stopped at any moment
    from everydream.config.cli import settings_or_exit

    resolved = settings_or_exit(sys.argv[1:])
    from everydream.training import build  # torch and the rest: only once the settings are right

    return (build.cache if only_caches else build.run)(resolved)


if __name__ == "__main__":
    sys.exit(main())
