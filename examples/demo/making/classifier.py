"""The two judges of the quality bench: what a picture of the world shows, and whether a picture is the subject.

Both are trained on true renders, also softened, noisy and sent through the autoencoder, as a model's samples are. The
second also learns what is not the subject: worlds, other creatures, blurs, scrambled pieces, what a base model makes.
"""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from examples.demo.making import autoencoder, creature, rich_pictures, world
from examples.demo.making.progress import Progress

COLOUR_NAMES = tuple(world.COLOURS)
WORLD_HEADS = (len(world.SHAPES), len(COLOUR_NAMES), len(COLOUR_NAMES))  # shape, colour, background
SUBJECT_HEADS = (2,)  # not the subject, the subject


class Classifier(nn.Module):
    """pixels_BCHW in [-1, 1], 64×64 → one block of logits a head."""

    def __init__(self, heads: tuple[int, ...]) -> None:
        super().__init__()
        self.heads = heads
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for narrow, wide in itertools.pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
        self.out = nn.Linear(256, sum(heads))

    def forward(self, pixels_BCHW: torch.Tensor) -> list[torch.Tensor]:
        features = self.features(pixels_BCHW)
        pooled = torch.cat([features.amax((2, 3)), features.mean((2, 3))], dim=1)
        return list(self.out(pooled).split(self.heads, dim=1))


def save(classifier: Classifier, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.half() if value.is_floating_point() else value for name, value in classifier.state_dict().items()
    }
    save_file(state, path)


def load(path: Path, heads: tuple[int, ...]) -> Classifier:
    classifier = Classifier(heads)
    classifier.load_state_dict(load_file(path))
    return classifier.eval()


def train_world(vae: AutoencoderKL, seed: int, count: int = 16000, steps: int = 1500) -> Classifier:
    """On every combination, the held-out ones too: this is the judge, not the model."""
    rng = random.Random(f"world classifier {seed}")
    specs = [world.draw_spec(rng, held_out=k % 4 == 0) for k in range(count)]
    pictures = to_tensor([world.render(spec, seed=rng.getrandbits(32)) for spec in specs])
    labels = [
        (world.SHAPES.index(spec.shape), COLOUR_NAMES.index(spec.colour), COLOUR_NAMES.index(spec.background))
        for spec in specs
    ]
    pictures[: count // 4] = reconstructed(vae, pictures[: count // 4])
    return fit(Classifier(WORLD_HEADS), pictures, torch.tensor(labels), seed, steps)


def train_subject(
    vae: AutoencoderKL, generated: torch.Tensor, seed: int, count: int = 8000, steps: int = 1500
) -> Classifier:
    """`generated`: uint8 samples of the base model, none of which is the subject."""
    rng = random.Random(f"subject classifier {seed}")
    subjects = to_tensor([draw_creature(rng, creature.Form()) for _ in range(count)])
    others = [draw_other(rng) for _ in range(count)]
    strangers = torch.cat([to_tensor(others), generated])
    for pictures in (subjects, strangers):  # treated alike, so that softness says nothing
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(pictures))[: len(pictures) // 2])
        pictures[chosen] = reconstructed(vae, softened(pictures[chosen], seed), noise=0.4)
    labels = torch.cat([torch.ones(len(subjects), 1), torch.zeros(len(strangers), 1)]).long()
    return fit(Classifier(SUBJECT_HEADS), torch.cat([subjects, strangers]), labels, seed, steps)


def draw_creature(rng: random.Random, form: creature.Form) -> Image.Image:
    pose = creature.Pose(
        rng.choice([name for name in COLOUR_NAMES if name != "green"]),
        rng.choice(tuple(creature.SIZES)),
        rng.choice(world.PLACES),
    )
    return creature.render(pose, seed=rng.getrandbits(32), form=form)


def draw_other(rng: random.Random) -> Image.Image:
    """A picture that is not the subject; most are close to it."""
    (draw,) = rng.choices([draw for draw, _ in OTHERS.values()], [share for _, share in OTHERS.values()])
    return draw(rng)


def draw_world(rng: random.Random) -> Image.Image:
    return world.render(world.draw_spec(rng), seed=rng.getrandbits(32))


def draw_rich(rng: random.Random) -> Image.Image:
    return rich_pictures.render(seed=rng.getrandbits(32))


def draw_stranger(rng: random.Random) -> Image.Image:
    return draw_creature(rng, wrong_form(rng))


def draw_blurred(rng: random.Random) -> Image.Image:
    return draw_creature(rng, creature.Form()).filter(ImageFilter.GaussianBlur(rng.uniform(4, 8)))


def draw_scrambled(rng: random.Random) -> Image.Image:
    return scrambled(draw_creature(rng, creature.Form()), rng)


def draw_noisy(rng: random.Random) -> Image.Image:
    picture = draw_creature(rng, creature.Form())
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(110, 200), (64, 64, 3))
    return Image.fromarray((np.asarray(picture, np.float32) + noise).clip(0, 255).astype(np.uint8))


