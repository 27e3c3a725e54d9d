"""Trains the demo's text encoder and UNet together on the captioned world, in the latents of the demo's autoencoder.

Shapes: B batch, L tokens, D text width, C latent channels, H and W latent pixels.
"""

import copy
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import distributed
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.demo.making import autoencoder, parallel, world
from examples.demo.making.progress import Progress

# Stable Diffusion 1's order of blocks, one level less. Eight groups: see autoencoder.py.
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,  # heads, as in Stable Diffusion 1; four cost a quarter more time
    "cross_attention_dim": 96,
}
TEXT_ENCODER = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 96,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
}
PICTURE_SIZES = {(64, 64): 12800, (48, 80): 1600, (80, 48): 1600}  # one batch in five is not square
CAPTIONS_EACH = 4
CAPTION_DROPOUT = 0.1  # for classifier-free guidance
SHORT = 24  # tokens; every caption fits, and two batches in three are cut to it: a fifth less time
PARTS = {
    "shape": world.SHAPES,
    "colour": tuple(world.COLOURS),
    "background": tuple(world.COLOURS),
    "size": tuple(world.SIZES),
    "place": world.PLACES,
}
UNSAID = -100  # what cross_entropy ignores


@dataclass
class Latents:
    """All pictures of one size, encoded once: mean and standard deviation, so that each step draws anew."""

    mean_BCHW: torch.Tensor
    std_BCHW: torch.Tensor
    tokens_BKL: torch.Tensor  # K wordings of each picture's caption
    said_BKP: torch.Tensor  # what each wording says of P parts, as indices, UNSAID where it says nothing


def new(tokenizer: CLIPTokenizer, seed: int) -> torch.nn.ModuleDict:
    """An untrained text encoder and UNet."""
    torch.manual_seed(seed)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT_ENCODER, **ends))
    return torch.nn.ModuleDict({"unet": UNet2DConditionModel(**UNET), "text_encoder": text_encoder})


def train(
    model: torch.nn.ModuleDict,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seed: int,
    steps: int,
    word_steps: int = 800,
    batch: int = 24,
) -> None:
    """Trains in place and leaves the averaged weights (EMA). The autoencoder's scaling_factor must be set."""
    model.share_memory()
    parallel.run(train_part, model, vae, tokenizer, seed, steps, word_steps, batch)
    model.eval()


