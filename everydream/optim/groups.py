"""Parameter groups: which weights are trained, with which lr and decay.

Patterns, first match wins; a pattern that matches nothing is an error; each trainable parameter is in exactly one
group. Everything works on names and shapes alone, so that --dry_run can print the table without loading weights; given
parameters in place of shapes, the same groups carry them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from everydream.errors import ConfigError

if TYPE_CHECKING:
    import torch

Shaped = Union["torch.Tensor", Sequence[int]]  # a parameter, or only its shape


def shape_of(item: Shaped) -> tuple[int, ...]:
    return tuple(getattr(item, "shape", item))


@dataclass(frozen=True)
class Group:
    """One row of the printed table, and one param_group of an optimizer."""

    part: str  # "unet" or "text_encoder"
    name: str
    names: tuple[str, ...]
    items: tuple[Shaped, ...]
    lr: float | None = None
    weight_decay: float | None = None  # None: the optimizer has none, or keeps its own

    @property
    def tensors(self) -> int:
        return len(self.items)

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape_of(item)) for item in self.items)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape_of(item) for item in self.items)

    def params(self) -> list[torch.nn.Parameter]:
        assert all(hasattr(item, "requires_grad") for item in self.items), "this group was made of shapes"
        return list(self.items)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pattern:
    name: str
    matches: Callable[[str, tuple[int, ...]], bool]
    no_decay: bool = False


# In Stable Diffusion's parts the tensors of one dimension are the norms' scales and all biases, and nothing else.
NO_DECAY = Pattern("norms and biases", lambda name, shape: len(shape) <= 1, no_decay=True)
THE_REST = Pattern("weights", lambda name, shape: True)


def split(
    named: Iterable[tuple[str, Shaped]],
    part: str,
    weight_decay: float | None = None,
    no_decay_on_norms: bool = False,
    *,
    lr: float | None = None,
    frozen: Collection[str] = frozenset(),
) -> list[Group]:
    """The groups of one part, in the order of the patterns; within a group the order given."""
    patterns = (NO_DECAY, THE_REST) if no_decay_on_norms else (THE_REST,)
    members: dict[str, list[tuple[str, Shaped]]] = {pattern.name: [] for pattern in patterns}
    for name, item in named:
        if name not in frozen:
            first = next(pattern for pattern in patterns if pattern.matches(name, shape_of(item)))
            members[first.name].append((name, item))
    if not any(members.values()):
        raise ConfigError(f"{part}: no parameter is left to train. Freeze less of it, or do not train it at all.")
    for pattern in patterns:
        if not members[pattern.name]:
            raise ConfigError(
                f"{part}: no_decay_on_norms puts {NO_DECAY.name} in a group of their own, and the group "
                f"{pattern.name!r} would be empty. Set no_decay_on_norms to false."
            )
    return [
        Group(part, pattern.name, *_columns(members[pattern.name]), lr, 0.0 if pattern.no_decay else weight_decay)
        for pattern in patterns
    ]


def _columns(pairs: Sequence[tuple[str, Shaped]]) -> tuple[tuple[str, ...], tuple[Shaped, ...]]:
    return tuple(name for name, _ in pairs), tuple(item for _, item in pairs)


def guard(groups: Iterable[Group], trainable: Mapping[str, Mapping[str, torch.nn.Parameter]]) -> None:
    """Each trainable parameter of each part is in exactly one group, and no group holds anything else (our bug)."""
    seen: dict[int, str] = {}
    for group in groups:
        for name, param in zip(group.names, group.params(), strict=True):
            where = f"{group.part} {name}"
            assert id(param) not in seen, f"{where} is in two groups; the other name is {seen[id(param)]}"
            assert param.requires_grad, f"{where} is in a group but frozen"
            seen[id(param)] = where
    for part, parameters in trainable.items():
        for name, param in parameters.items():
            assert not param.requires_grad or id(param) in seen, f"{part} {name} is trainable but in no group"


def freeze_text_encoder(
    names: Collection[str],
    *,
    layers: int,
    unused_layers: int = 0,
    unfreeze_last_n_layers: int | None = None,
    freeze_embeddings: bool = False,
    freeze_final_layer_norm: bool = False,
) -> set[str]:
    """The names of the text encoder's parameters that are not trained.

    `layers`: how many the encoder has. `unused_layers`: top layers that clip_skip leaves out: they get no gradient.
    `unfreeze_last_n_layers`: train only the last n of the layers that are used (and the final norm), not the
    embeddings; None: train all, embeddings too.
    """
    used = layers - unused_layers
    last = unfreeze_last_n_layers
    if last is not None and last > used:
        skipped = f" (clip_skip leaves out the last {unused_layers})" if unused_layers else ""
        raise ConfigError(
            f"text_encoder_freezing.unfreeze_last_n_layers is {last}, and the text encoder has {used} layers to "
            f"train{skipped}. Choose 0 to {used}, or null for all."
        )
    first = 0 if last is None else used - last
    prefixes = [f"text_model.encoder.layers.{i}." for i in range(layers) if not first <= i < used]
    if freeze_embeddings or last is not None:
        prefixes.append("text_model.embeddings.")
    if freeze_final_layer_norm:
        prefixes.append("text_model.final_layer_norm.")
    for prefix in prefixes:
        assert any(name.startswith(prefix) for name in names), f"no parameter is named {prefix}…"
    return {name for name in names if name.startswith(tuple(prefixes))}


def freeze(named: Mapping[str, torch.nn.Parameter], frozen: Collection[str]) -> None:
    """Frozen means requires_grad off; whatever is not frozen is on."""
    for name, param in named.items():
        param.requires_grad_(name not in frozen)


# A token embedding has far more rows than columns (49,408 × 768), a layer of Stable Diffusion at most 8 times as many
# or as few (feed-forward: 10,240 × 1,280). An optimizer sees no names.
MOST_LOPSIDED = 16


def takes_muon(shape: Sequence[int]) -> bool:
    """Whether a weight of this shape is Muon's or AdamW's (muon.py)."""
    return len(shape) == 2 and max(shape) <= MOST_LOPSIDED * min(shape)


def param_groups(groups: Sequence[Group], **common: Any) -> list[dict[str, Any]]:
    """What torch optimizers take. A group's own weight decay stands over `common`'s."""
    own = ({} if group.weight_decay is None else {"weight_decay": group.weight_decay} for group in groups)
    return [{**common, "params": group.params(), **decay} for group, decay in zip(groups, own, strict=True)]


def table_lines(groups: Sequence[Group]) -> list[str]:
    """The table printed at start: part, group, tensors, parameters, lr, decay."""
    header = ("part", "group", "tensors", "parameters", "lr", "weight decay")
    rows = [
        (g.part, g.name, str(g.tensors), f"{g.parameters:,}", _number(g.lr), _number(g.weight_decay)) for g in groups
    ]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, *rows):
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"
