"""All sources in, one frozen tree out: `resolve(argv, environ)`.

Precedence, one rule for every key: command line > train.json > optimizer.json > launcher > default (entries.choose).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from everydream.config import arguments, checks, gather
from everydream.config.entries import Entry, Override, choose, default_entry, say_overrides
from everydream.config.files import FORMAT
from everydream.config.kinds import kinds
from everydream.config.parts import (
    BASE,
    FREEZING,
    PREFIXES,
    SCHEDULE_KEYS,
    TEXT_ENCODER,
    PartOptimizer,
    part_optimizer,
    resolve_parts,
    say_part_overrides,
)
from everydream.config.redact import clean
from everydream.config.schema import Settings, TextEncoderFreezing, ValidationSettings, absolute
from everydream.config.sources import (
    COMMAND_LINE,
    DEFAULT,
    DRAWN,
    UNSET,
    Report,
    Source,
    plain,
)
from everydream.errors import ConfigError

# Shown as optimizer.base.lr, optimizer.text_encoder.lr, … and only there
OPTIMIZER_KEYS = ("lr", "text_encoder_lr", *SCHEDULE_KEYS)
NOT_RECORDED = ("resume", "resume_changed", "accept_data_changes")  # said of one start, not of the run


@dataclass(frozen=True)
class Resolved:
    """Every setting of a run, and where each came from. Paths are absolute."""

    settings: Settings
    optimizers: Mapping[str, PartOptimizer]  # "unet", "text_encoder"
    freezing: TextEncoderFreezing
    validation: ValidationSettings | None
    entries: Mapping[str, Entry]
    notes: tuple[str, ...]  # overridden, unused, without effect, retired: each said once
    action: str  # "train", "dry_run", "print_config", "print_config_json"
    processes: int = 1  # as the launcher says
    overridden: tuple[str, ...] = ()  # those of the notes that `show.differences` tells as well

    def record(self) -> dict[str, Any]:
        """The content of config.json, which --config takes back: plain JSON without secrets."""
        settings = {
            key: {"value": plain(entry.value), "origin": entry.origin}
            | ({"inherited": True} if entry.inherited else {})
            for key, entry in ((key, shown.beneath or shown) for key, shown in self.entries.items())
            if key not in NOT_RECORDED
        }
        return {"format": FORMAT, "processes": self.processes, "settings": clean(settings)}

    def with_seed(self, seed: int) -> Resolved:
        """The same settings with a seed that was agreed on: each process draws its own where `seed` is −1."""
        entry = replace(self.entries["seed"], value=seed)
        settings = self.settings.model_copy(update={"seed": seed})
        return replace(self, settings=settings, entries={**self.entries, "seed": entry})


def resolve(argv: Sequence[str], environ: Mapping[str, str]) -> Resolved:
    """The settings of all sources. Raises ConfigError with every problem of every source."""
    report = Report()
    line = arguments.read(argv, report)
    files = gather.files(line, report)
    launcher = gather.launcher(environ, report)
    processes = gather.processes(environ, report)

    entries = _choose_settings([line.source, files.train, launcher], report)
    entries |= resolve_parts(line.source, files.train, files.optimizer, report)
    validation = _choose_validation(files.validation, entries)
    wrong = line.source.wrong | files.wrong()
    if files.config_was_read:
        _say_missing(entries, wrong, line.source, files, report)
        checks.check(entries, wrong, processes, not line.action.startswith("print_config"), report)
    if report.problems:
        raise ConfigError(report.problems)

    said = len(report.notes)
    for key in Settings.model_fields:
        if key in entries:
            say_overrides(key, entries[key], report)
    say_part_overrides(entries, report)
    freezing = {key: entries[FREEZING + key].value for key in TextEncoderFreezing.model_fields}
    return Resolved(
        settings=_settings(entries),
        optimizers={part: part_optimizer(part, entries) for part in PREFIXES},
        freezing=TextEncoderFreezing(**freezing),
        validation=validation,
        entries=entries,
        notes=tuple(report.notes),
        overridden=tuple(report.notes[said:]),
        action=line.action,
        processes=processes,
    )


def _choose_settings(sources: Sequence[Source], report: Report) -> dict[str, Entry]:
    """Entries of all settings but the optimizer's; required ones that nobody states are not among them."""
    entries = {}
    for key, one in Settings.model_fields.items():
        if key in OPTIMIZER_KEYS:
            continue
        entry = choose(key, sources, default_entry(None if one.is_required() else one.default))
        if not one.is_required() or entry.value is not None:
            entries[key] = entry
    _derive(entries, report)
    return entries


def _derive(entries: dict[str, Entry], report: Report) -> None:
    """Defaults that depend on something else than the schema."""
    precision = entries["mixed_precision"]
    entries["mixed_precision"] = replace(precision, value=precision.value or "no", default="no")
    for key, other, none in (("max_epochs", "max_steps", None), ("save_every_n_epochs", "save_every_n_steps", 0)):
        if entries[key].origin in (DEFAULT, UNSET) and entries[other].value is not None:
            entries[key] = replace(entries[key], value=none, default=none)
    logdir, default = entries["logdir"], absolute(str(entries["logdir"].default), Path.cwd())
    entries["logdir"] = replace(
        logdir, value=default if logdir.value == logdir.default else logdir.value, default=default
    )
    seed = entries["seed"]
    if seed.value == -1:
        from random import SystemRandom

        drawn = SystemRandom().randrange(2**31)
        report.note(f"seed {drawn} was drawn")
        entries["seed"] = Entry(drawn, DRAWN, (Override(seed.origin, -1), *seed.overrides), seed.default)


def _say_missing(
    entries: Mapping[str, Entry], wrong: set[str], line: Source, files: gather.Files, report: Report
) -> None:
    for key, one in Settings.model_fields.items():
        if one.is_required() and key not in entries and key not in wrong:
            hint = "" if files.config else _hint_of_config()
            what = kinds(Settings)[key].phrase()
            if key in line.unset:
                report.problem(COMMAND_LINE, f"{line.unset[key].name} null: {key} must be given, and be {what}.{hint}")
            else:
                report.problem(files.config or COMMAND_LINE, f"{key} is missing, and must be {what}.{hint}")


def _hint_of_config() -> str:
    return " ./train.json is there, but was not read: add --config train.json." if Path("train.json").is_file() else ""


def _choose_validation(source: Source | None, entries: dict[str, Entry]) -> ValidationSettings | None:
    if source is None:
        return None
    chosen = {
        key: choose(key, [source], default_entry(one.default)) for key, one in ValidationSettings.model_fields.items()
    }
    steps = entries["validate_every_n_steps"]
    if steps.value is not None:
        own = chosen["every_n_steps"]
        hidden = (Override(own.origin, own.value),) if own.place else ()
        chosen["every_n_steps"] = replace(steps, overrides=(*steps.overrides, *hidden), beneath=own)
    entries |= {f"validation.{key}": entry for key, entry in chosen.items()}
    return ValidationSettings(**{key: entry.value for key, entry in chosen.items()})


def _settings(entries: Mapping[str, Entry]) -> Settings:
    values = {key: entries[key].value for key in Settings.model_fields if key not in OPTIMIZER_KEYS}
    values |= {key: entries[BASE + key].value for key in ("lr", *SCHEDULE_KEYS)}
    values["text_encoder_lr"] = entries[TEXT_ENCODER + "lr"].value
    return Settings(**values)
