"""A setting's final value, where it came from, and what it overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from everydream.config.sources import DEFAULT, DRAWN, LAUNCHER, UNSET, Report, Source, Stated, plain, show


class Override(NamedTuple):
    """A value that a source of higher precedence hides."""

    origin: str
    value: Any


@dataclass(frozen=True)
class Entry:
    """`default`: what held if nobody stated anything. `place`: the origin with its line ("train.json:7"), `name` how
    it is called there; both empty where nobody stated it.
    `inherited`: follows from another entry, so that a repeat of the run derives it anew. `beneath`: the entry that
    held without another setting, which stands over it; a repeat begins with this one."""

    value: Any
    origin: str = DEFAULT
    overrides: tuple[Override, ...] = ()
    default: Any = None
    place: str = ""
    inherited: bool = False
    name: str = ""
    beneath: Entry | None = None

    def as_json(self) -> dict[str, Any]:
        overrides = [{"origin": one.origin, "value": plain(one.value)} for one in self.overrides]
        return {"value": plain(self.value), "origin": self.origin, "overrides": overrides}


def default_entry(value: Any) -> Entry:
    return Entry(value, default=value)


def choose(key: str, sources: Sequence[Source], default: Entry) -> Entry:
    """Precedence: the first of `sources` that states the key (highest first). Unset: the default, whoever spoke."""
    stated = [source.values[key] for source in sources if key in source.values]
    if key in sources[0].unset:
        return replace(default, origin=UNSET, overrides=_overrides(stated), place="", name="")
    if not stated:
        return default
    first, *hidden = stated
    return Entry(first.value, first.origin, _overrides(hidden), default.default, first.place, name=first.name)


def _overrides(stated: Sequence[Stated]) -> tuple[Override, ...]:
    return tuple(Override(one.origin, one.value) for one in stated)


def say_overrides(name: str, entry: Entry, report: Report) -> None:
    """ "lr 2e-06 from train.json overrides 1e-06 from optimizer.json", where the values differ."""
    hidden = [
        f"{show(one.value)} from {one.origin}"
        for one in entry.overrides
        if one.value != entry.value and not (one.origin == LAUNCHER and one.value == entry.default)
    ]  # accelerate launch says "no" unasked
    if hidden and entry.origin == UNSET:
        report.note(f"{name} {show(entry.value)}: null on the command line hides {' and '.join(hidden)}")
    elif hidden and entry.origin != DRAWN:
        report.note(f"{name} {show(entry.value)} from {entry.origin} overrides {' and '.join(hidden)}")
