"""The files that hold settings, read into sources: train.json, optimizer.json, validation's file, a run's config.json.

In a file null is the same as leaving the key out. Comments are the keys `doc`, `$schema` and those that begin with
`_` or `-`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everydream.config import strict_json
from everydream.config.legacy import (
    ALIASES,
    REFUSED,
    RETIRED,
    RETIRED_FREEZING,
    RETIRED_OPTIMIZER,
    RETIRED_VALIDATION,
    VALIDATION_ALIASES,
    VALIDATION_COMMENTS,
    Alias,
    Retired,
    means_null,
    translate,
)
from everydream.config.schema import (
    OptimizerFile,
    PartFile,
    Settings,
    TextEncoderFreezing,
    Tree,
    ValidationSettings,
)
from everydream.config.sources import Report, Source, Stated, check, show
from everydream.errors import ConfigError, did_you_mean

FORMAT = "everydream-config-1"
ACTIONS = ("config", "print_config", "dry_run", "help")
SCALE = "text_encoder_lr_scale"


@dataclass
class OptimizerSource:
    """optimizer.json: what it states about each part, the text encoder's share of the lr, and its freezing."""

    base: Source
    text_encoder: Source
    other: Source
    freezing: Source


def no_optimizer_file() -> OptimizerSource:
    return OptimizerSource(Source(""), Source(""), Source(""), Source(""))


class File:
    """A settings file that could be parsed. `origin` is its name, `shown` its path as messages write it."""

    def __init__(self, path: Path, report: Report) -> None:
        self.path, self.report = path, report
        self.origin, self.shown = path.name, _shown(path)
        self.document = strict_json.read(path, self.shown)
        if not isinstance(self.document.value, dict):
            raise ConfigError(f"{self.shown}:1: holds {show(self.document.value)}, but must hold an object {{…}}")

    def place(self, address: strict_json.Address) -> str:
        return f"{self.shown}:{self.document.lines[address]}"

    def members(
        self,
        model: type[Tree],
        address: strict_json.Address = (),
        aliases: Mapping[str, Alias] = {},
        retired: Mapping[str, Retired] = {},
        comments: Iterable[str] = (),
        others: Iterable[str] = (),
    ) -> tuple[dict[str, Stated], set[str]]:
        """What the object at `address` states of the model's fields, and which fields it states wrongly."""
        found: dict[str, Stated] = {}
        wrong: set[str] = set()
        for key, value in self.at(address).items():
            inner = (*address, key)
            place, name = self.place(inner), _name(inner)
            field_name = aliases[key].key if key in aliases else key
            if is_comment(key) or key in comments or key in others:
                continue
            if value is None and (field_name in model.model_fields or key in retired):
                continue  # an unknown key is a mistake whatever its value
            if key in retired:
                self.report.note_at(place, retired[key].say(name))
            elif field_name not in model.model_fields:
                hint = elsewhere(key) if model is Settings else ""
                hint = hint or did_you_mean(key, [*model.model_fields, *aliases, *others])
                self.report.problem(place, f"{name} is not a setting.{hint}")
            elif field_name in found:
                self.report.problem(place, f"{name} stands beside {found[field_name].name}: they are the same setting")
                wrong.add(field_name)
            else:
                value = (
                    translate(key, value, name, place, self.report) if aliases is ALIASES and key in aliases else value
                )
                if value is REFUSED:
                    wrong.add(field_name)
                elif not means_null(field_name, value, name, place, self.report):
                    shown = name if key == field_name else f"{name} ({field_name})"
                    found[field_name] = Stated(value, self.origin, place, shown)
        return found, wrong

    def at(self, address: strict_json.Address) -> dict[str, Any]:
        value = self.document.value
        for key in address:
            value = value[key]
        assert isinstance(value, dict)
        return value

    def source(self, model: type[Tree], found: tuple[dict[str, Stated], set[str]]) -> Source:
        stated, wrong = found
        checked = check(
            model, {key: one for key, one in stated.items() if key not in wrong}, self.path.parent, self.report
        )
        checked.origin = self.origin
        checked.wrong |= wrong
        return checked


def _name(address: strict_json.Address) -> str:
    """base.lr; with quotes where a key is no name, so that `"lr:"` shows its colon."""
    name = ".".join(address)
    return name if name.replace(".", "_").isidentifier() else json.dumps(name, ensure_ascii=False)


def elsewhere(key: str) -> str:
    """Where a key that is no setting of train.json's belongs."""
    if key in ACTIONS:
        return f" It is said on the command line alone: --{key}."
    if key in Settings.model_fields:
        return ""
    if key in OptimizerFile.model_fields or key in PartFile.model_fields:
        return " It belongs into optimizer.json, the file that optimizer_config names."
    if key in ValidationSettings.model_fields:
        return " It belongs into the validation file, which validation_config names."
    return ""


