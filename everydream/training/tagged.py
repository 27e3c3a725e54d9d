"""Any value of an optimizer's state as JSON and tensors: what JSON cannot say stands as `{"$…": …}`. No pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from everydream.errors import CheckpointError, ConfigError
from everydream.training.tensorfile import identity


class Encoder:
    """Collects the tensors by name; those that are the same memory seen the same way are stored once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._at: dict[int, list[str]] = {}  # address → names of the tensors that begin there

    def each(self, values: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {key: self.encode(value, f"{where}/{key}") for key, value in values.items()}

    def encode(self, value: Any, where: str) -> Any:
        """`where` names the value, and the tensor in the file. Raises ConfigError for what only pickle could store."""
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": str(value)}
        if type(value) in (Tensor, Parameter):
            return {"$tensor": self._store(where, value)}
        if type(value) in (list, tuple):
            items = [self.encode(item, f"{where}.{n}") for n, item in enumerate(value)]
            return items if type(value) is list else {"$tuple": items}
        if type(value) is dict and all(type(key) is str for key in value):
            return {"$dict": self.each(value, where)}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"$device": str(value)}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise ConfigError(
            f"this optimizer cannot be saved: {where} is a {kind}, which only pickle could store. Choose another"
        )

    def _store(self, name: str, tensor: Tensor) -> str:
        here = self._at.setdefault(tensor.data_ptr(), [])
        for other in here:
            if identity(self.tensors[other]) == identity(tensor):
                return other
        here.append(name)
        self.tensors[name] = tensor.detach() if tensor.requires_grad else tensor
        return name


class Decoder:
    """The way back. A tensor that was stored once is one tensor again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._tags: dict[str, Callable[[Any], Any]] = {
            "$float": float,
            "$tensor": self._tensor,
            "$tuple": lambda items: tuple(map(self.decode, items)),
            "$dict": self.each,
            "$dtype": lambda name: getattr(torch, name),
            "$device": torch.device,
        }

    def each(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self.decode(value) for key, value in values.items()}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return list(map(self.decode, value))
        if not isinstance(value, dict):
            return value
        [(tag, inner)] = value.items()
        return self._tags[tag](inner)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"optimizer.safetensors: {name} is missing")
        return self._tensors[name]
