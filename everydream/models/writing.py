"""A model as files: the diffusers folder as published, and the original single file with its metadata."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from everydream.models.family import Facts
from everydream.models.files import FileContent, TensorFile
from everydream.models.original import CONFIG_KEY
from everydream.models.sources import STEMS, PartWeights
from everydream.models.tensors import PartReader
from everydream.models.tokenizer import TokenizerFiles, clip_tokenizer
from everydream.models.weights import Move, is_openclip, root, to_original

Config = Mapping[str, Any]
Named = Mapping[str, Tensor]


def folder_files(facts: Facts, scheduler: Config, weights: Mapping[str, FileContent]) -> dict[str, FileContent]:
    """The folder as Stable Diffusion 1.5 was published, whatever versions of the libraries are there."""
    files: dict[str, FileContent] = {"model_index.json": _json(_model_index(facts, scheduler))}
    files["scheduler/scheduler_config.json"] = _json(scheduler)
    for part, content in weights.items():
        config = dict(facts.configs[part])
        if "dtype" in config:  # transformers 5's word, which 4 does not know
            config["torch_dtype"] = config.pop("dtype")
        files[f"{part}/config.json"] = _json(config)
        files[f"{part}/{STEMS[part]}.safetensors"] = content
    return files | {f"tokenizer/{name}": content for name, content in facts.tokenizer.files.items()}


def single_file(
    facts: Facts,
    *,
    dtype: torch.dtype | None,
    title: str,
    date: str,
    metadata: Mapping[str, str] | None = None,
    replaced: Mapping[str, Tensor] | None = None,
) -> TensorFile:
    """The original layout, as other programs read it, with ModelSpec 1.0.0 (Stability AI) and our configs.

    The weights are read from the model's files: facts = read_facts(checkpoint / "model"). dtype: None leaves them as
    they are. date: ISO 8601. metadata: more of it, for example the recipe. replaced: `part.published name` → tensor,
    for example averaged weights.
    """
    tensors: dict[str, Tensor] = {}
    for part, weights in facts.weights.items():
        named = _read(part, weights, dtype, replaced or {})
        for move in to_original(part, facts.configs[part], named):
            tensors[move.original] = _original(move, named)
    text = facts.configs["text_encoder"]
    if not is_openclip(text):  # an integer tensor of the published files that some old readers insist on
        positions = f"{root('text_encoder', text)}text_model.embeddings.position_ids"
        tensors[positions] = torch.arange(facts.max_tokens)[None]
    return TensorFile(
        tensors,
        {
            "format": "pt",
            **_model_spec(facts),
            "modelspec.title": title,
            "modelspec.date": date,
            "modelspec.hash_sha256": f"0x{content_hash(tensors)}",
            CONFIG_KEY: json.dumps(_configs(facts), separators=(",", ":"), ensure_ascii=False),
            **(metadata or {}),
        },
    )


def folder(
    facts: Facts, *, dtype: torch.dtype | None, replaced: Mapping[str, Tensor] | None = None
) -> dict[str, FileContent]:
    """The diffusers folder of a model that was read from anywhere; arguments as for `single_file`."""
    parts = {part: TensorFile(_read(part, weights, dtype, replaced or {})) for part, weights in facts.weights.items()}
    return folder_files(facts, facts.scheduler_config, parts)


def _read(part: str, weights: PartWeights, dtype: torch.dtype | None, replaced: Named) -> dict[str, Tensor]:
    named = PartReader(weights).read(dtype=dtype)
    return {
        n: replaced[f"{part}.{n}"].to("cpu", dtype or t.dtype) if f"{part}.{n}" in replaced else t
        for n, t in named.items()
    }


def content_hash(tensors: Named) -> str:
    """SHA-256 of a safetensors file's bytes after the header: its writers put wide types first, then by name."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _original(move: Move, named: Named) -> Tensor:
    pieces = [named[name].detach() for name in move.published]
    whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    return whole[:, :, None, None] if move.is_convolution else whole


def _model_spec(facts: Facts) -> dict[str, str]:
    is_v = facts.prediction_type == "v_prediction"
    second = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": second if is_openclip(facts.configs["text_encoder"]) else "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.resolution": f"{facts.resolution}x{facts.resolution}",
        "modelspec.prediction_type": "v" if is_v else facts.prediction_type,
    }


def _model_index(facts: Facts, scheduler: Config) -> dict[str, Any]:
    # A safety checker in the index whose folder is not there would keep the model from loading.
    checker: Config = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    index = {**facts.configs["model_index"], **checker, "requires_safety_checker": False}
    return index | {"scheduler": ["diffusers", scheduler["_class_name"]]}


def _configs(facts: Facts) -> dict[str, Any]:
    scheduler = facts.scheduler_config
    configs = {**facts.configs, "scheduler": scheduler, "model_index": _model_index(facts, scheduler)}
    return {**configs, "tokenizer": _tokenizer(facts.tokenizer)}


def _tokenizer(files: TokenizerFiles) -> dict[str, Any]:
    content = {"pad": files.pad, "length": files.length, "added": files.added}
    clip = clip_tokenizer()
    if files.merges == clip.merges and files.vocabulary == clip.vocabulary:
        return content  # the reader has CLIP's own
    return {**content, "vocabulary": files.vocabulary, "merges": files.merges}


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True).encode() + b"\n"