def is_comment(key: str) -> bool:
    return key in ("doc", "$schema") or key.startswith(("_", "-"))


def _shown(path: Path) -> str:
    """Relative where that is shorter: what a person types and an editor opens."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def train_source(file: File) -> Source:
    return file.source(Settings, file.members(Settings, aliases=ALIASES, retired=RETIRED))


def optimizer_source(file: File) -> OptimizerSource:
    """Flat (the base's keys at the top) or nested (`base`); both may have the text encoder's keys."""
    top, report = file.document.value, file.report

    def block(key: str, model: type[Tree], retired: Mapping[str, Retired] = {}) -> Source:
        if top.get(key) is None:
            return Source(file.origin)
        if not isinstance(top[key], dict):
            report.problem(file.place((key,)), f"{key} is {show(top[key])}, but must be an object {{…}}")
            return Source(file.origin)
        return file.source(model, file.members(model, (key,), retired=retired))

    base = file.source(PartFile, file.members(PartFile, retired=RETIRED_OPTIMIZER, others=OptimizerFile.model_fields))
    if top.get("base") is not None:
        for one in base.values.values():
            report.problem(one.place, f"{one.name} stands beside base: move it into base")
        base = block("base", PartFile)
    scale = {SCALE: Stated(top[SCALE], file.origin, file.place((SCALE,)), SCALE)} if top.get(SCALE) is not None else {}
    return OptimizerSource(
        base,
        block("text_encoder_overrides", PartFile),
        file.source(OptimizerFile, (scale, set())),
        block("text_encoder_freezing", TextEncoderFreezing, RETIRED_FREEZING),
    )


def validation_source(file: File) -> Source:
    found = file.members(
        ValidationSettings, aliases=VALIDATION_ALIASES, retired=RETIRED_VALIDATION, comments=VALIDATION_COMMENTS
    )
    if file.at(()).get("validate_training") is False:  # a note would leave validation on
        todo = "leave validation_config out, or set val_split_mode none and stabilize_training_loss false"
        file.report.problem(
            file.place(("validate_training",)), f"validate_training false turned validation off: {todo}"
        )
    return file.source(ValidationSettings, found)


def is_record(file: File) -> bool:
    return "format" in file.document.value


@dataclass
class RecordSource:
    """A run's config.json, taken apart into the sources it stands for."""

    train: Source
    optimizer: OptimizerSource
    validation: Source | None


def record_source(file: File) -> RecordSource:
    """Raises ConfigError where the file is of another format."""
    top = file.document.value
    if top["format"] != FORMAT:
        found = show(top["format"])
        raise ConfigError(f'{file.place(("format",))}: format is {found}, but this program reads "{FORMAT}"')
    if not isinstance(top.get("settings"), dict):
        place = file.place(("settings",)) if "settings" in top else file.shown
        raise ConfigError(f"{place}: settings is {show(top.get('settings'))}, but must be an object {{…}}")
    stated: dict[str, dict[str, Stated]] = {group: {} for group in ("", *_GROUPS)}
    for key, entry in top["settings"].items():
        place = file.place(("settings", key))
        group = next((prefix for prefix in _GROUPS if key.startswith(prefix)), "")
        field_name = key[len(group) :]
        if field_name not in _GROUPS.get(group, Settings).model_fields:
            file.report.problem(place, f"{key} is not a setting.{did_you_mean(key, Settings.model_fields)}")
        elif not isinstance(entry, dict) or "value" not in entry:
            file.report.problem(place, f'{key} is {show(entry)}, but must be {{"value": …, "origin": …}}')
        elif entry["value"] is not None and not entry.get("inherited"):
            stated[group][field_name] = Stated(entry["value"], file.origin, place, key)
    sources = {group: file.source(_GROUPS.get(group, Settings), (values, set())) for group, values in stated.items()}
    optimizer = OptimizerSource(sources[_BASE], sources[_TEXT_ENCODER], sources[_OTHER], sources[_FREEZING])
    return RecordSource(sources[""], optimizer, sources[_VALIDATION] if stated[_VALIDATION] else None)


# Keys of config.json and --print_config → the model they belong to; the longest prefix first
_BASE, _TEXT_ENCODER, _OTHER = "optimizer.base.", "optimizer.text_encoder.", "optimizer."
_FREEZING, _VALIDATION = "optimizer.text_encoder_freezing.", "validation."
_GROUPS: dict[str, type[Tree]] = {
    _BASE: PartFile,
    _TEXT_ENCODER: PartFile,
    _FREEZING: TextEncoderFreezing,
    _OTHER: OptimizerFile,
    _VALIDATION: ValidationSettings,
}
