"""A diffusers folder as base model: its JSON files and the headers of its weights."""

from __future__ import annotations

from pathlib import Path

from everydream.errors import ConfigError
from everydream.models.json_files import read_json
from everydream.models.sources import STEMS, Found, Header, PartWeights, read_header
from everydream.models.tokenizer import read_tokenizer
from everydream.models.weights import NOT_WEIGHTS, Move, published_name

PIPELINE_PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
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
    configs = {part: read_json(path / part / "config.json") for part in PIPELINE_PARTS}
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
        resolution=configs["unet"].get("sample_size", 64) * factor,
    )


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
