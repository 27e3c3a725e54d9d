"""Makes the embedded demo again: pictures, base model, and the judges of the quality bench.

    python scripts/make_demo.py --out examples/demo                    everything: about an hour on two cores
    python scripts/make_demo.py --out examples/demo --stage pictures   the subject's and the class's pictures alone

Stages in order: pictures, tokenizer, vae, model, decoder, judges. Each reads what those before it wrote to OUT/build.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from everydream.training.quiet import quiet_bars, quiet_libraries

quiet_libraries()

from examples.demo.making import stages  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the demo's folder")
    parser.add_argument("--judges", type=Path, default=Path("bench/judges"), metavar="FOLDER")
    parser.add_argument("--stage", choices=list(stages.STAGES), action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vae_steps", type=int, default=2200)
    parser.add_argument("--model_steps", type=int, default=6000)
    parser.add_argument("--decoder_steps", type=int, default=1000)
    options = parser.parse_args()
    quiet_bars()
    for stage in options.stage or stages.STAGES:
        print(f"stage {stage}", flush=True)
        stages.STAGES[stage](options)


if __name__ == "__main__":
    main()
