"""Where a base model lies, and its small files: folder, single file or hub id → paths, JSON, safetensors headers.

Imports nothing heavy: settings, the data scan and `--dry_run` read a model's facts through this file, without torch.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream.errors import ConfigError
from everydream.models.tokenizer import TokenizerFiles
from everydream.models.weights import Move

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
HEADER_LIMIT = 100_000_000  # bytes; the safetensors format's own
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """What a weight file says about itself. `pickled` files have no header: theirs is read from the whole file."""

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]
    pickled: bool = False


@dataclass(frozen=True)
class PartWeights:
    """Where the tensors of one part lie, and how the file names them."""

    header: Header
    moves: tuple[Move, ...]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Published name → shape."""
        shapes = self.header.shapes
        return {name: move.published_shape(shapes[move.original]) for move in self.moves for name in move.published}

    @property
    def can_be_copied(self) -> bool:
        """The file is this part's alone, safetensors, and named as published."""
        return not self.header.pickled and all(m.published == (m.original,) for m in self.moves)


@dataclass(frozen=True)
class Found:
    """What a folder or a file tells about the model in it."""

    pipeline: str
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, PartWeights]
    tokenizer: TokenizerFiles
    prediction_type: str
    resolution: int
    notes: tuple[str, ...] = ()


def locate(base_model: str, *, revision: str | None, allow_pickle: bool) -> Path:
    """The folder or file that `base_model` names; a hub id is fetched into the hub's cache, or found there."""
    path = Path(base_model).expanduser()
    if path.exists():
        if revision is not None:
            raise ConfigError(f"base_model_revision: {revision!r} has no meaning for the local path {path}; remove it")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise ConfigError(
            f"base_model: {base_model} does not exist; "
            "give a diffusers folder, a .safetensors file, or a hub id (owner/name)"
        )
    return _from_hub(base_model, revision, allow_pickle)


def read_header(path: Path, *, allow_pickle: bool, what: str = "base_model") -> Header:
    """Names and shapes of a weight file, checked against its size: a file cut short is found here."""
    if path.suffix != ".safetensors":
        return _read_pickled_header(path, allow_pickle, what)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise ValueError(f"its header is {length} bytes long, the file {size}")
            content = json.loads(file.read(length))
        metadata = content.pop("__metadata__", None) or {}
        offsets = {name: entry["data_offsets"] for name, entry in content.items()}
        end = 0
        for name, (first, last) in sorted(offsets.items(), key=lambda item: item[1]):
            count = DTYPE_BYTES[content[name]["dtype"]] * math.prod(content[name]["shape"])
            if first != end or last - first != count:
                raise ValueError(f"{name} is {last - first} bytes at {first}, {count} at {end} were due")
            end = last
        if size != 8 + length + end:
            raise ValueError(f"it should be {8 + length + end} bytes long and is {size}")
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{what}: {path} is damaged or not a safetensors file ({error}); fetch it again") from None
    return Header(
        path=path,
        shapes={name: tuple(entry["shape"]) for name, entry in content.items()},
        metadata=metadata,
    )


def _read_pickled_header(path: Path, allow_pickle: bool, what: str) -> Header:
    if not allow_pickle:
        raise ConfigError(
            f"{what}: {path} is a pickle file; use a .safetensors of the model, or set allow_pickle to true "
            "(only tensors are read from it even then)"
        )
    from everydream.models.tensors import read_pickled

    tensors = read_pickled(path, device="meta", what=what)
    return Header(
        path=path,
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        metadata={},
        pickled=True,
    )


def _from_hub(name: str, revision: str | None, allow_pickle: bool) -> Path:
    """The hub's snapshot of the files that training needs. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE act as everywhere."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    small = ["model_index.json", *(f"{part}/*.{kind}" for part in _HUB_FOLDERS for kind in ("json", "txt"))]
    # The plain weights first; others are fetched only where a part has no plain ones.
    stages = [
        [*small, *(f"{part}/{stem}.safetensors" for part, stem in STEMS.items())],
        ["unet/*.safetensors", "vae/*.safetensors", "text_encoder/*.safetensors"],
    ]
    if allow_pickle:
        stages.append(["unet/*.bin", "vae/*.bin", "text_encoder/*.bin"])
    where = f"base_model: {name}" + (f" at revision {revision}" if revision else "")
    folder = Path()
    try:
        for patterns in stages:
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
            weights = ("*.safetensors", "*.bin")[: 1 + allow_pickle]
            if all(any(any((folder / part).glob(w)) for w in weights) for part in ("unet", "vae", "text_encoder")):
                break
    except GatedRepoError:
        raise ConfigError(
            f"{where} asks for its licence to be accepted: do so on its page, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{where} is neither a path here nor a model on the hub (a private one needs HF_TOKEN)"
        ) from None
    except RevisionNotFoundError:
        raise ConfigError(f"{where}: the hub has no such revision") from None
    except Exception as error:  # the hub's client raises many kinds: no network, offline mode, a full disk
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{where} is no path here and could not be fetched from the hub, nor found in its cache ({reason}); "
            "give a local folder or file, or go online once"
        ) from None
    return folder


_HUB_FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
