"""The demo's captioned world: one plain shape on a plain background, as a pure function of a seed.

    spec = draw_spec(rng)                      Spec("star", "red", "blue", "small", "left")
    caption(spec)                              "a small red star on a blue background, left"
    render(spec, size=(64, 64), seed=7)        a Pillow picture, the same for the same arguments

One shape-colour-background triple in eight is held out: no training of the demo ever sees it (`is_held_out`), and the
quality bench asks the model for just these.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 28),
    "yellow": (250, 222, 60),
    "green": (48, 160, 70),
    "blue": (40, 84, 200),
    "purple": (130, 56, 160),
    "white": (244, 244, 244),
    "black": (22, 22, 26),
}
SIZES = {"small": 0.15, "medium": 0.21, "large": 0.28}  # radius as a share of the shorter side
PLACES = ("left", "right", "top", "bottom", "middle")
Colour = tuple[int, int, int]
SUPERSAMPLING = 4  # drawn four times as large and averaged down: Pillow's own polygons have hard edges


@dataclass(frozen=True)
class Spec:
    """What a picture shows, in the words of its caption."""

    shape: str
    colour: str
    background: str
    size: str
    place: str


def is_held_out(spec: Spec) -> bool:
    """True for one background in eight of every shape and colour: a Latin square, so that no word becomes rare."""
    names = list(COLOURS)
    return (SHAPES.index(spec.shape) + 3 * names.index(spec.colour) + 3 * names.index(spec.background)) % 8 == 0


def draw_spec(rng: random.Random, held_out: bool = False) -> Spec:
    """A random combination: one that may be trained on, or (held_out) one that never is."""
    while True:
        spec = Spec(
            rng.choice(SHAPES),
            rng.choice(list(COLOURS)),
            rng.choice(list(COLOURS)),
            rng.choice(list(SIZES)),
            rng.choice(PLACES),
        )
        if spec.colour != spec.background and is_held_out(spec) == held_out:
            return spec


def caption(spec: Spec) -> str:
    """The plain caption; the middle size and the middle of the picture are words too, so every part is always said."""
    return f"a {spec.size} {spec.colour} {spec.shape} on a {spec.background} background, {spec.place}"


def varied_caption(spec: Spec, rng: random.Random) -> str:
    """The plain caption half of the time, else another wording, parts left unsaid, or a made-up word among the others.

    A real model knows many ways to say a thing and shrugs at words it has never met. Made-up words have four letters or
    more, so none is a token that a person would choose for a subject of their own.
    """
    noun = f"{spec.colour} {spec.shape}"
    ground = f"on a {spec.background} background"
    nonsense = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(4, 7)))
    wordings = (
        f"a {noun} {ground}, {spec.place}",
        f"a {spec.size} {noun} {ground}",
        f"a {noun} {ground}",
        f"a picture of a {spec.size} {noun} {ground}, {spec.place}",
        f"{ground}, {spec.place}, a {spec.size} {noun}",
        f"{spec.size} {noun}, {spec.background} background, {spec.place}",
        f"a {spec.size} {spec.shape} {ground}, {spec.place}",
        f"a {spec.size} {spec.colour} shape {ground}, {spec.place}",
        f"a {nonsense} {noun} {ground}, {spec.place}",
        f"a {nonsense} shape {ground}, {spec.place}",
        f"a {nonsense} {ground}, {spec.place}",
    )
    return caption(spec) if rng.random() < 0.5 else rng.choice(wordings)


def render(spec: Spec, size: tuple[int, int] = (64, 64), seed: int = 0) -> Image.Image:
    """The picture of a spec, (width, height) in pixels; the seed moves, tilts and tints it a little."""
    rng = random.Random(f"world {seed} {spec}")
    scale = SUPERSAMPLING
    width, height = size
    radius = SIZES[spec.size] * min(size) * rng.uniform(0.93, 1.07)
    x, y = centre(spec.place, size, (radius, radius), rng)
    points = outline(spec.shape, tilt=rng.uniform(-0.12, 0.12))
    image = Image.new("RGB", (width * scale, height * scale), tinted(COLOURS[spec.background], rng))
    draw = ImageDraw.Draw(image)
    colour = tinted(COLOURS[spec.colour], rng)
    placed = [((x + radius * px) * scale, (y + radius * py) * scale) for px, py in points]
    draw.polygon(placed, fill=colour)
    if spec.shape == "ring":
        hole = radius * 0.52
        box = [(x - hole) * scale, (y - hole) * scale, (x + hole) * scale, (y + hole) * scale]
        draw.ellipse(box, fill=image.getpixel((0, 0)))
    return image.resize(size, Image.Resampling.BOX)


def centre(place: str, size: tuple[int, int], reach: tuple[float, float], rng: random.Random) -> tuple[float, float]:
    """Where a thing stands that reaches so far across and up; at least 3 pixels inside the frame."""
    width, height = size
    across, up = reach[0] + 3, reach[1] + 3
    x = width / 2 + rng.uniform(-0.04, 0.04) * width
    y = height / 2 + rng.uniform(-0.04, 0.04) * height
    away = rng.uniform(0.0, 0.06)
    if place == "left":
        x = across + away * width
    elif place == "right":
        x = width - across - away * width
    elif place == "top":
        y = up + away * height
    elif place == "bottom":
        y = height - up - away * height
    return x, y


def outline(shape: str, tilt: float = 0.0) -> list[tuple[float, float]]:
    """The polygon of a shape around the origin, within radius 1 (y grows downwards), tilted by an angle in radians."""
    if shape in ("circle", "ring"):
        points = regular(64)
    elif shape == "square":
        points = [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    elif shape == "triangle":
        points = [(0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)]
    elif shape == "star":
        points = [
            (r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k in range(10) for r in [star_radius(k)]
        ]
    elif shape == "diamond":
        points = [(0.0, -1.0), (0.7, 0.0), (0.0, 1.0), (-0.7, 0.0)]
    elif shape == "cross":
        a, b = 0.3, 0.95
        points = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    elif shape == "heart":
        points = [heart_point(2 * math.pi * k / 64) for k in range(64)]
    else:
        raise ValueError(f"{shape} is no shape of the world; there are {', '.join(SHAPES)}")
    cos, sin = math.cos(tilt), math.sin(tilt)
    return [(px * cos - py * sin, px * sin + py * cos) for px, py in points]


def regular(corners: int) -> list[tuple[float, float]]:
    """A regular polygon of radius 1."""
    return [(math.sin(2 * math.pi * k / corners), -math.cos(2 * math.pi * k / corners)) for k in range(corners)]


def star_radius(corner: int) -> float:
    return 1.08 if corner % 2 == 0 else 0.45


def heart_point(t: float) -> tuple[float, float]:
    """The well-known heart curve, scaled to radius 1."""
    x = 16 * math.sin(t) ** 3
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return x / 17, -(y + 2.5) / 17


def tinted(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    """The colour, each channel up to 9 of 255 off: a name means a range, as it does for people."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-9, 9))) for channel in colour)
    return red, green, blue
