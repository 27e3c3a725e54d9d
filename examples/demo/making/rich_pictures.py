"""Pictures richer than the captioned world, for the autoencoder alone: any colour, gradients, textures, many shapes.

An autoencoder trained on the world's eight colours cannot decode a person's own pictures, whatever the UNet learns.
"""

import colorsys
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from examples.demo.making import world


def render(size: tuple[int, int] = (64, 64), seed: int = 0) -> Image.Image:
    """A random composition, (width, height) in pixels; the same for the same arguments."""
    rng = random.Random(f"rich {seed}")
    scale = world.SUPERSAMPLING
    large = (size[0] * scale, size[1] * scale)
    image = ground(large, rng)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.choice((1, 1, 2, 3, 4, 6))):
        x, y = rng.uniform(0.1, 0.9) * large[0], rng.uniform(0.1, 0.9) * large[1]
        radius = min(large) * rng.choice((0.08, 0.14, 0.2, 0.3, 0.4)) * rng.uniform(0.8, 1.2)
        thing(draw, x, y, radius, rng)
    for _ in range(rng.choice((0, 0, 1, 3))):
        line(draw, large, rng)
    image = image.resize(size, Image.Resampling.BOX)
    if rng.random() < 0.1:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
    if rng.random() < 0.15:
        image = grain(image, rng)
    return image


def thing(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, rng: random.Random) -> None:
    """A shape, stretched and turned freely, often with an outline, stripes of other shapes or dots on it."""
    shape = rng.choice((*world.SHAPES, "ellipse", "polygon"))
    points = world.outline(shape, rng.uniform(0, 2 * math.pi)) if shape in world.SHAPES else freehand(shape, rng)
    stretch = rng.uniform(0.55, 1.0) if rng.random() < 0.5 else 1.0
    placed = [(x + radius * px, y + radius * stretch * py) for px, py in points]
    draw.polygon(placed, fill=any_colour(rng))
    if rng.random() < 0.25:
        draw.line([*placed, placed[0]], fill=any_colour(rng), width=rng.randint(3, 10))
    for _ in range(rng.choice((0, 0, 1, 2, 3, 5))):
        dot = radius * rng.uniform(0.08, 0.4) + 3
        cx, cy = x + radius * rng.uniform(-0.6, 0.6), y + radius * rng.uniform(-0.6, 0.6)
        draw.ellipse([cx - dot, cy - dot * stretch, cx + dot, cy + dot * stretch], fill=any_colour(rng))


def freehand(shape: str, rng: random.Random) -> list[tuple[float, float]]:
    """An ellipse, or a polygon of random radii."""
    corners = 48 if shape == "ellipse" else rng.randint(3, 9)
    return [
        (px * r, py * r) for px, py in world.regular(corners) for r in [1.0 if corners == 48 else rng.uniform(0.4, 1)]
    ]


def line(draw: ImageDraw.ImageDraw, size: tuple[int, int], rng: random.Random) -> None:
    """A thin line or arc, one to three pixels wide in the finished picture."""
    x0, y0 = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    x1, y1 = x0 + rng.uniform(-0.4, 0.4) * size[0], y0 + rng.uniform(-0.4, 0.4) * size[1]
    width = rng.randint(4, 12)
    if rng.random() < 0.5:
        draw.line([x0, y0, x1, y1], fill=any_colour(rng), width=width)
    else:
        box = [min(x0, x1), min(y0, y1), max(x0, x1) + 8, max(y0, y1) + 8]
        draw.arc(box, rng.uniform(0, 180), rng.uniform(200, 360), fill=any_colour(rng), width=width)


def ground(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A background: plain, gradient, two halves, stripes, a chequerboard or soft clouds."""
    width, height = size
    first, second = (np.array(any_colour(rng), np.float32) for _ in range(2))
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    kind = rng.choice(("plain", "plain", "plain", "gradient", "gradient", "halves", "stripes", "chequers", "clouds"))
    period = min(size) * rng.uniform(0.12, 0.5)
    if kind == "plain":
        blend = np.zeros_like(x)
    elif kind == "gradient":
        blend = (along - along.min()) / (along.max() - along.min())
    elif kind == "halves":
        blend = (along > rng.uniform(0.3, 0.7) * along.max()).astype(np.float32)
    elif kind == "stripes":
        blend = (along % period > period / 2).astype(np.float32)
    elif kind == "chequers":
        blend = ((x // (period / 2) + y // (period / 2)) % 2).astype(np.float32)
    else:
        coarse = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (5, 5), np.uint8)
        blend = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    pixels = first + (second - first) * blend[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def grain(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(2, 8), (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image, np.float32) + noise).clip(0, 255).astype(np.uint8))


def any_colour(rng: random.Random) -> world.Colour:
    """Half of the time strong, half of the time anything."""
    if rng.random() < 0.5:
        channels = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(0.4, 1))
        return tuple(round(255 * channel) for channel in channels)  # type: ignore[return-value]
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)
