"""Build the caches ahead: accelerate launch -q scripts/cache.py --config train.json [--key value …]

Makes what scripts/train.py would make with the same settings before its first step: missing class pictures, latents,
text embeddings. A run that follows starts at once.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone runs without being installed

from everydream.__main__ import main

if __name__ == "__main__":
    sys.exit(main(only_caches=True))
