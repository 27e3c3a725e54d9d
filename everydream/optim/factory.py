"""From a row of the table to an optimizer: checked before weights are loaded, imported only when chosen."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from everydream.errors import ConfigError, did_you_mean
from everydream.optim.flat import Flat
from everydream.optim.groups import Group, param_groups
from everydream.optim.lion import update_in_blocks
from everydream.optim.rounding import Rounding
from everydream.optim.table import HYPERPARAMETERS, Row, row_of, unknown

SMALL_TENSOR = 2**16  # weights, on average: see flat_pays


def check(
    name: str,
    args: Mapping[str, Any],
    *,
    lr: float | None = None,
    betas: Sequence[float] | None = None,
    epsilon: float | None = None,
    weight_decay: float | None = None,
    device: str = "cpu",
) -> list[str]:
    """Take one step on a dummy weight, so that whatever is wrong with the optimizer is said before weights are loaded.

    Returns what to tell the user once: hyperparameters without effect, and what this device does differently.
    Raises ConfigError: unknown name, missing package, not an optimizer, unknown or refused arguments, no plain step
    (LBFGS wants a closure). A millisecond, once the library is imported.
    """
    row, cls = _load(name)
    place = device if _is_here(device) else "cpu"
    weight = torch.nn.Parameter(torch.zeros(2, 2, device=place))
    weight.grad = torch.ones_like(weight)
    dummy = Group("check", "dummy", ("dummy",), (weight,))
    given: dict[str, Any] = {"betas": betas, "epsilon": epsilon, "weight_decay": weight_decay}
    does = "refuses its settings"
    try:
        optimizer = make(name, [dummy], lr=lr, args=args, device=place, **given)
        does = "cannot make a step with its settings"
        optimizer.step()
        _refuse_hidden_state(name, optimizer)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a class of anybody's may raise anything; lion's triton exits
        settings = {"lr": lr, **given, **args}
        shown = ", ".join(f"{key} {_show(value)}" for key, value in settings.items() if value is not None)
        raise ConfigError(f"optimizer {name!r} {does} ({shown or 'none'}): {_reason(error)}") from error
    notes = [
        f"{key} {_show(value)} is not used: {row.cls} has no such setting"
        for key, value in given.items()
        if value is not None and key not in _taken(row, cls)
    ]
    return notes + ([f"{name}: {row.on_cpu}"] if row.on_cpu and torch.device(device).type == "cpu" else [])


def _refuse_hidden_state(name: str, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint has what belongs to parameters; anything else would be gone after a resume, without a word."""
    inner = [key for key, value in vars(optimizer).items() if isinstance(value, torch.optim.Optimizer)]
    if inner:
        raise ConfigError(
            f"optimizer {name!r} keeps another optimizer inside ({inner[0]}), whose state no checkpoint would have. "
            "Use that one's class by itself"
        )
    if not all(isinstance(key, torch.Tensor) for key in optimizer.state):
        raise ConfigError(f"optimizer {name!r} keeps state that belongs to no parameter: no checkpoint would have it")


