"""Stable Diffusion 1 and 2: UNet, CLIP text encoder, autoencoder (Rombach et al. 2022).

Stages: pixels_u8 → pixels in ±1 → raw latents (mean, std) → latents (scaled) → noisy latents → prediction.
Shapes: B pictures, C channels, H × W; text is tokens_BKL (K chunks of L tokens) or embeddings text_BLD.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from everydream.models.autoencoder import Autoencoder
from everydream.models.clip import TextEncoder
from everydream.models.family import Facts
from everydream.models.files import CopyOf, FileContent, TensorFile, Unchanged
from everydream.models.layers import ATTENTION
from everydream.models.tensors import NoInit, PartReader, check_names
from everydream.models.tokenizer import Tokenize
from everydream.models.unet import UNet
from everydream.models.writing import folder_files

TRAINABLE = ("unet", "text_encoder")
NOT_ACTING = ("dtype", "torch_dtype", "transformers_version")  # keys of a config.json that say who wrote it and how


class Denoiser(nn.Module):
    """What Accelerate prepares: one module, so that several processes exchange the gradients of both parts together."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, text: Tensor, perturbation_BLD: Tensor | None = None) -> Tensor:
        """text: int64 tokens_BKL, or embeddings text_BLD made before. Returns the prediction in float32."""
        if not text.is_floating_point():
            assert self.text_encoder is not None, "the text encoder is not held: give embeddings, not tokens"
            text = self.text_encoder(text)
        if perturbation_BLD is not None:
            text = text + perturbation_BLD.to(text.dtype)
        dtype = self.unet.conv_in.weight.dtype
        return self.unet(noisy_BCHW.to(dtype), t_B, _once(text.to(dtype))).float()


