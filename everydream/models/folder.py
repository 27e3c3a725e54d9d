"""A diffusers folder as base model: its JSON files and the headers of its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from everydream.errors import ConfigError
from everydream.models.json_files import read_json
from everydream.models.sources import STEMS, Found, Header, PartWeights, read_header
from everydream.models.tokenizer import read_tokenizer
from everydream.models.weights import NOT_WEIGHTS, Move, published_name

PIPELINE_PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
# transformers leaves out what equals its own defaults.
DEFAULTS = {
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }
}
KINDS: dict[str, dict[str, type]] = {
    "unet": {
        "block_out_channels": list,
        "down_block_types": list,
        "up_block_types": list,
        "in_channels": int,
        "out_channels": int,
        "layers_per_block": int,
        "cross_attention_dim": int,
        "sample_size": int,
    },
    "vae": {
        "block_out_channels": list,
        "down_block_types": list,
        "up_block_types": list,
        "latent_channels": int,
        "layers_per_block": int,
        "norm_num_groups": int,
    },
    "text_encoder": dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), int
    ),
}
# The part's weight file, best first: full precision, then half, then without EMA, then pickled.
CANDIDATES = (".safetensors", ".fp16.safetensors", ".non_ema.safetensors", ".bin", ".fp16.bin")


def read(path: Path, *, allow_pickle: bool, prediction_type: str | None) -> Found:
    """Raises ConfigError where a file is missing or unreadable, or a part is of another kind than expected."""
    if not (path / "model_index.json").is_file():
        inside = next((p.parent for p in (path / "model" / "model_index.json",) if p.is_file()), None)
        hint = f"give {inside}" if inside else "a diffusers folder has model_index.json, unet/, vae/, text_encoder/, …"
        raise ConfigError(f"base_model: {path} has no model_index.json; {hint}")
    index = read_json(path / "model_index.json")
    pipeline = str(index.get("_class_name"))
    kinds = {part: (index.get(part) or [None, None])[-1] for part in PIPELINE_PARTS}
    if pipeline == "StableDiffusionPipeline" and kinds != PIPELINE_PARTS:
        part = next(part for part in kinds if kinds[part] != PIPELINE_PARTS[part])
        raise ConfigError(f"base_model: {path}: its {part} is a {kinds[part]}, not a {PIPELINE_PARTS[part]}")
    configs = {part: _config(part, path / part / "config.json") for part in PIPELINE_PARTS}
    configs["model_index"] = index
    configs["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
    weights = {
        part: _part_weights(part, _weight_file(path / part, STEMS[part], allow_pickle)) for part in PIPELINE_PARTS
    }
    factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    return Found(
        pipeline=pipeline,
        configs=configs,
        weights=weights,
        tokenizer=read_tokenizer(path / "tokenizer"),
        prediction_type=prediction_type or configs["scheduler"].get("prediction_type", "epsilon"),
        resolution=configs["unet"]["sample_size"] * factor,
        notes=tuple(_notes(path, index, weights)),
    )


def _config(part: str, path: Path) -> dict[str, Any]:
    config = DEFAULTS.get(part, {}) | read_json(path)
    problems = [
        f"base_model: {path}: {key} should be {kind.__name__}, and is {config.get(key)!r}"
        for key, kind in KINDS[part].items()
        if not isinstance(config.get(key), kind)
    ]
    if problems:
        raise ConfigError(problems)
    return config


def _notes(path: Path, index: Mapping[str, Any], weights: Mapping[str, PartWeights]) -> Iterator[str]:
    for part, found in weights.items():
        name = found.header.path.name
        if name != f"{STEMS[part]}.safetensors":
            yield f"base_model: the {part} is read from {name}: {path} has no {STEMS[part]}.safetensors"
    if (index.get("safety_checker") or [None])[0] is not None:
        yield f"base_model: the safety checker of {path} is not part of what is written"


def _weight_file(folder: Path, stem: str, allow_pickle: bool) -> Header:
    for suffix in CANDIDATES:
        path = folder / f"{'pytorch_model' if suffix.endswith('.bin') and stem == 'model' else stem}{suffix}"
        if path.is_file():
            return read_header(path, allow_pickle=allow_pickle)
    there = ", ".join(sorted(p.name for p in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise ConfigError(f"base_model: {folder} has no {stem}.safetensors (there: {there})")


def _part_weights(part: str, header: Header) -> PartWeights:
    names = [name for name in header.shapes if not name.endswith(NOT_WEIGHTS)]
    return PartWeights(header, tuple(Move(name, (published_name(part, name),)) for name in names))
