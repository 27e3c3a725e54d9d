"""What every model family offers, the table of families, and the facts of a base model.

Facts come from JSON files and safetensors headers alone, without torch, so that settings and data can be checked
against a model in milliseconds. `load` imports the family's module and reads the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from everydream.errors import ConfigError
from everydream.models import folder, original, sources
from everydream.models.tokenizer import Tokenize, TokenizerFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from everydream.models.files import FileContent


@dataclass(frozen=True)
class FamilyRow:
    name: str
    module: str  # has load(facts, …) -> Family
    pipeline: str  # the diffusers class that model_index.json names


FAMILIES: dict[str, FamilyRow] = {
    row.name: row for row in (FamilyRow("stable_diffusion", "everydream.models.sd", "StableDiffusionPipeline"),)
}


@dataclass(frozen=True)
class Facts:
    """A base model without its weights. Sizes in pixels unless they say otherwise."""

    family: str
    path: Path
    configs: Mapping[str, Mapping[str, Any]]  # unet, vae, text_encoder, scheduler, model_index
    weights: Mapping[str, sources.PartWeights]  # part → where its tensors lie
    tokenizer: TokenizerFiles
    prediction_type: str  # "epsilon" | "v_prediction" | "sample"
    resolution: int
    notes: tuple[str, ...] = field(default=())

    @property
    def vae_factor(self) -> int:
        """Pixels a latent pixel."""
        return 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)

    @property
    def unet_factor(self) -> int:
        """The UNet halves the latents this many times over; both sides must divide by it."""
        return 2 ** (len(self.configs["unet"]["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.configs["vae"].get("latent_channels", 4)

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler_config.get("num_train_timesteps", 1000)

    @property
    def max_tokens(self) -> int:
        """Tokens a chunk, the two marks included."""
        return self.configs["text_encoder"].get("max_position_embeddings", 77)

    @property
    def text_width(self) -> int:
        return self.configs["text_encoder"]["hidden_size"]

    @property
    def text_layers(self) -> int:
        return self.configs["text_encoder"]["num_hidden_layers"]

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return {**self.configs["scheduler"], "prediction_type": self.prediction_type}

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Part → published name → shape."""
        return {part: dict(weights.shapes) for part, weights in self.weights.items()}


class Family(Protocol):
    """What the trainer asks of a loaded model. Shapes: B pictures, C channels, K chunks of L tokens, text width D."""

    facts: Facts
    tokenize: Tokenize
    denoiser: nn.Module
    vae: nn.Module | None  # None until it is asked for
    scheduler_config: dict[str, Any]  # what files() writes; set_sampling adds what the training changed

    def encode_text(self, tokens_BKL: Tensor) -> Tensor: ...
    def encode_pixels(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]: ...
    def latents(self, mean_BCHW: Tensor, std_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor: ...
    def hold(self, part: str) -> Any: ...
    def digest(self, part: str) -> str: ...
    def drop_vae(self) -> None: ...
    def drop_text_encoder(self) -> None: ...
    def enable(
        self,
        *,
        gradient_checkpointing: bool,
        attn_type: str,
        compile: bool | str,
        channels_last: bool,
        one_backward: bool,
    ) -> None: ...
    def parameters_of(self, part: str) -> dict[str, nn.Parameter]: ...
    def unused_parameters(self, part: str) -> frozenset[str]: ...
    def set_sampling(self, *, prediction_type: str, zero_terminal_snr: bool) -> None: ...
    def part(self, name: str) -> Any: ...
    def files(self, snapshot: Mapping[str, Mapping[str, Tensor]]) -> dict[str, FileContent]: ...


def read_facts(
    base_model: str,
    revision: str | None = None,
    allow_pickle: bool = False,
    prediction_type: str | None = None,
) -> Facts:
    """Facts of a diffusers folder, an original single file, or a hub id. Raises ConfigError with what to do.

    prediction_type: what the settings say; only needed where the model does not say it itself.
    """
    path = sources.locate(base_model, revision=revision, allow_pickle=allow_pickle)
    reader = folder.read if path.is_dir() else original.read
    found = reader(path, allow_pickle=allow_pickle, prediction_type=prediction_type)
    row = next((row for row in FAMILIES.values() if row.pipeline == found.pipeline), None)
    if row is None:
        known = ", ".join(row.pipeline for row in FAMILIES.values())
        raise ConfigError(f"base_model: {path} is a {found.pipeline}; this version trains {known}")
    facts = Facts(
        family=row.name,
        path=path,
        configs=found.configs,
        weights=found.weights,
        tokenizer=found.tokenizer,
        prediction_type=found.prediction_type,
        resolution=found.resolution,
        notes=found.notes,
    )
    channels = (facts.configs["unet"].get("in_channels"), facts.configs["unet"].get("out_channels"))
    if channels != (facts.latent_channels,) * 2:
        raise ConfigError(
            f"base_model: {path} takes {channels[0]} channels for {facts.latent_channels} latent ones: "
            "inpainting, depth and upscaling models cannot be trained"
        )
    return facts


def tokenizer_for(facts: Facts) -> Tokenize:
    return Tokenize(facts.tokenizer)


def load(
    facts: Facts,
    *,
    train: Sequence[str] = ("unet", "text_encoder"),
    weights_dtype: torch.dtype | None = None,
    frozen_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    clip_skip: int = 0,
) -> Family:
    """The model with its weights: parts in `train` with gradients and in weights_dtype, the others frozen.

    Of the frozen ones the text encoder and the VAE are read once something asks for them (hold, encode_…, part).

    weights_dtype and frozen_dtype default to float32. The VAE
    stays in float32: its latents are made once, and in bfloat16 they are not what the model was trained on.
    """
    module = importlib.import_module(FAMILIES[facts.family].module)
    return module.load(
        facts,
        train=tuple(train),
        weights_dtype=weights_dtype,
        frozen_dtype=frozen_dtype,
        device=device,
        clip_skip=clip_skip,
    )
