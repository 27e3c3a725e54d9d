"""What a field takes, read from its annotation: for parsing the command line, for messages, `--help` and the docs."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path",
         dict: "an object {…}"}  # fmt: skip
BOUNDS = (("ge", "≥ {}"), ("gt", "> {}"), ("le", "≤ {}"), ("lt", "< {}"))


@dataclass(frozen=True)
class Kind:
    """`types` in the order the command line tries them; `many`: a list of them."""

    types: tuple[type, ...] = ()
    choices: tuple[str, ...] = ()
    many: bool = False
    nullable: bool = False
    bounds: str = ""
    words: str = ""  # in place of the type, where a pattern says more

    def phrase(self) -> str:
        """ "a whole number ≥ 1", "true or false or "max"" … as messages and docs say it."""
        names = [NAMES.get(one, "an object {…}") for one in self.types]
        choices = [f'"{choice}"' for choice in self.choices]
        if len(choices) > 2:
            choices = ["one of " + ", ".join(choices)]
        text = self.words or " or ".join([*choices, *names])
        if self.bounds:
            text += f" {self.bounds}"
        return f"a list, each {text}" if self.many and "list" not in text else text


@cache
def kinds(model: type[BaseModel]) -> dict[str, Kind]:
    """The kind of each field of a model."""
    return {name: _kind(one.annotation, (*one.metadata, one)) for name, one in model.model_fields.items()}


def _kind(annotation: Any, metadata: Iterable[Any] = ()) -> Kind:
    return _narrow(_bare(annotation), metadata)


def _bare(annotation: Any) -> Kind:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], inner[1:])
    if origin is Literal:
        return Kind(choices=tuple(inner))
    if origin is tuple:
        return replace(_kind(inner[0]), many=True)
    if origin in (Union, types.UnionType):
        parts = [_kind(part) for part in inner if part is not type(None)]
        return Kind(
            types=tuple(one for part in parts for one in part.types),
            choices=tuple(choice for part in parts for choice in part.choices),
            many=any(part.many for part in parts),
            nullable=type(None) in inner,
            bounds=" ".join(part.bounds for part in parts if part.bounds),
            words=" or ".join(part.words for part in parts if part.words),
        )
    return Kind(types=(origin or annotation,))


def _narrow(kind: Kind, metadata: Iterable[Any]) -> Kind:
    bounds = [kind.bounds] if kind.bounds else []
    for item in metadata:
        if isinstance(item, FieldInfo):
            kind = replace(kind, words=item.title or kind.words)
        for constraint in item.metadata if isinstance(item, FieldInfo) else (item,):
            for name, text in BOUNDS:
                bound = getattr(constraint, name, None)
                if bound is not None and text.format(_number(bound)) not in bounds:
                    bounds.append(text.format(_number(bound)))
    return replace(kind, bounds=" and ".join(bounds))


def _number(bound: float) -> str:
    return {2**63 - 1: "2^63 - 1", 10**9: "10^9", 10**6: "10^6"}.get(int(bound), str(bound))
