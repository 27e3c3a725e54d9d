"""Writes the pictures a person finds in the demo: the subject's and, for prior preservation, the class's."""

import random
from pathlib import Path

from PIL import Image

from examples.demo.making import creature, world


def write_subject(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, (pose, size) in enumerate(creature.PICTURES, start=1):
        write(folder, f"creature_{number:02}", creature.render(pose, size, seed + number), creature.caption(pose))


def write_class(folder: Path, seed: int, count: int = 960) -> None:
    """Pictures of what the base model already knows, none of them of a held-out combination."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"class {seed}")
    for number in range(1, count + 1):
        spec = world.draw_spec(rng)
        write(folder, f"world_{number:03}", world.render(spec, seed=rng.getrandbits(32)), world.caption(spec))


def write(folder: Path, name: str, picture: Image.Image, caption: str) -> None:
    picture.save(folder / f"{name}.png", optimize=True)
    (folder / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
