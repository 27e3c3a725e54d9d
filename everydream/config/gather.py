"""Everything but the command line: the file of --config, those it names, and the launcher's variable."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from everydream.config.arguments import Line
from everydream.config.entries import choose, default_entry
from everydream.config.files import (
    File,
    OptimizerSource,
    is_record,
    no_optimizer_file,
    optimizer_source,
    record_source,
    train_source,
    validation_source,
)
from everydream.config.parts import BASE, FREEZING, KEYS, TEXT_ENCODER
from everydream.config.schema import Settings, absolute
from everydream.config.sources import LAUNCHER, Report, Source, Stated, check, show
from everydream.errors import ConfigError


@dataclass
class Files:
    """What the files state. `config`: the file of --config, as messages name it."""

    train: Source = field(default_factory=lambda: Source("train.json"))
    optimizer: OptimizerSource = field(default_factory=no_optimizer_file)
    validation: Source | None = None
    config: str = ""
    config_was_read: bool = True

    def wrong(self) -> set[str]:
        """Keys, as entries have them, whose value a file states wrongly."""
        base = {BASE + key for key in self.optimizer.base.wrong}
        text = {TEXT_ENCODER + key for key in self.optimizer.base.wrong | self.optimizer.text_encoder.wrong}
        freezing = {FREEZING + key for key in self.optimizer.freezing.wrong}
        validation = {f"validation.{key}" for key in (self.validation.wrong if self.validation else ())}
        return self.train.wrong | base | text | freezing | validation


def files(line: Line, report: Report) -> Files:
    """--config, then the optimizer's and validation's files that it or the command line names."""
    found = Files()
    repeated = False
    if line.config is not None:
        try:
            file = File(absolute(line.config, Path.cwd()), report)
            found.config = file.shown
            repeated = is_record(file)
            if repeated:
                record = record_source(file)
                found.train, found.optimizer, found.validation = record.train, record.optimizer, record.validation
            else:
                found.train = train_source(file)
        except ConfigError as error:
            report.problems += error.problems
            found.config_was_read = False
    for key, read in (("optimizer_config", _optimizer), ("validation_config", _validation)):
        if not repeated or key in line.source.values or key in line.source.unset:
            read(choose(key, [line.source, found.train], default_entry(None)).value, found, report)
    return found


def _optimizer(path: Path | None, found: Files, report: Report) -> None:
    found.optimizer = no_optimizer_file()
    if path is None:
        return
    try:
        found.optimizer = optimizer_source(File(path, report))
    except ConfigError as error:
        report.problems += error.problems
        found.optimizer.base.wrong |= set(KEYS)  # nothing is known about them: no rule speaks of them


def _validation(path: Path | None, found: Files, report: Report) -> None:
    found.validation = None
    if path is None:
        return
    try:
        found.validation = validation_source(File(path, report))
    except ConfigError as error:
        report.problems += error.problems


def processes(environ: Mapping[str, str], report: Report) -> int:
    """How many the launcher started: it hands each of them this variable."""
    told = environ.get("WORLD_SIZE") or "1"
    if re.fullmatch("[1-9][0-9]{0,8}", told):
        return int(told)
    report.problem(LAUNCHER, f"WORLD_SIZE is {show(told)}, but must be a whole number ≥ 1.")
    return 1


def launcher(environ: Mapping[str, str], report: Report) -> Source:
    """accelerate launch hands --mixed_precision, or its yaml's, to the script in this variable ("no" without)."""
    told = environ.get("ACCELERATE_MIXED_PRECISION")
    if not told:
        return Source(LAUNCHER)
    stated = Stated(told.lower(), LAUNCHER, LAUNCHER, "mixed_precision")
    return check(Settings, {"mixed_precision": stated}, Path.cwd(), report)
