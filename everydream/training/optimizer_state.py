"""An optimizer's whole state as tensors by parameter name and JSON, and back bit for bit.

Saved: state and group values of each parameter, by its published name; plain instance attributes that state_dict()
leaves out (lion-pytorch's `_init_lr`); and the training weights of optimizers that keep two sets of weights, because
their own switch from one set to the other rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from everydream.optim.factory import has_two_sets
from everydream.training.tagged import Decoder, Encoder
from everydream.training.tensorfile import identity

Named = Mapping[str, Parameter]
WEIGHTS = "training_weights"


def capture(
    optimizers: Mapping[str, Optimizer], named: Mapping[str, Named]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors for optimizer.safetensors (live ones: copy or write them before the next update), and the JSON.

    Both arguments by part. Raises ConfigError if an optimizer keeps something that only pickle could store.
    """
    encoder = Encoder()
    saved = {part: _capture_part(part, optimizer, named[part], encoder) for part, optimizer in optimizers.items()}
    return encoder.tensors, saved


def _capture_part(part: str, optimizer: Optimizer, named: Named, encoder: Encoder) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in named.items()}
    state = {names[id(parameter)]: values for parameter, values in optimizer.state.items()}
    return {
        "class": _dotted(optimizer),
        "library": _library(optimizer),
        "leaves": [_capture_leaf(f"{part}/{n}", leaf, names, encoder) for n, leaf in enumerate(_leaves(optimizer))],
        "state": {name: encoder.each(values, f"{part}/{name}") for name, values in state.items()},
        WEIGHTS: encoder.each(_training_weights(optimizer, named), f"{part}/{WEIGHTS}"),
    }


def _capture_leaf(where: str, leaf: Optimizer, names: Mapping[int, str], encoder: Encoder) -> dict[str, Any]:
    return {
        "class": _dotted(leaf),
        "library": _library(leaf),
        # torch adds `differentiable` to those that lack it when it loads a state: a resumed run must write the same.
        "defaults": encoder.each({"differentiable": False, **leaf.defaults}, f"{where}/defaults"),
        "attributes": _attributes(leaf),
        "groups": [
            {
                "parameters": _names_in(group, names),
                "values": encoder.each(_values(group), f"{where}/group.{n}"),
            }
            for n, group in enumerate(leaf.param_groups)
        ],
    }


def restore(
    optimizers: Mapping[str, Optimizer],
    named: Mapping[str, Named],
    tensors: Mapping[str, Tensor],
    saved: Mapping[str, Any],
    *,
    changed: bool = False,
) -> list[str]:
    """Put back what `capture` gave, into optimizers built from the same settings; `tensors` is used, not copied.

    Returns what could not be put back, a line each: another optimizer, parameters that are new. Empty means exact.
    `changed`: the optimizer's settings were changed on purpose, so hyperparameters that differ are the new ones.
    Raises CheckpointError where a tensor is missing.
    """
    notes: list[str] = []
    decoder = Decoder(tensors)
    for part, optimizer in optimizers.items():
        if part in saved:
            notes += _restore_part(part, optimizer, named[part], saved[part], decoder, changed)
        else:
            _start_afresh(optimizer)
            notes.append(f"{part} was not trained before: its optimizer starts afresh")
    return notes


def _restore_part(
    part: str, optimizer: Optimizer, named: Named, saved: Mapping[str, Any], decoder: Decoder, changed: bool
) -> list[str]:
    leaves = _leaves(optimizer)
    if [_dotted(leaf) for leaf in leaves] != [old["class"] for old in saved["leaves"]]:
        _start_afresh(optimizer)
        return [f"{part} was trained with {saved['class']}: {_dotted(optimizer)} starts afresh"]
    names = {id(parameter): name for name, parameter in named.items()}
    state = {named[name]: decoder.each(values) for name, values in saved["state"].items() if name in named}
    groups = [
        values
        for leaf, old in zip(leaves, saved["leaves"], strict=True)
        for values in _group_values(leaf, old, names, decoder, changed)
    ]
    _load_state_dict(optimizer, state, groups)
    _put_exactly(optimizer, state)
    for leaf, old in zip(leaves, saved["leaves"], strict=True):
        vars(leaf).update({} if changed else old["attributes"])
    with torch.no_grad():
        for name, value in decoder.each(saved[WEIGHTS]).items():
            named[name].copy_(value)
    return _not_restored(part, optimizer, names, saved)


def _start_afresh(optimizer: Optimizer) -> None:
    """As it was made: in a roll-back it has steps behind it. What divides groups stays, and learning rates are set
    before each step."""
    optimizer.state.clear()
    for leaf in _leaves(optimizer):
        for group in leaf.param_groups:
            group.update({key: value for key, value in leaf.defaults.items() if key not in ("lr", "weight_decay")})


