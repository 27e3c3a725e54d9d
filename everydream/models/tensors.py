"""Tensors out of weight files, checked: every name and shape as the model wants it, all numbers finite."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from everydream.errors import ConfigError
from everydream.models.files import HeldFile
from everydream.models.sources import PartWeights


def read_pickled(path: Path, *, device: str = "cpu", what: str = "base_model") -> dict[str, Tensor]:
    """The tensors of a .bin or .ckpt file; anything else in it that would have to be run is refused."""
    try:
        content = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(f"{what}: {path} holds more than tensors and is not read ({_first_line(error)})") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ConfigError(f"{what}: {path} cannot be read ({_first_line(error)}); fetch it again") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise ConfigError(f"{what}: {path} holds a {type(content).__name__}, not weights by name")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def check_names(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises ConfigError where names are missing, unknown, or of another shape."""
    problems = [
        f"{where}: {what} {len(names)} tensor{'s' * (len(names) > 1)}: {_some(names)}"
        for what, names in (
            ("lacks", wanted.keys() - found.keys()),
            ("has unknown", found.keys() - wanted.keys()),
        )
        if names
    ]
    shapes = [n for n in wanted if n in found and found[n] != wanted[n]]
    problems += [f"{where}: {n} is {list(found[n])}, its config.json makes it {list(wanted[n])}" for n in shapes[:3]]
    if problems:
        raise ConfigError(problems)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """A flipped bit in an exponent often shows as NaN or infinity. One pass over the memory: 0.3 s for 3 GB."""
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.sum(dtype=torch.float32))]
    if bad:
        raise ConfigError(f"{where}: {_some(bad)} holds NaN or infinite numbers: the file is damaged; fetch it again")


def _some(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class NoInit(TorchFunctionMode):
    """Modules made under it leave their parameters as they come: the weights are read anyway.

    On the meta device torch's own initialisation would import its compiler, which takes 2 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class PartReader:
    """The tensors of one part. The file is held open, so that it can be read again after its folder is gone; it is in
    memory only while it is read.
    """

    def __init__(self, weights: PartWeights) -> None:
        self.weights = weights
        self.where = f"base_model: {weights.header.path}"
        try:
            self.file = HeldFile(weights.header.path)
        except OSError as error:
            raise ConfigError(f"{self.where} cannot be read ({error.strerror})") from None

    def read(self, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Published name → tensor with memory of its own, in `dtype` (None: as in the file)."""
        layout = torch.contiguous_format
        tensors = {n: piece.to(device, dtype, copy=True, memory_format=layout) for n, piece in self._pieces()}
        check_finite(tensors, self.where)
        return tensors

    def digest(self) -> str:
        """Of names, shapes and numbers, in whatever kind of file and precision they are kept; one tensor at a time."""
        sums = []
        for name, piece in self._pieces():
            numbers = piece.float().contiguous().reshape(-1).view(torch.uint8).numpy().data
            of_this = hashlib.blake2b(f"{name} {tuple(piece.shape)}".encode(), digest_size=16)
            of_this.update(numbers)
            sums.append(of_this.digest())
        return hashlib.blake2b(b"".join(sorted(sums)), digest_size=16).hexdigest()

    def _pieces(self) -> Iterator[tuple[str, Tensor]]:
        """Published name, tensor; on the CPU, perhaps in the mapped file."""
        with self._contents() as get:
            for move in self.weights.moves:
                whole = get(move.original)
                pieces = (whole.flatten(1) if move.is_convolution else whole).chunk(len(move.published))
                yield from zip(move.published, pieces, strict=True)

    @contextmanager
    def _contents(self) -> Iterator[Callable[[str], Tensor]]:
        if self.weights.header.pickled:
            yield read_pickled(Path(self.file.name)).__getitem__
            return
        try:
            with safe_open(self.file.name, framework="pt", device="cpu") as file:
                yield file.get_tensor
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{self.where} cannot be read ({_first_line(error)}); fetch it again") from None