def _is_here(device: str) -> bool:
    """Optimizers differ from device to device (capturable, triton), and a plan may be for a card that is elsewhere."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(device).type in ("cpu", accelerator.type if accelerator else "cpu")


def _show(value: Any) -> str:
    return json.dumps(value, default=str)


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def make(
    name: str,
    groups: Sequence[Group],
    *,
    lr: float | None = None,
    betas: Sequence[float] | None = None,
    epsilon: float | None = None,
    weight_decay: float | None = None,
    args: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    rounding_seed: int | None = None,
    flat: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of one part. None means the row's default; what the row does not have is left out.

    Schedule-free optimizers come in training mode. `rounding_seed`: the weights are bf16, see rounding.py. `flat`: lay
    them out in one buffer a group, see flat.py and `flat_pays`.
    """
    row, cls = _load(name)
    chosen = {"betas": betas, "epsilon": epsilon, "weight_decay": weight_decay}
    arguments = _arguments(row, cls, lr, chosen, args or {}, device)

    def build(some: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optimizer = cls(some, **arguments)
        if lr == 0:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        if hasattr(optimizer, "is_paged"):
            vars(optimizer)["_cpu_paged_warned"] = True  # bitsandbytes' own words for what `check` has said already
            if not optimizer.is_paged:
                _step_without_waiting(optimizer)
        set_mode(optimizer, training=True)
        return optimizer

    if makes_contiguous(name):
        _make_contiguous(groups)
    optimizer = build(param_groups(groups))
    if rounding_seed is not None:
        assert row.may_round, f"{name} cannot train bf16 weights: {row.cannot_round}"
        names = {p: f"{g.part}/{n}" for g in groups for n, p in zip(g.names, g.params(), strict=True)}
        Rounding(optimizer, build, names, rounding_seed)
    if flat:
        assert row.elementwise and rounding_seed is None, f"{name} cannot be laid flat"
        twin = Flat(optimizer, build).twin
        if row.name == "lion":
            vars(twin)["update_fn"] = update_in_blocks
    return optimizer


def _arguments(
    row: Row,
    cls: type,
    lr: float | None,
    chosen: Mapping[str, Any],
    args: Mapping[str, Any],
    device: str | torch.device,
) -> dict[str, Any]:
    """Of the constructor, by its own names: what was chosen, else the row's defaults, and `args` as they are."""
    arguments = dict(row.fixed)
    arguments["lr"] = lr or row.defaults["lr"]  # 0 is set afterwards: lion's and prodigy's constructors refuse it
    for key, parameter in _taken(row, cls).items():
        value = row.defaults.get(key) if chosen[key] is None else chosen[key]
        if value is not None:
            arguments[parameter] = _betas(row, value) if key == "betas" else value
    _check_args(row, cls, args, reserved={"params", *arguments} - set(row.fixed))
    arguments.update(args)
    if row.fused_flag and not any(arguments.get(key) for key in ("foreach", "differentiable")):
        arguments.setdefault("fused", fused_on(device))
    return arguments


def takes_weight_decay(name: str) -> bool:
    row, cls = _load(name)
    return "weight_decay" in _taken(row, cls)


def makes_contiguous(name: str) -> bool:
    """Whether an optimizer's step lays each weight out row by row: channels_last would be undone, and cost copies."""
    row = row_of(name)
    return row is not None and row.package == "bitsandbytes"


def _make_contiguous(groups: Sequence[Group]) -> None:
    """As bitsandbytes does itself at its first step, after it has laid out its state as the weights were then.

    Its kernels for a card go through both in one line: the state would belong to other weights after a resume.
    """
    for group in groups:
        for p in group.params():
            p.data = p.data.contiguous()


def _step_without_waiting(optimizer: torch.optim.Optimizer) -> None:
    """bitsandbytes waits for the card after each tensor, 686 times an update of SD1.5's UNet, and nothing needs it.

    Its kernels follow one another in one stream. Only paged state, which the driver moves, is to be waited for.
    """
    from bitsandbytes.optim import optimizer as module

    step = optimizer.step

    def hurried(closure: Callable[[], float] | None = None) -> float | None:
        wait, module.sync_gpu = module.sync_gpu, lambda t: None
        try:
            return step(closure)
        finally:
            module.sync_gpu = wait

    vars(optimizer)["step"] = hurried


def flat_pays(name: str, groups: Sequence[Group], device: str | torch.device, processes: int) -> bool:
    """On one CPU process and small tensors, where a kernel's dispatch costs as much as its work.

    Measured, clipping and adamw: 2.7 times less time at 8,000 weights a tensor, no gain at 89,000. A card has kernels
    that take many tensors at once.
    """
    row = row_of(name)
    mean = sum(group.parameters for group in groups) / max(1, sum(group.tensors for group in groups))
    is_cpu = torch.device(device).type == "cpu"
    return row is not None and row.elementwise and is_cpu and processes == 1 and mean < SMALL_TENSOR


def has_two_sets(optimizer: torch.optim.Optimizer) -> bool:
    """Of weights: schedule-free optimizers train one and are used with the other, eval() before a save, preview or
    validation and train() after it."""
    return all(callable(getattr(optimizer, switch, None)) for switch in ("train", "eval"))


def set_mode(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Does nothing for optimizers with one set of weights."""
    if has_two_sets(optimizer):
        switch: Any = optimizer
        switch.train() if training else switch.eval()


def fused_on(device: str | torch.device) -> bool:
    """Whether torch has fused AdamW and SGD kernels for this device (CPU and CUDA both, since torch 2.5)."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    return torch.device(device).type in _get_fused_kernels_supported_devices()


def _load(name: str) -> tuple[Row, type[torch.optim.Optimizer]]:
    row = row_of(name)
    if row is None:
        raise ConfigError(unknown(name))
    module, _, cls_name = row.cls.rpartition(".")
    # On a CPU with AVX-512 bitsandbytes warns at import that a 4-bit matrix product, used by nothing here, is missing.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module of anybody's may raise anything
        raise ConfigError(
            f"optimizer {name!r}: {module} cannot be imported ({_reason(error)}){_install(row)}"
        ) from error
    cls = getattr(found, cls_name, None)
    if cls is None:
        raise ConfigError(f"optimizer {name!r}: {module} has no {cls_name}.{did_you_mean(cls_name, dir(found))}")
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer {name!r} is not a subclass of torch.optim.Optimizer")
    return row, cls


def _install(row: Row) -> str:
    """How to get the package. Of a class of one's own only the module is known, which may not be the package's name."""
    if row.extra:
        return f": pip install 'everydream[{row.extra}]'"
    return ": install the package that has it" if row.name == row.cls else f": pip install {row.package}"


def _signature(cls: type) -> dict[str, inspect.Parameter]:
    """What the constructor takes by name; where it passes on **keywords, what its parents' take too."""
    found: dict[str, inspect.Parameter] = {}
    for owner in (one for one in cls.__mro__ if "__init__" in vars(one) and one is not torch.optim.Optimizer):
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]  # but self
        found = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _taken(row: Row, cls: type) -> dict[str, str]:
    """Our hyperparameter → the constructor's parameter, for those that this optimizer has."""
    if row.name != row.cls:
        return {key: row.arguments.get(key, key) for key in row.hyperparameters}
    names = {"betas": ("betas",), "epsilon": ("eps", "epsilon"), "weight_decay": ("weight_decay",)}
    found = {key: next((n for n in names[key] if n in _signature(cls)), None) for key in HYPERPARAMETERS}
    return {key: parameter for key, parameter in found.items() if parameter}


def _betas(row: Row, betas: Sequence[float]) -> tuple[float, ...]:
    wanted = len(row.defaults.get("betas", betas))
    if len(betas) != wanted:
        raise ConfigError(f"optimizer {row.name!r} takes {wanted} betas, not {list(betas)}")
    return tuple(betas)


def _check_args(row: Row, cls: type, args: Mapping[str, Any], reserved: set[str]) -> None:
    known = set(_signature(cls)) - reserved
    ours = {parameter: key for key, parameter in _taken(row, cls).items()} | {"lr": "lr"}
    problems = []
    for key in args:
        if key in ours:
            problems.append(
                f"optimizer {row.name!r}: args.{key} is set by {ours[key]!r} beside 'optimizer', not in args"
            )
        elif key not in known:
            problems.append(
                f"optimizer {row.name!r}: args.{key} is not an argument of {row.cls}.{did_you_mean(key, known)} "
                f"It takes: {', '.join(sorted(known))}."
            )
    if problems:
        raise ConfigError(problems)
