"""How well models show the demo's subject, and how much they still know of the demo's world.

    python bench/quality.py examples/demo/base_model logs/RUN/checkpoints/STEP/model --json out.json

Each MODEL is a diffusers folder, a checkpoint, or a single .safetensors file, read with the base model's configuration.
Two figures a model: of --subject_samples pictures on prompts that no subject picture has, how many show the
subject; of --base_samples pictures on combinations that no training ever saw, how many have shape, colour and
background right. Two small classifiers judge; examples/demo/making/classifier.py says how they were trained.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from everydream.training.quiet import quiet_bars, quiet_libraries

quiet_libraries()

import torch
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler

from examples.demo.making import autoencoder, classifier, creature, world

BASE_MODEL = ROOT / "examples" / "demo" / "base_model"
WORLD_JUDGE = ROOT / "bench" / "judges" / "world.safetensors"
SUBJECT_JUDGE = ROOT / "bench" / "judges" / "subject.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--subject_samples", type=int, default=64)
    parser.add_argument("--base_samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also write the samples there, as sheets")
    options = parser.parse_args()
    rows = [measure(name, options) for name in options.models]
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps({"settings": settings(options), "models": rows}, indent=2) + "\n")


def measure(name: str, options: argparse.Namespace) -> dict:
    """One row of the table."""
    started = time.monotonic()
    pipe = load(Path(name))
    subject = sample(pipe, subject_prompts(options.subject_samples), options)
    specs = base_specs(options.base_samples, options.seed)
    known = sample(pipe, [world.caption(spec) for spec in specs], options)
    if options.pictures:
        write_sheets(options.pictures, Path(name).stem, {"subject": subject, "base": known})
    return {
        "model": name,
        "subject": share(shows_subject(subject)),
        "subject_samples": len(subject),
        **base_shares(known, specs),
        "base_samples": len(known),
        "seconds": round(time.monotonic() - started, 1),
    }


def load(path: Path) -> StableDiffusionPipeline:
    if path.suffix == ".safetensors":
        pipe = StableDiffusionPipeline.from_single_file(str(path), config=str(BASE_MODEL))
    else:
        folder = path if (path / "model_index.json").exists() else path / "model"
        if not (folder / "model_index.json").exists():
            raise SystemExit(
                f"{path}: no model_index.json here or in {folder.name}/: name a diffusers folder or a checkpoint"
            )
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu", torch.float32)


def subject_prompts(count: int) -> list[str]:
    """Poses that no subject picture has: new backgrounds, old ones in new places; but never green, its own colour."""
    seen = {(pose.background, pose.place) for pose, _ in creature.PICTURES}
    pairs = [(background, place) for place in world.PLACES for background in world.COLOURS if background != "green"]
    poses = [
        creature.Pose(background, "medium", place) for background, place in pairs if (background, place) not in seen
    ]
    return [creature.caption(poses[k % len(poses)]) for k in range(count)]


def base_specs(count: int, seed: int) -> list[world.Spec]:
    rng = random.Random(f"quality {seed}")
    return [world.draw_spec(rng, held_out=True) for _ in range(count)]


@torch.no_grad()
def sample(
    pipe: StableDiffusionPipeline, prompts: list[str], options: argparse.Namespace, batch: int = 50
) -> torch.Tensor:
    """uint8 pictures (B, 3, 64, 64); each prompt has a noise of its own, whatever the batch."""
    pictures = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(options.seed * 10**6 + start + k) for k in range(len(part))]
        out = pipe(  # type: ignore[operator]
            part,
            height=64,
            width=64,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=generators,
            output_type="np",
        ).images
        pictures.append(torch.from_numpy(out).permute(0, 3, 1, 2).mul(255).round().byte())
    return torch.cat(pictures) if pictures else torch.zeros(0, 3, 64, 64, dtype=torch.uint8)


@torch.no_grad()
def shows_subject(pictures: torch.Tensor) -> torch.Tensor:
    judge = classifier.load(SUBJECT_JUDGE, classifier.SUBJECT_HEADS)
    return judge(autoencoder.to_pixels(pictures))[0].argmax(1) == 1


@torch.no_grad()
def base_shares(pictures: torch.Tensor, specs: list[world.Spec]) -> dict[str, float]:
    """How many have all three parts right, and each part alone."""
    judge = classifier.load(WORLD_JUDGE, classifier.WORLD_HEADS)
    seen = torch.stack([head.argmax(1) for head in judge(autoencoder.to_pixels(pictures))], dim=1)
    said = torch.tensor(
        [
            (
                world.SHAPES.index(spec.shape),
                classifier.COLOUR_NAMES.index(spec.colour),
                classifier.COLOUR_NAMES.index(spec.background),
            )
            for spec in specs
        ]
    ).view(-1, 3)
    right = seen == said
    parts = {f"base_{name}": share(right[:, k]) for k, name in enumerate(("shape", "colour", "background"))}
    return {"base": share(right.all(1)), **parts}


def share(right: torch.Tensor) -> float:
    return round(right.float().mean().item(), 4) if len(right) else 0.0


def write_sheets(folder: Path, stem: str, sheets: dict[str, torch.Tensor], columns: int = 16) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, pictures in sheets.items():
        sheet = Image.new("RGB", (columns * 66, (len(pictures) + columns - 1) // columns * 66 or 1))
        for k, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture.permute(1, 2, 0).numpy()), (k % columns * 66, k // columns * 66))
        sheet.save(folder / f"{stem}-{name}.png")


def settings(options: argparse.Namespace) -> dict:
    names = ("subject_samples", "base_samples", "steps", "guidance", "seed")
    return {name: getattr(options, name) for name in names}


def print_table(rows: list[dict]) -> None:
    width = max(len(row["model"]) for row in rows)
    print(f"{'model':{width}}  subject    base   shape  colour  background  seconds")
    for row in rows:
        print(
            f"{row['model']:{width}}  {row['subject']:7.1%} {row['base']:7.1%} {row['base_shape']:7.1%}"
            f" {row['base_colour']:7.1%} {row['base_background']:11.1%} {row['seconds']:8.1f}"
        )


if __name__ == "__main__":
    quiet_bars()
    main()
