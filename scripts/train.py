"""Train: accelerate launch -q scripts/train.py --config train.json [--key value …]

Every setting: python scripts/train.py --help
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone runs without being installed

from everydream.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