def _group_values(
    leaf: Optimizer, saved: Mapping[str, Any], names: Mapping[int, str], decoder: Decoder, changed: bool
) -> list[dict[str, Any]]:
    """What each group is to hold: the saved values, but for hyperparameters that were changed on purpose."""
    before = decoder.each(saved["defaults"])
    new = {key for key, value in leaf.defaults.items() if changed and not _same(value, before.get(key))}
    by_parameters = {tuple(group["parameters"]): group["values"] for group in saved["groups"]}
    result = []
    for group in leaf.param_groups:
        values, kept = by_parameters.get(tuple(_names_in(group, names))), new
        if values is None:  # divided into groups otherwise: counters are common to all, what divides them is not
            values, kept = saved["groups"][0]["values"], new | {"lr", "weight_decay"}
        old = decoder.each(values)
        result.append({**_values(group), **{key: value for key, value in old.items() if key not in kept}})
    return result


def _load_state_dict(
    optimizer: Optimizer, state: Mapping[Parameter, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    """Through the optimizer's own door: it knows what must lie on which device, and mends what older versions lack."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {id(parameter): n for n, parameter in enumerate(parameters)}
    packed = [
        {**values, "params": [index[id(parameter)] for parameter in group["params"]]}
        for values, group in zip(groups, optimizer.param_groups, strict=True)
    ]
    trained = {index[id(parameter)]: dict(values) for parameter, values in state.items() if id(parameter) in index}
    optimizer.load_state_dict({"state": trained, "param_groups": packed})


def _put_exactly(optimizer: Optimizer, state: Mapping[Parameter, Mapping[str, Any]]) -> None:
    """torch and bitsandbytes cast loaded floating state to the parameter's dtype: put it there as it was.

    What was one tensor before is one on each device.
    """
    placed: dict[tuple[object, ...], Tensor] = {}

    def exact(value: Any, parameter: Parameter, found: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(exact(item, parameter, None) for item in value)
        if not isinstance(value, Tensor):
            return value
        device = found.device if isinstance(found, Tensor) else parameter.device
        key = (identity(value), device, parameter.stride() if value.shape == parameter.shape else None)
        if key not in placed:
            placed[key] = _like(value, parameter).to(device)
        return placed[key]

    for parameter, values in state.items():
        here = optimizer.state.get(parameter, {})
        here.update({key: exact(value, parameter, here.get(key)) for key, value in values.items()})
        _page(optimizer, parameter)


def _like(value: Tensor, parameter: Parameter) -> Tensor:
    """Laid out in memory as the parameter is, for fused kernels go through both in one line."""
    if value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=value.dtype).copy_(value)


def _page(optimizer: Optimizer, parameter: Parameter) -> None:
    """bitsandbytes' paged state moves between host and card; a plain tensor in its place would stay on the card."""
    if not (parameter.is_cuda and getattr(optimizer, "is_paged", False)):
        return
    paged: Any = optimizer
    for key in ("state1", "state2"):
        value = optimizer.state[parameter].get(key)
        if value is not None:
            make = paged.get_state_buffer if value.shape == parameter.shape else paged._get_state_double_buffer
            optimizer.state[parameter][key] = make(parameter, dtype=value.dtype).copy_(value)


def _not_restored(part: str, optimizer: Optimizer, names: Mapping[int, str], saved: Mapping[str, Any]) -> list[str]:
    now = {name for group in optimizer.param_groups for name in _names_in(group, names)}
    before = {name for leaf in saved["leaves"] for group in leaf["groups"] for name in group["parameters"]}
    changes = {"are trained anew, their state starts afresh": now - before, "are no longer trained": before - now}
    return [f"{part}: {len(some)} parameters {what} ({min(some)}, …)" for what, some in changes.items() if some]


# Optimizers


def _leaves(optimizer: Optimizer) -> list[Optimizer]:
    """A composite's parts (optim/composite.py), which share its state and own its groups."""
    return getattr(optimizer, "parts", [optimizer])


def _dotted(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _library(optimizer: Optimizer) -> str:
    return _with_version(type(optimizer).__module__.partition(".")[0])


@cache
def _with_version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return package


def _names_in(group: Mapping[str, Any], names: Mapping[int, str]) -> list[str]:
    return [names[id(parameter)] for parameter in group["params"]]


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _attributes(leaf: Optimizer) -> dict[str, Any]:
    """Plain numbers and switches kept outside of state_dict()."""
    return {
        key: value
        for key, value in vars(leaf).items()
        if type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    }


def _training_weights(optimizer: Optimizer, named: Named) -> dict[str, Tensor]:
    """Copies, for the caller then switches to the other set of weights, in place, before it writes the model."""
    return {n: parameter.detach().clone() for n, parameter in named.items()} if has_two_sets(optimizer) else {}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and a == b
