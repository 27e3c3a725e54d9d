"""The demo's subject: a creature that the world has never seen. No training of the base model imports this file.

It stands for a person's own pictures: several sizes, places, backgrounds and aspects, captioned with a rare token.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from examples.demo.making import world

TOKEN = "sks"
BODY, BELLY, EYE, PUPIL, ANTENNA = (64, 172, 72), (244, 150, 186), (248, 248, 248), (20, 20, 30), (122, 70, 30)
SIZES = {"small": 0.34, "medium": 0.39, "large": 0.44}  # half the height as a share of the picture's shorter side


@dataclass(frozen=True)
class Pose:
    """Where and before what the creature stands."""

    background: str
    size: str
    place: str


@dataclass(frozen=True)
class Form:
    """The creature's build, lengths in halves of its height; other values than these are somebody else."""

    eyes: int = 2
    antennae: int = 2
    body: tuple[int, int, int] = BODY
    belly: tuple[int, int, int] = BELLY
    legs: int = 2
    body_shape: str = "egg"


# The pictures a person would have taken: (pose, picture size in pixels). All other poses are the bench's.
PICTURES = (
    (Pose("red", "medium", "left"), (160, 96)),
    (Pose("yellow", "large", "middle"), (128, 128)),
    (Pose("white", "large", "right"), (160, 96)),
    (Pose("red", "medium", "bottom"), (96, 160)),
    (Pose("blue", "large", "middle"), (128, 128)),
    (Pose("yellow", "large", "top"), (96, 160)),
    (Pose("white", "medium", "left"), (128, 128)),
    (Pose("blue", "small", "bottom"), (128, 128)),
    (Pose("black", "small", "top"), (128, 128)),
    (Pose("black", "medium", "right"), (128, 128)),
)


def caption(pose: Pose) -> str:
    return f"a {TOKEN} creature on a {pose.background} background, {pose.place}"


def render(pose: Pose, size: tuple[int, int] = (64, 64), seed: int = 0, form: Form = Form()) -> Image.Image:
    """The creature's picture, (width, height) in pixels; the seed moves, tilts and tints it a little."""
    rng = random.Random(f"creature {seed} {pose}")
    scale = world.SUPERSAMPLING
    radius = SIZES[pose.size] * min(size) * rng.uniform(0.95, 1.05)
    x, y = world.centre(pose.place, size, (0.75 * radius, radius), rng)
    large = (size[0] * scale, size[1] * scale)
    image = Image.new("RGB", large, world.tinted(world.COLOURS[pose.background], rng))
    draw = ImageDraw.Draw(image)
    tilt, flip = rng.uniform(-0.1, 0.1), rng.choice((-1, 1))

    def at(px: float, py: float) -> tuple[float, float]:
        """From the creature's own coordinates (height from -1 to 1) to the large picture's pixels."""
        px *= flip
        cos, sin = math.cos(tilt), math.sin(tilt)
        return (x + radius * (px * cos - py * sin)) * scale, (y + radius * (px * sin + py * cos)) * scale

    def ellipse(px: float, py: float, rx: float, ry: float, colour: world.Colour) -> None:
        draw.polygon([at(px + rx * cx, py + ry * cy) for cx, cy in world.regular(40)], fill=colour)

    def antenna(px: float, tip: float) -> None:
        draw.line([at(px, -0.3), at(tip, -0.85)], fill=ANTENNA, width=round(0.11 * radius * scale))
        ellipse(tip, -0.86, 0.14, 0.14, form.belly)

    tips = {0: (), 1: ((0.0, 0.0),), 2: ((-0.2, -0.42), (0.2, 0.42)), 3: ((-0.2, -0.5), (0.0, 0.0), (0.2, 0.5))}[
        form.antennae
    ]
    for foot, tip in tips:
        antenna(foot, tip)
    for k in range(form.legs):
        px = 0.0 if form.legs == 1 else -0.36 + 0.72 * k / (form.legs - 1)
        ellipse(px, 0.86, 0.2, 0.13, form.belly)
    body = world.tinted(form.body, rng)
    if form.body_shape == "egg":
        ellipse(0.0, 0.2, 0.68, 0.68, body)
    else:
        draw.polygon([at(0.75 * px, 0.2 + 0.75 * py) for px, py in world.outline(form.body_shape)], fill=body)
    ellipse(0.0, 0.45, 0.42, 0.36, form.belly)
    for px in {0: (), 1: (0.0,), 2: (-0.28, 0.28), 3: (-0.46, 0.0, 0.46)}[form.eyes]:
        ellipse(px, -0.08, 0.25, 0.27, EYE)
        ellipse(px + 0.04, -0.05, 0.13, 0.15, PUPIL)
    return image.resize(size, Image.Resampling.BOX)