def train_part(
    rank: int,
    averaged: torch.nn.ModuleDict,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seed: int,
    steps: int,
    word_steps: int,
    batch: int,
) -> None:
    """One process's share: its own pictures, its part of each batch; the first one keeps the average."""
    processes = distributed.get_world_size()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = copy.deepcopy(averaged).to(device).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameter_groups(model), betas=(0.9, 0.99))
    own_seed = seed * processes + rank
    torch.manual_seed(own_seed)
    rng = np.random.default_rng(own_seed)
    pools = [
        encode(vae.to(device), tokenizer, size, count // processes, own_seed, device)
        for size, count in PICTURE_SIZES.items()
    ]
    share = np.array(list(PICTURE_SIZES.values())) / sum(PICTURE_SIZES.values())
    empty_L = tokenize(tokenizer, [""])[0].to(device)
    alphas_cumprod = DDPMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    learn_words(model["text_encoder"], pools[0], empty_L, rng, rank, word_steps)
    chances_T, weights_T = high_noise_first(alphas_cumprod)
    progress = Progress("model", steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        latents_BCHW, tokens_BL = draw(pools[rng.choice(len(pools), p=share)], batch // processes, empty_L, rng)
        tokens_BL = tokens_BL[:, :SHORT] if rng.random() < 2 / 3 else tokens_BL
        latents_BCHW = latents_BCHW * vae.config.scaling_factor
        noise_BCHW = torch.randn_like(latents_BCHW)
        t_B = torch.multinomial(chances_T, len(latents_BCHW), replacement=True)
        abar_B111 = alphas_cumprod[t_B].view(-1, 1, 1, 1)
        noisy_BCHW = abar_B111.sqrt() * latents_BCHW + (1 - abar_B111).sqrt() * noise_BCHW
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # on a CPU a third slower
            text_BLD = model["text_encoder"](tokens_BL)[0]
            predicted_BCHW = model["unet"](noisy_BCHW, t_B, text_BLD).sample
        loss = (weights_T[t_B] * (predicted_BCHW.float() - noise_BCHW).square().mean((1, 2, 3))).mean()
        loss.backward()
        parallel.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            update_average(averaged, model, decay=min(0.998, (step + 1) / (step + 10)))
            progress.report(step, loss=loss)


def learn_words(
    text_encoder: CLIPTextModel,
    pool: Latents,
    empty_L: torch.Tensor,
    rng: np.random.Generator,
    rank: int,
    steps: int,
) -> None:
    """Before the pictures, what CLIP's own training gives a text encoder: states from which the meaning can be read.

    From every state at and after the end of the text, linear heads (thrown away afterwards) must tell each part said.
    Without this the UNet learns to draw long before it learns to listen.
    """
    device = empty_L.device
    heads = torch.nn.Linear(TEXT_ENCODER["hidden_size"], sum(map(len, PARTS.values()))).to(device)
    parameters = [*text_encoder.parameters(), *heads.parameters()]
    for parameter in heads.parameters():
        distributed.broadcast(parameter.data, 0)
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.99), weight_decay=0.0)
    progress = Progress("words", steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        rows, wordings = draw_rows(pool, 32 // distributed.get_world_size(), rng)
        tokens_BL, said_BP = pool.tokens_BKL[rows, wordings], pool.said_BKP[rows, wordings]
        ended_BL = (tokens_BL == empty_L[-1]).float()
        states_BLD = text_encoder(tokens_BL)[0]
        logits_BLN = heads(states_BLD).split([len(names) for names in PARTS.values()], dim=-1)
        loss = torch.zeros((), device=device)
        for k, part_BLN in enumerate(logits_BLN):
            errors_BL = F.cross_entropy(part_BLN.mT, said_BP[:, k, None].expand_as(tokens_BL), reduction="none")
            loss = loss + (errors_BL * ended_BL).sum() / ended_BL.sum()
        loss.backward()
        parallel.average_gradients(parameters)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            progress.report(step, loss=loss)


def high_noise_first(alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How often to draw each timestep and how much its error counts: together 1/√ᾱ, half way from epsilon to v.

    Only near pure noise does a model of this world need its caption, and there plain epsilon errors hardly count; but
    with v's (1/ᾱ, Salimans & Ho 2022, §4) the shapes, which are drawn at middle noise, come late.
    """
    roots_T = alphas_cumprod**-0.25
    chances_T = roots_T / roots_T.sum()
    return chances_T, roots_T / (chances_T * roots_T).sum()


def parameter_groups(model: torch.nn.ModuleDict) -> list[dict]:
    """The text encoder knows its words and learns at a fifth of the UNet's rate.

    No decay on embeddings: it would pull those of tokens that no caption has to zero.
    """
    groups = []
    for part, lr in (("unet", 1e-3), ("text_encoder", 2e-4)):
        named = list(model[part].named_parameters())
        for decay in (True, False):
            parameters = [p for name, p in named if (p.ndim > 1 and "embedding" not in name) == decay]
            groups.append({"params": parameters, "weight_decay": 0.01 * decay, "lr": lr, "peak_lr": lr})
    return groups


@torch.no_grad()
def update_average(averaged: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    theirs = [p.to("cpu") for p in model.parameters()]
    torch._foreach_lerp_(list(averaged.parameters()), theirs, 1 - decay)


@torch.no_grad()
def encode(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, size: tuple[int, int], count: int, seed: int, device: torch.device
) -> Latents:
    """Draws pictures of the world that may be trained on, and their captions in several wordings."""
    rng = random.Random(f"base model {seed} {size}")
    specs = [world.draw_spec(rng) for _ in range(count)]
    wordings = [
        world.caption(spec) if k == 0 else world.varied_caption(spec, rng)
        for spec in specs
        for k in range(CAPTIONS_EACH)
    ]
    tokens_BKL = tokenize(tokenizer, wordings).view(count, CAPTIONS_EACH, -1)
    assert (tokens_BKL[..., SHORT - 1] == tokenizer.eos_token_id).all(), f"a caption has more than {SHORT} tokens"
    said_BKP = torch.tensor([said(wording, specs[n // CAPTIONS_EACH]) for n, wording in enumerate(wordings)])
    said_BKP = said_BKP.view(count, CAPTIONS_EACH, -1)
    means, stds = [], []
    for start in range(0, count, 100):
        drawn = [np.asarray(world.render(spec, size, rng.getrandbits(32))) for spec in specs[start : start + 100]]
        pixels_BCHW = autoencoder.to_pixels(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).to(device))
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels_BCHW).latent_dist
        means.append(posterior.mean.float())
        stds.append(posterior.std.float())
    print(f"encoded {count} pictures of {size[0]}×{size[1]}", flush=True)
    return Latents(torch.cat(means), torch.cat(stds), tokens_BKL.to(device), said_BKP.to(device))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    ids = tokenizer(captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True).input_ids
    return torch.tensor(ids)


def said(wording: str, spec: world.Spec) -> list[int]:
    """Which of its parts' names each caption says, in the order of PARTS."""
    words = wording.replace(",", " ").split()
    spoken = {
        "colour": f"{spec.colour} {spec.shape}" in wording or f"{spec.colour} shape" in wording,
        "background": True,
    }
    return [
        names.index(getattr(spec, part)) if spoken.get(part, getattr(spec, part) in words) else UNSAID
        for part, names in PARTS.items()
    ]


def draw_rows(pool: Latents, batch: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures and one random wording for each."""
    return torch.from_numpy(rng.integers(0, len(pool.mean_BCHW), batch)), torch.from_numpy(
        rng.integers(0, CAPTIONS_EACH, batch)
    )


def draw(
    pool: Latents, batch: int, empty_L: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures of a pool, each with one of its captions or, now and then, with none."""
    rows, wordings = draw_rows(pool, batch, rng)
    mean_BCHW = pool.mean_BCHW[rows]
    tokens_BL = pool.tokens_BKL[rows, wordings]
    dropped_B = torch.from_numpy(rng.random(batch) < CAPTION_DROPOUT).to(tokens_BL.device)
    tokens_BL = torch.where(dropped_B[:, None], empty_L, tokens_BL)
    return mean_BCHW + pool.std_BCHW[rows] * torch.randn_like(mean_BCHW), tokens_BL