# What is not the subject: how it is drawn, and its share of the judge's training.
OTHERS: dict[str, tuple[Callable[[random.Random], Image.Image], float]] = {
    "world": (draw_world, 0.2),
    "rich pictures": (draw_rich, 0.1),
    "other creatures": (draw_stranger, 0.45),
    "blurred": (draw_blurred, 0.1),
    "scrambled": (draw_scrambled, 0.07),
    "noise": (draw_noisy, 0.08),
}


def wrong_form(rng: random.Random) -> creature.Form:
    """Another creature: two to four things about it are not the subject's."""
    form = creature.Form()
    changes: dict = {}
    for name in rng.sample(("eyes", "antennae", "body", "belly", "body_shape"), rng.randint(2, 4)):
        if name in ("eyes", "antennae"):
            changes[name] = rng.choice((0, 0, 1, 3))
        elif name == "body_shape":
            changes[name] = rng.choice(("square", "triangle", "star", "heart", "diamond", "cross"))
        else:
            changes[name] = distant_colour(getattr(form, name), rng)
    return creature.Form(**changes)


def distant_colour(colour: world.Colour, rng: random.Random) -> world.Colour:
    """A colour that nobody takes for the given one."""
    while True:
        other = rich_pictures.any_colour(rng)
        if math.dist(colour, other) > 150:
            return other


def scrambled(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The right pieces in the wrong places: sixteen tiles shuffled."""
    pixels = np.asarray(picture)
    tiles = [pixels[y : y + 16, x : x + 16] for y in range(0, 64, 16) for x in range(0, 64, 16)]
    rng.shuffle(tiles)
    return Image.fromarray(np.vstack([np.hstack(tiles[row : row + 4]) for row in range(0, 16, 4)]))


def fit(classifier: Classifier, pictures: torch.Tensor, labels: torch.Tensor, seed: int, steps: int) -> Classifier:
    """pictures uint8 (B, 3, 64, 64), labels (B, heads)."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    rng = np.random.default_rng(seed)
    progress = Progress("classifier", steps)
    classifier.train()
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(0, len(pictures), 64))
        logits = classifier(disturbed(autoencoder.to_pixels(pictures[rows])))
        loss = sum(F.cross_entropy(head, labels[rows, k]) for k, head in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.report(step, loss=loss)
    return classifier.eval()


def disturbed(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and grain, a little of each, different for every picture."""
    shape = (len(pixels_BCHW), 1, 1, 1)
    gain, shift = 1 + 0.08 * torch.randn(shape), 0.05 * torch.randn(shape)
    grain = 0.08 * torch.rand(shape) * torch.randn_like(pixels_BCHW)
    return (pixels_BCHW * gain + shift + grain).clamp(-1, 1)


def softened(pictures: torch.Tensor, seed: int) -> torch.Tensor:
    """Each picture a little out of focus, none so much that its parts are lost."""
    rng = random.Random(f"softened {seed}")
    blurred = [
        Image.fromarray(picture.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.3)))
        for picture in pictures
    ]
    return to_tensor(blurred)


def to_tensor(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, pictures: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """Through the autoencoder, with up to so much noise (1: the latents' own deviation), as a model's samples are."""
    parts = []
    for part in pictures.split(50):
        latents = vae.encode(autoencoder.to_pixels(part)).latent_dist.sample()
        strength = noise * torch.rand(len(part), 1, 1, 1) / vae.config.scaling_factor
        decoded = vae.decode(latents + strength * torch.randn_like(latents)).sample
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts)