class StableDiffusion:
    """A loaded model; see family.Family."""

    def __init__(
        self,
        facts: Facts,
        *,
        train: Sequence[str],
        weights_dtype: torch.dtype,
        frozen_dtype: torch.dtype,
        device: torch.device | str,
        clip_skip: int,
    ) -> None:
        assert set(train) <= set(TRAINABLE), train
        self.facts = facts
        self.tokenize = Tokenize(facts.tokenizer)
        self.scheduler_config = dict(facts.scheduler_config)
        self._device, self._clip_skip = torch.device(device), clip_skip
        self._dtypes = {part: weights_dtype if part in train else frozen_dtype for part in TRAINABLE}
        self._dtypes["vae"] = torch.float32
        # Frozen parts go into every checkpoint, perhaps after the one that they came from was removed.
        self._readers = {part: PartReader(weights) for part, weights in facts.weights.items()}
        # A frozen text encoder or VAE is read once something asks for it: with all that it makes in a cache, never.
        self.denoiser = Denoiser(self._read("unet"), None)
        self.vae: Autoencoder | None = None
        for part in train:
            self.hold(part).requires_grad_(True)
        for name in self.unused_parameters("text_encoder"):
            self.hold("text_encoder").get_parameter(name).requires_grad_(False)

    # --- text and pictures -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_text(self, tokens_BKL: Tensor) -> Tensor:
        """text_B(K·L)D in float32, for a frozen text encoder."""
        return self.hold("text_encoder")(tokens_BKL.to(self._device)).float()

    @torch.no_grad()
    def encode_pixels(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 → mean and standard deviation of the raw latents, float32, before scaling."""
        vae = self.hold("vae")
        pixels = pixels_BCHW.to(self._device, torch.float32).div(127.5).sub(1.0)
        with torch.autocast(self._device.type, enabled=False):
            return vae.encode(pixels)

    def latents(self, mean_BCHW: Tensor, std_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
        """A draw from the raw latents, scaled to about unit variance: what the UNet sees."""
        return (mean_BCHW + std_BCHW * noise_BCHW) * self.facts.configs["vae"].get("scaling_factor", 0.18215)

    # --- parts -------------------------------------------------------------------------------------------------------

    def parameters_of(self, part: str) -> dict[str, nn.Parameter]:
        """By the names of the published files."""
        return dict(self.hold(part).named_parameters())

    def unused_parameters(self, part: str) -> frozenset[str]:
        """Layers that clip_skip leaves out: no gradient reaches them, and several processes would wait for one."""
        encoder = self.denoiser.text_encoder
        if part != "text_encoder" or encoder is None:
            return frozenset()
        skipped = range(encoder.used_layers, len(encoder.text_model.encoder.layers))
        prefixes = tuple(f"text_model.encoder.layers.{i}." for i in skipped)
        return frozenset(name for name in self.parameters_of(part) if name.startswith(prefixes))

    def hold(self, part: str) -> Any:
        """The unet, text_encoder or vae: one that is not in memory is read, and stays until it is dropped."""
        owner: Any = self if part == "vae" else self.denoiser
        if getattr(owner, part) is None:
            setattr(owner, part, self._read(part))
        return getattr(owner, part)

    def digest(self, part: str) -> str:
        """Of the part's weights and configuration, from their files: no network is made for it."""
        config = self.facts.configs[part]
        acting = sorted((key, config[key]) for key in config if not key.startswith("_") and key not in NOT_ACTING)
        return hashlib.blake2b(repr((self._readers[part].digest(), acting)).encode(), digest_size=16).hexdigest()

    def drop_vae(self) -> None:
        self.vae = None

    def drop_text_encoder(self) -> None:
        self.denoiser.text_encoder = None

    def enable(
        self,
        *,
        gradient_checkpointing: bool = False,
        attn_type: str = "sdp",
        compile: bool | str = False,
        channels_last: bool = False,
        one_backward: bool = False,
    ) -> None:
        """Speed and memory; results stay the same up to rounding. compile: "max" also tunes kernels.

        Compiled for each shape by itself: a data set with n bucket sizes compiles n times, and no more than 64.
        one_backward: gradients of one backward make an update, and are dropped before the next forward. Only then may
        "max" use CUDA graphs, whose memory the gradients lie in: the next replay writes over them.
        """
        unet = self.denoiser.unet
        if channels_last:
            unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if gradient_checkpointing:
            unet.save_memory()
            if self.denoiser.text_encoder is not None:
                self.denoiser.text_encoder.gradient_checkpointing = True
        unet.set_attention(ATTENTION[attn_type]())
        if compile:
            from torch._dynamo import config

            config.recompile_limit = 64
            tuned = "max-autotune" if one_backward else "max-autotune-no-cudagraphs"
            unet.compile(dynamic=False, mode=tuned if compile == "max" else None)

    def set_sampling(self, *, prediction_type: str, zero_terminal_snr: bool) -> None:
        """What a sampler must know of the training is written into the checkpoint's scheduler config."""
        self.scheduler_config["prediction_type"] = prediction_type
        if zero_terminal_snr:  # PNDM, which SD1.5 names, knows none of these (Lin et al. 2023, sections 3.1 and 3.3)
            self.scheduler_config.pop("skip_prk_steps", None)
            self.scheduler_config |= {
                "_class_name": "DDIMScheduler",
                "clip_sample": False,
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            }

    # --- out ---------------------------------------------------------------------------------------------------------

    def files(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FileContent]:
        """The model's folder as Stable Diffusion 1.5 was published, whatever versions of the libraries are there.

        snapshot: part → published name → tensor, for the parts that were trained; the others are as they were read.
        """
        return folder_files(self.facts, self.scheduler_config, {p: self._content(p, snapshot) for p in self._readers})

    def part(self, name: str) -> Any:
        """The unet, text_encoder or vae. One that is not held is read from its file, and not kept: it is frozen."""
        module = self.vae if name == "vae" else getattr(self.denoiser, name)
        return self._read(name) if module is None else module

    def _content(self, part: str, snapshot: Mapping[str, Mapping[str, Tensor]]) -> FileContent:
        if part in snapshot:
            return TensorFile(snapshot[part])
        reader = self._readers[part]
        return CopyOf(reader.file) if reader.weights.can_be_copied else Unchanged(reader.read)

    def _read(self, part: str) -> Any:
        where = f"base_model: {self.facts.weights[part].header.path}"
        with NoInit(), torch.device("meta"):
            module = _build(part, self.facts, self._clip_skip)
        check_names(self.facts.weights[part].shapes, {n: tuple(p.shape) for n, p in module.named_parameters()}, where)
        tensors = self._readers[part].read(dtype=self._dtypes[part], device=self._device)
        module.load_state_dict(tensors, strict=True, assign=True)
        return module.requires_grad_(False).eval()


def load(
    facts: Facts,
    *,
    train: Sequence[str],
    weights_dtype: torch.dtype | None,
    frozen_dtype: torch.dtype | None,
    device: torch.device | str,
    clip_skip: int,
) -> StableDiffusion:
    """Raises ConfigError where a weight file is damaged, or does not fit its config.json."""
    return StableDiffusion(
        facts,
        train=train,
        weights_dtype=weights_dtype or torch.float32,
        frozen_dtype=frozen_dtype or torch.float32,
        device=device,
        clip_skip=clip_skip,
    )


def _once(text_BLD: Tensor) -> Tensor:
    """Cast to what autocast computes in, here rather than in each of the UNet's 32 layers that read it.

    Not where a gradient comes back: the layers' own casts let it be added up in float32.
    """
    device = text_BLD.device.type
    if text_BLD.requires_grad or not torch.is_autocast_enabled(device):
        return text_BLD
    return text_BLD.to(torch.get_autocast_dtype(device))


def _build(part: str, facts: Facts, clip_skip: int) -> nn.Module:
    if part == "text_encoder":
        return TextEncoder(facts.configs[part], clip_skip)
    return {"unet": UNet, "vae": Autoencoder}[part](facts.configs[part])
