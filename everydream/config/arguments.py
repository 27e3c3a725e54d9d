"""The command line, read by the schema: `--key value`, `--key=value`, `--flag`, `--no_flag`, `--flag false`.

`--key null` unsets. A list is given as several values, as a repeated option or as JSON: `--data_root a b`.
No abbreviations: `--batch` is an error, so that a new setting never changes what an old command means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isinf
from pathlib import Path
from typing import Any

from everydream.config.files import ACTIONS, elsewhere
from everydream.config.kinds import Kind, kinds
from everydream.config.legacy import ALIASES, REFUSED, RETIRED, means_null, translate
from everydream.config.schema import Settings
from everydream.config.sources import COMMAND_LINE, UNSET, Report, Source, Stated, check
from everydream.errors import did_you_mean

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOOLEANS = {"true": True, "false": False, "True": True, "False": False}


@dataclass
class Line:
    """What the command line says besides settings."""

    config: str | None = None
    action: str = "train"
    help: bool = False
    source: Source = field(default_factory=lambda: Source(COMMAND_LINE))


def read(argv: Sequence[str], report: Report) -> Line:
    """The settings and actions of the command line; what is wrong goes into the report."""
    line = Line()
    raw: dict[str, Stated] = {}
    for option, words in _options(argv, report):
        if option in ACTIONS:
            _own(line, option, words, report)
        else:
            _setting(option, words, raw, line.source, report)
    checked = check(Settings, raw, Path.cwd(), report)
    line.source.values |= checked.values
    line.source.wrong |= checked.wrong
    return line


def _options(argv: Sequence[str], report: Report) -> list[tuple[str, list[str]]]:
    """Each option with the words that follow it."""
    options: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            options.append((name, [value] if equals else []))
        elif word == "-h":
            options.append(("help", []))
        elif options:
            options[-1][1].append(word)
        else:
            report.problem(COMMAND_LINE, f"{word!r} belongs to no option: write --key value")
    return options


def _own(line: Line, option: str, words: list[str], report: Report) -> None:
    def refuse(wanted: str) -> None:
        said = " ".join([f"--{option}", *(word or '""' for word in words)])
        report.problem(COMMAND_LINE, f"{said}: write {wanted}")

    if option == "help":
        line.help = True
    elif option == "config":
        if len(words) != 1 or not words[0]:
            refuse("--config PATH")
        elif line.config is not None:
            report.problem(COMMAND_LINE, "--config is given twice")
        else:
            line.config = words[0]
    elif option == "dry_run":
        if words:
            refuse("--dry_run alone")
        elif line.action == "train":
            line.action = "dry_run"
    elif words in ([], ["json"]):
        line.action = "print_config_json" if words else "print_config"
    else:
        refuse("--print_config or --print_config json")


def _setting(option: str, words: list[str], raw: dict[str, Stated], source: Source, report: Report) -> None:
    """One option that is no action: into `raw`, or into the source's unset or wrong keys."""
    fields, shown = kinds(Settings), f"--{option}"
    negated = option.startswith("no_") and not (option in fields or option in ALIASES or option in RETIRED)
    key = option[3:] if negated else option
    name = ALIASES[key].key if key in ALIASES else key
    if key in RETIRED:
        report.note_at(COMMAND_LINE, RETIRED[key].say(shown))
    elif name not in fields or (negated and bool not in _kind(key, name).types):
        hint = elsewhere(key) or did_you_mean(option, [*fields, *ALIASES, *ACTIONS]).replace("'", "'--", 1)
        report.problem(COMMAND_LINE, f"{shown} is not a setting.{hint}")
    elif name in source.unset or (name in raw and (words == ["null"] or not fields[name].many)):
        report.problem(COMMAND_LINE, f"{shown} is given twice")
        source.wrong.add(name)
    else:
        value = _value(key, name, shown, False if negated else None, words, report)
        if value is REFUSED:
            source.wrong.add(name)
        elif value is None:
            source.unset[name] = Stated(None, UNSET, COMMAND_LINE, shown)
        else:
            value = (*raw[name].value, *value) if name in raw else value
            raw[name] = Stated(value, COMMAND_LINE, COMMAND_LINE, shown)


def _kind(key: str, name: str) -> Kind:
    """Of an old key that is a switch: what it takes itself, not what its setting takes."""
    return Kind(types=(bool,)) if key in ALIASES and ALIASES[key].values else kinds(Settings)[name]


def _value(key: str, name: str, shown: str, said: bool | None, words: list[str], report: Report) -> Any:
    """What an option says: None for null, REFUSED after a problem; `said` False for --no_flag."""
    kind = _kind(key, name)
    if said is not None and words:
        report.problem(COMMAND_LINE, f"{shown} takes no value")
        return REFUSED
    if words == ["null"]:
        return None
    if said is None and not words and bool not in kind.types:
        report.problem(COMMAND_LINE, f"{shown} needs a value: {kind.phrase()}")
        return REFUSED
    value = _parse(kind, words) if said is None else said
    if key in ALIASES:
        value = translate(key, value, shown, COMMAND_LINE, report)
    return None if means_null(name, value, shown, COMMAND_LINE, report) else value


def _parse(kind: Kind, words: list[str]) -> Any:
    """The words as the kind's value; what does not parse stays text, which the schema then refuses."""
    if kind.many:
        return tuple(item for word in words for item in _items(word))
    if not words:
        return True
    return _one(kind, words[0]) if len(words) == 1 else tuple(words)


def _items(word: str) -> tuple[Any, ...]:
    if not word.startswith("["):
        return (word,)
    try:
        return tuple(json.loads(word))
    except ValueError:
        return (word,)


def _one(kind: Kind, word: str) -> Any:
    if bool in kind.types and word in _BOOLEANS:
        return _BOOLEANS[word]
    if int in kind.types and _INTEGER.fullmatch(word) and len(word) < 300:
        return int(word)
    if float in kind.types and _NUMBER.fullmatch(word) and not isinf(float(word)):
        return float(word)
    return word
