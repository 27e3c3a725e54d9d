"""Trains the demo's autoencoder: 64×64 pixels → 16×16 latents of 4 channels, as Stable Diffusion's but half as deep.

Shapes: B batch, C channels, H and W pixels; pixels are in [-1, 1].
"""

import copy
import math
import random
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import distributed
from torch.nn import functional as F

from examples.demo.making import parallel, rich_pictures, world
from examples.demo.making.progress import Progress

# Eight channels a group at most times; with Stable Diffusion's 32 groups the 16-channel level could not be normalised,
# and one channel a group would forget each channel's mean, which is the colour.
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 48, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
}


def train(model: AutoencoderKL, seed: int, steps: int, batch: int = 64, decoder_only: bool = False) -> None:
    """Trains in place, on three parts rich pictures and one part of the world.

    Crops of 32 pixels for the first 80 % of the steps: four times as many edges for the time. With decoder_only the
    latents stay what they are, so that a UNet trained on them stays right.
    """
    pictures_BCHW = draw_pictures(seed, rich=9000, plain=3000)
    model.share_memory()
    parallel.run(train_part, model, pictures_BCHW, seed, steps, batch, decoder_only)
    model.eval()


def train_part(
    rank: int, shared: AutoencoderKL, pictures_BCHW: torch.Tensor, seed: int, steps: int, batch: int, decoder_only: bool
) -> None:
    """One process's share of the training; the first one writes the outcome back."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = copy.deepcopy(shared).to(device)
    if decoder_only:
        model.encoder.requires_grad_(False)
        model.quant_conv.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    processes = distributed.get_world_size()
    torch.manual_seed(seed * processes + rank)
    rng = np.random.default_rng(seed * processes + rank)
    progress = Progress("vae", steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01)
        side, count = (32, batch) if step < 0.8 * steps else (64, batch // 4)
        pixels_BCHW = to_pixels(crops(pictures_BCHW, side, count // processes, rng)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(pixels_BCHW).latent_dist
            decoded_BCHW = model.decode(posterior.sample()).sample.float()
        loss = reconstruction_loss(decoded_BCHW, pixels_BCHW) + 1e-4 * kl(posterior)
        loss.backward()
        parallel.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            progress.report(step, loss=loss, l1=(decoded_BCHW - pixels_BCHW).abs().mean())
        if rank == 0 and (step % 250 == 249 or step + 1 == steps):
            shared.load_state_dict(model.state_dict())


def reconstruction_loss(decoded_BCHW: torch.Tensor, pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, and the absolute error of the slopes, which keeps edges and small things sharp."""
    error = decoded_BCHW - pixels_BCHW
    slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * slopes


def kl(posterior) -> torch.Tensor:
    """Kullback-Leibler divergence to a standard normal, mean over the latent's elements."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


@torch.no_grad()
def measure_scaling(model: AutoencoderKL, seed: int, count: int = 500) -> float:
    """The scaling_factor that gives the latents of the world's pictures a standard deviation of one."""
    pictures_BCHW = draw_pictures(seed, rich=0, plain=count)
    latents = [model.encode(to_pixels(part)).latent_dist.mean for part in pictures_BCHW.split(50)]
    return round(1 / torch.cat(latents).std().item(), 5)


def draw_pictures(seed: int, rich: int, plain: int) -> torch.Tensor:
    """uint8 pictures (B, 3, 64, 64): rich ones first, then the world's."""
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(draw_rich, range(seed * 10**6, seed * 10**6 + rich), chunksize=100)
        arrays = list(drawn)
    rng = random.Random(f"autoencoder {seed}")
    arrays += [np.asarray(world.render(world.draw_spec(rng), seed=rng.getrandbits(32))) for _ in range(plain)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def draw_rich(seed: int) -> np.ndarray:
    return np.asarray(rich_pictures.render(seed=seed))


def crops(pictures_BCHW: torch.Tensor, side: int, batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Random square crops of random pictures, every second one mirrored."""
    chosen = []
    for index in rng.integers(0, len(pictures_BCHW), batch):
        y, x = rng.integers(0, pictures_BCHW.shape[2] - side + 1, 2)
        crop = pictures_BCHW[index, :, y : y + side, x : x + side]
        chosen.append(crop.flip(-1) if rng.random() < 0.5 else crop)
    return torch.stack(chosen)


def to_pixels(u8_BCHW: torch.Tensor) -> torch.Tensor:
    return u8_BCHW.float() / 127.5 - 1


@torch.no_grad()
def peak_signal_to_noise(model: AutoencoderKL, u8_BCHW: torch.Tensor) -> float:
    """Of reconstructions from the latents' means, in decibels (pixels of range one)."""
    pixels_BCHW = to_pixels(u8_BCHW)
    decoded_BCHW = torch.cat(
        [model.decode(model.encode(part).latent_dist.mean).sample for part in pixels_BCHW.split(50)]
    )
    return -10 * math.log10(F.mse_loss(decoded_BCHW.clamp(-1, 1) / 2, pixels_BCHW / 2).item())
