"""How far the quality bench's judges can be trusted: their answers on pictures whose truth is known.

    python bench/judge_check.py --json out.json

The subject's judge sees true renders of the subject (as drawn, soft, through the autoencoder: it should say yes) and
pictures that are not it (it should say no); the world's judge sees held-out combinations. All are drawn with a seed
that no training of the judges had.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from everydream.training.quiet import quiet_bars, quiet_libraries

quiet_libraries()

import quality
import torch
from diffusers import AutoencoderKL
from PIL import Image

from examples.demo.making import classifier, creature, world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    vae = AutoencoderKL.from_pretrained(quality.BASE_MODEL / "vae").eval()
    rows = {**subject_rows(vae, options), **world_rows(vae, options)}
    width = max(map(len, rows))
    for name, figure in rows.items():
        print(f"{name:{width}}  {figure:6.1%}")
    if options.json:
        options.json.write_text(json.dumps({"samples": options.samples, "seed": options.seed, **rows}, indent=2) + "\n")


def subject_rows(vae: AutoencoderKL, options: argparse.Namespace) -> dict[str, float]:
    """Kind of picture → share in which the judge sees the subject; 1 is right for the first three, 0 for the others."""
    rng = random.Random(f"judge check {options.seed}")
    drawn = classifier.to_tensor([classifier.draw_creature(rng, creature.Form()) for _ in range(options.samples)])
    soft = classifier.softened(drawn, options.seed)
    kinds = {"subject": drawn, "subject, soft": soft, "subject, decoded": classifier.reconstructed(vae, drawn)}
    for name, (draw, _) in classifier.OTHERS.items():
        kinds[f"not: {name}"] = classifier.to_tensor([draw(rng) for _ in range(options.samples)])
    return {name: quality.share(quality.shows_subject(pictures)) for name, pictures in kinds.items()}


def world_rows(vae: AutoencoderKL, options: argparse.Namespace) -> dict[str, float]:
    """Share of held-out combinations read right in shape, colour and background."""
    specs = quality.base_specs(options.samples, options.seed)
    pictures: list[Image.Image] = [world.render(spec, seed=options.seed + k) for k, spec in enumerate(specs)]
    drawn = classifier.to_tensor(pictures)
    return {
        "world": quality.base_shares(drawn, specs)["base"],
        "world, decoded": quality.base_shares(classifier.reconstructed(vae, drawn), specs)["base"],
    }


if __name__ == "__main__":
    quiet_bars()
    main()
