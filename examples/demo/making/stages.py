"""The steps in which the demo is made. What one step hands to the next lies in OUT/build, which git ignores."""

import argparse
import random
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from examples.demo.making import autoencoder, base_model, classifier, folder, pictures, tokenizer, world


def make_pictures(options: argparse.Namespace) -> None:
    pictures.write_subject(options.out / "subject", options.seed)
    pictures.write_class(options.out / "class", options.seed)


def make_tokenizer(options: argparse.Namespace) -> None:
    tokenizer.write(options.out / "build" / "tokenizer", options.seed)


def make_vae(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    vae = AutoencoderKL(**autoencoder.CONFIG)
    autoencoder.train(vae, options.seed, options.vae_steps)
    vae.register_to_config(scaling_factor=autoencoder.measure_scaling(vae, options.seed))
    vae.save_pretrained(options.out / "build" / "vae")
    report(vae)


def make_model(options: argparse.Namespace) -> None:
    build = options.out / "build"
    vae = AutoencoderKL.from_pretrained(build / "vae").eval()
    words = CLIPTokenizer.from_pretrained(build / "tokenizer")
    model = base_model.new(words, options.seed)
    base_model.train(model, vae, words, options.seed, options.model_steps)
    folder.write(options.out / "base_model", vae, model["text_encoder"], model["unet"], build / "tokenizer")


def make_decoder(options: argparse.Namespace) -> None:
    """A second training of the decoder alone: the UNet's latents stay as they are, and small things become sharper."""
    build = options.out / "build"
    vae = AutoencoderKL.from_pretrained(build / "vae")
    autoencoder.train(vae, options.seed + 1, options.decoder_steps, decoder_only=True)
    report(vae)
    pipe = StableDiffusionPipeline.from_pretrained(options.out / "base_model")
    folder.write(options.out / "base_model", vae, pipe.text_encoder, pipe.unet, build / "tokenizer")


def make_judges(options: argparse.Namespace) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(options.out / "base_model")
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    options.judges.mkdir(parents=True, exist_ok=True)
    classifier.save(classifier.train_world(pipe.vae, options.seed), options.judges / "world.safetensors")
    generated = generate(pipe, options.seed, 600)
    classifier.save(classifier.train_subject(pipe.vae, generated, options.seed), options.judges / "subject.safetensors")


def generate(pipe: StableDiffusionPipeline, seed: int, count: int) -> torch.Tensor:
    """What the base model makes of the world's captions and of made-up words: uint8 (B, 3, 64, 64)."""
    rng = random.Random(f"generate {seed}")
    parts = []
    for start in range(0, count, 50):
        specs = [world.draw_spec(rng) for _ in range(min(50, count - start))]
        prompts = [world.varied_caption(spec, rng) for spec in specs]
        noise = torch.Generator().manual_seed(seed * 10**6 + start)
        out = pipe(
            prompts, height=64, width=64, num_inference_steps=12, guidance_scale=4.0, generator=noise, output_type="pt"
        )
        parts.append(out.images.float().mul(255).round().byte())
    return torch.cat(parts)


def report(vae: AutoencoderKL) -> None:
    """Peak signal to noise of pictures that no training has seen."""
    unseen = autoencoder.draw_pictures(999, rich=100, plain=100)
    rich, plain = (autoencoder.peak_signal_to_noise(vae, part) for part in unseen.split(100))
    print(f"reconstruction: rich pictures {rich:.1f} dB, the world's {plain:.1f} dB", flush=True)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "pictures": make_pictures,
    "tokenizer": make_tokenizer,
    "vae": make_vae,
    "model": make_model,
    "decoder": make_decoder,
    "judges": make_judges,
}
