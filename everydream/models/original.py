"""An original single file (CompVis, Stability) as base model: which model it is, told by its metadata or its names.

Files that everydream wrote carry their configuration; for others it is Stable Diffusion 1.5's or 2.1's, which are part
of the package, as CLIP's tokenizer is. No hub is asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everydream.errors import ConfigError
from everydream.models.json_files import read_json
from everydream.models.sources import Found, Header, PartWeights, read_header
from everydream.models.tokenizer import END, TokenizerFiles, clip_tokenizer
from everydream.models.weights import root, to_published

CONFIG_KEY = "everydream.model"  # in our files' metadata: the configs as JSON, and the tokenizer if it is not CLIP's
PUBLISHED = Path(__file__).with_name("published")
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_ENCODERS = {
    "cond_stage_model.transformer.": "stable_diffusion_1",
    "cond_stage_model.model.": "stable_diffusion_2",
}
# What else a .safetensors file may be; the first that is in it is named.
OTHERS = {
    "lora_": "a LoRA: give the model that it belongs to",
    "conditioner.embedders.": "Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "down_blocks.": "one part of a diffusers folder: give the folder",
    "text_model.": "one part of a diffusers folder: give the folder",
}
PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "sample": "sample"}


def read(path: Path, *, allow_pickle: bool, prediction_type: str | None) -> Found:
    """Raises ConfigError where the file is no Stable Diffusion 1 or 2 model, or does not say what it predicts."""
    header = read_header(path, allow_pickle=allow_pickle)
    text_root = next((r for r in TEXT_ENCODERS if any(name.startswith(r) for name in header.shapes)), None)
    if text_root is None or FIRST not in header.shapes:
        kind = next(
            (kind for sign, kind in OTHERS.items() if any(name.startswith(sign) for name in header.shapes)), None
        )
        raise ConfigError(
            f"base_model: {path} is " + (kind or "no Stable Diffusion 1 or 2 model (by its tensors' names)")
        )
    model = _from_metadata(header)
    if model is None:
        model = read_json(PUBLISHED / f"{TEXT_ENCODERS[text_root]}.json")
        _fit(model, header, prediction_type)
    else:
        model["scheduler"]["prediction_type"] = prediction_type or model["scheduler"].get("prediction_type", "epsilon")
    tokenizer = _tokenizer(model.pop("tokenizer", {}))
    factor = 2 ** (len(model["vae"]["block_out_channels"]) - 1)
    return Found(
        pipeline=model["model_index"]["_class_name"],
        configs=model,
        weights={part: _part_weights(part, model[part], header) for part in ("unet", "vae", "text_encoder")},
        tokenizer=tokenizer,
        prediction_type=model["scheduler"]["prediction_type"],
        resolution=model["unet"]["sample_size"] * factor,
    )


def _from_metadata(header: Header) -> dict[str, Any] | None:
    if CONFIG_KEY not in header.metadata:
        return None
    try:
        model = json.loads(header.metadata[CONFIG_KEY])
        assert {"unet", "vae", "text_encoder", "scheduler", "model_index"} <= model.keys()
    except (ValueError, AttributeError, AssertionError):
        raise ConfigError(
            f"base_model: {header.path}: its metadata {CONFIG_KEY} is not as everydream writes it"
        ) from None
    return model


def _fit(model: dict[str, Any], header: Header, prediction_type: str | None) -> None:
    """What the published configuration leaves open: the prediction, and with it Stable Diffusion 2's resolution."""
    told = PREDICTIONS.get(header.metadata.get("modelspec.prediction_type", ""))
    is_second = model["text_encoder"]["hidden_size"] == 1024
    if is_second and not (prediction_type or told):
        raise ConfigError(
            f"base_model: {header.path} does not say what it predicts, and Stable Diffusion 2 comes in two kinds: "
            'set prediction_type to "v_prediction" (the 768 px models) or "epsilon" (the 512 px base models)'
        )
    prediction = prediction_type or told or "epsilon"
    resolution = 768 if is_second and prediction == "v_prediction" else 512
    width, _, height = header.metadata.get("modelspec.resolution", "").partition("x")
    if width.isdigit() and width == height:
        resolution = int(width)
    model["scheduler"]["prediction_type"] = prediction
    model["unet"]["sample_size"] = resolution // 8
    model["unet"]["in_channels"] = header.shapes[FIRST][1]  # more than the latents' in inpainting and depth models
    model["tokenizer"] = {"pad": "!" if is_second else END}


def _tokenizer(content: dict[str, Any]) -> TokenizerFiles:
    if "vocabulary" not in content:
        return clip_tokenizer(content.get("pad", END))
    return TokenizerFiles(
        vocabulary=content["vocabulary"],
        merges=tuple(content["merges"]),
        pad=content["pad"],
        added=content.get("added"),
        length=content.get("length", 77),
    )


def _part_weights(part: str, config: dict[str, Any], header: Header) -> PartWeights:
    try:
        moves = to_published(part, config, header.shapes)
    except KeyError as error:
        raise ConfigError(
            f"base_model: {header.path}: {error.args[0]} has no place in the {part} as configured"
        ) from None
    if not moves:
        raise ConfigError(f"base_model: {header.path} has no {part} (no {root(part, config)}… in it)")
    return PartWeights(header, tuple(moves))
