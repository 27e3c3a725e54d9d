"""A source of settings (a file, the command line) and what it states: values checked one by one, with their places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from everydream.config.kinds import kinds
from everydream.config.schema import Tree
from everydream.errors import did_you_mean

COMMAND_LINE = "command line"
UNSET = "command line (unset)"
LAUNCHER = "launcher"
DEFAULT = "default"
DRAWN = "drawn"  # of a seed that −1 asked for


class Stated(NamedTuple):
    """A value as one source states it. `place` is where messages point ("train.json:7", "command line"), `name` how
    they name it ("--batch_size", "base.lr")."""

    value: Any
    origin: str
    place: str
    name: str


@dataclass
class Source:
    """`unset`: keys that the command line set to null. `wrong`: keys whose value was refused, so that rules about
    them, and "is missing", stay silent."""

    origin: str
    values: dict[str, Stated] = field(default_factory=dict)
    unset: dict[str, Stated] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)


@dataclass
class Report:
    """What is said in the end: problems end the run, notes do not. Each is said once."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, place: str, text: str) -> None:
        self._add(self.problems, f"{place}: {text}")

    def note(self, text: str) -> None:
        self._add(self.notes, text)

    def note_at(self, place: str, text: str) -> None:
        self._add(self.notes, f"{place}: {text}")

    @staticmethod
    def _add(texts: list[str], text: str) -> None:
        if text not in texts:
            texts.append(text)


def show(value: Any) -> str:
    """A value as JSON and the messages write it, shortened."""
    text = json.dumps(plain(value), ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "…" + text[-1]


def plain(value: Any) -> Any:
    """Paths as strings, tuples as lists: what JSON can hold."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def check(model: type[Tree], stated: Mapping[str, Stated], folder: Path, report: Report) -> Source:
    """The values the model accepts, converted (paths absolute, from `folder`); the others are reported."""
    source = Source("")
    fields = model.model_fields
    known = {key: one for key, one in stated.items() if key in fields}
    filler = {key: "-" for key, one in fields.items() if one.is_required() and key not in known}
    bad: dict[str, Any] = {}
    values = {key: one.value for key, one in known.items()}
    try:
        tree = model.model_validate({**filler, **values}, context={"folder": folder})
    except ValidationError as error:
        bad = {str(one["loc"][0]): one for one in error.errors(include_url=False)}
        good = {key: value for key, value in values.items() if key not in bad}
        filler |= {key: "-" for key in bad if fields[key].is_required()}
        tree = model.model_validate({**filler, **good}, context={"folder": folder})
    for key, one in known.items():
        if key in bad:
            source.wrong.add(key)
            report.problem(one.place, _refusal(one, model, key))
        else:
            source.values[key] = one._replace(value=getattr(tree, key))
    return source


def _refusal(one: Stated, model: type[Tree], key: str) -> str:
    kind = kinds(model)[key]
    hint = did_you_mean(one.value, kind.choices) if isinstance(one.value, str) else ""
    if kind.many and one.value in kind.choices:
        hint = f" Write [{show(one.value)}]."
    return f"{one.name} is {show(one.value)}, but must be {kind.phrase()}.{hint}"
