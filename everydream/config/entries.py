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
    """`default`: what held if nobody stated anything. `place`: the origin with its line ("train.json:7").
    `inherited`: follows from another entry, so that a repeat of the run derives it anew."""

    value: Any
    origin: str = DEFAULT
    overrides: tuple[Override, ...] = ()
    default: Any = None
    place: str = ""
    inherited: bool = False

    def as_json(self) -> dict[str, Any]:
        overrides = [{"origin": one.origin, "value": plain(one.value)} for one in self.overrides]
        return {"value": plain(self.value), "origin": self.origin, "overrides": overrides}


def default_entry(value: Any) -> Entry:
    return Entry(value, default=value)


def choose(key: str, sources: Sequence[Source], default: Entry) -> Entry:
    """Precedence: the first of `sources` that states the key (highest first). Unset: the default."""
    stated = [source.values[key] for source in sources if key in source.values]
    if key in sources[0].unset:
        told = [one.value for one in stated if one.origin == LAUNCHER]  # null hides what files say, nothing else
        hidden = [one for one in stated if one.origin != LAUNCHER]
        return replace(default, value=(*told, default.value)[0], origin=UNSET, overrides=_overrides(hidden), place="")
    if not stated:
        return default
    first, *hidden = stated
    return Entry(first.value, first.origin, _overrides(hidden), default.default, first.place)


def _overrides(stated: Sequence[Stated]) -> tuple[Override, ...]:
    return tuple(Override(one.origin, one.value) for one in stated)


def say_overrides(name: str, entry: Entry, report: Report) -> None:
    """ "lr 2e-06 from train.json overrides 1e-06 from optimizer.json", where the values differ."""
    for hidden in entry.overrides:
        if hidden.value == entry.value or entry.origin == DRAWN:
            continue
        if hidden.origin == LAUNCHER and hidden.value == entry.default:  # accelerate launch says "no" unasked
            continue
        if entry.origin == UNSET:
            report.note(f"{name} {show(entry.value)}: null on the command line hides "
                        f"{show(hidden.value)} from {hidden.origin}")  # fmt: skip
        else:
            report.note(f"{name} {show(entry.value)} from {entry.origin} overrides "
                        f"{show(hidden.value)} from {hidden.origin}")  # fmt: skip
